"""The command line. A command is a module with `run(args)`, which returns the exit code."""

from specserve.cli.main import main

__all__ = ["main"]
