"""`specserve eval NAME ...`: runs an eval, which has its own flags and `--help`.

Evals are in a layer above the command line, so they are imported by name, as drafters are.
"""

import argparse
from importlib import import_module


def run(args: argparse.Namespace) -> int:
    """Run the eval with the remaining arguments. Returns its exit code."""
    return int(import_module(f"specserve_evals.{args.name}").main(args.arguments))
