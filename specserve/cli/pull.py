"""`specserve pull`: downloads a model, converts it if necessary, and prints its directory."""

import argparse

from specserve.cli.progress import show_progress
from specserve.hub import resolve


def run(args: argparse.Namespace) -> int:
    with show_progress() as report:
        directory = resolve(args.target, progress=report)
    print(directory)
    return 0
