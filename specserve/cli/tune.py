"""`specserve tune NAME ...`: runs a tuning method, which has its own flags and `--help`."""

import argparse
from importlib import import_module


def run(args: argparse.Namespace) -> int:
    """Run the method with the remaining arguments. Returns its exit code."""
    return int(import_module(f"specserve_drafts.tune.{args.name}").main(args.arguments))
