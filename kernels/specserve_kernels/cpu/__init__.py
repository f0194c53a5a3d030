"""The native CPU backend: kernels compiled at install time, for the instructions this CPU has."""
