"""The command line. It holds no logic of its own: commands call the packages below.

The module of a command has a function `run(args)` that returns the exit code.
"""

from specserve.cli.main import main

__all__ = ["main"]
