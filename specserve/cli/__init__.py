"""The command line. Every command is a thin caller of what the packages below offer."""

from specserve.cli.main import main

__all__ = ["main"]
