"""How fast it is: every claim of speed in this repository comes from a program in here."""
