"""Speed benchmarks. Every claim of speed in this repository comes from a program in here."""
