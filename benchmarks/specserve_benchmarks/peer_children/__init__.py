"""One program per engine, each run by the Python interpreter of that engine's environment."""
