"""`specserve tune NAME ...`: the arguments go to a method with flags and `--help` of its own."""

import argparse
from importlib import import_module


def run(args: argparse.Namespace) -> int:
    """The exit code of the method."""
    return int(import_module(f"specserve_drafts.tune.{args.name}").main(args.arguments))
