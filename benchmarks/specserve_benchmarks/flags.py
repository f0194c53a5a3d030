"""Flags that several benchmarks have."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from specserve.cli.flags import default_text
from specserve_evals.runs import at_least_one

RESULTS: Final = Path("benchmarks/results")


def add_repeats(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument(
        "--repeats",
        type=at_least_one,
        default=default,
        metavar="N",
        help=f"how often everything is measured{default_text(default)}",
    )


def add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help=f"for the results, as JSON and Markdown{default_text(str(RESULTS))}",
    )


def add_sizes(
    parser: argparse.ArgumentParser, rows: Sequence[int], contexts: Sequence[int]
) -> None:
    """Add the sizes of forward passes; every combination is measured."""
    for flag, default, meaning in (
        ("--rows", rows, "rows of a forward pass"),
        ("--contexts", contexts, "tokens of the context before them"),
    ):
        parser.add_argument(
            flag,
            nargs="+",
            type=at_least_one,
            default=default,
            metavar="N",
            help=f"{meaning}{default_text(tuple(default))}",
        )
