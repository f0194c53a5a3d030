"""`specserve eval NAME ...`: the arguments go to an eval, which has flags and `--help` of its own.

Evals stand above the command line and are imported by name, as drafters are.
"""

import argparse
from importlib import import_module


def run(args: argparse.Namespace) -> int:
    """The exit code of the eval."""
    return int(import_module(f"specserve_evals.{args.name}").main(args.arguments))
