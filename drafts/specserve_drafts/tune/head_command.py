"""The command line of every method that trains heads: flags, one run, and the card at its end."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from specserve_drafts.tune.claim import claimed
from specserve_drafts.tune.head_card import HeadMade, write_card
from specserve_drafts.tune.head_run import Method, Run
from specserve_drafts.tune.head_settings import (
    HeadSettings,
    Settings,
    add_settings,
    read_settings,
)
from specserve_drafts.tune.prompts import add_run_flags
from specserve_evals import provenance


def train(
    parser: argparse.ArgumentParser,
    kind: type[Settings],
    make: Callable[[Settings], Method],
    argv: Sequence[str] | None,
) -> int:
    """0: made; 2: wrong usage."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(arguments)
    try:
        settings, target = read_settings(args, kind)
        method = make(settings)
        with claimed(args.out):
            run = Run(args, settings, target, method)
            run.learn()
    except ValueError as error:
        print(f"{parser.prog.removeprefix('specserve ')}: error: {error}", file=sys.stderr)
        return 2
    made = HeadMade(
        method=method.name,
        provenance=provenance.collect(
            "specserve.cli",
            ["tune", method.name, *arguments],
            run.llm.engine.platform,
            args.prompts,
        ),
        settings=run.state.settings,
        num_prompts=run.num_prompts,
        num_excluded=run.num_excluded,
        best=max(run.state.curve, key=lambda point: point.tau),
        curve=run.state.curve,
    )
    write_card(args.out, method.describe(run.trainer, made), made)
    print(f"{args.out}: {made.best.tau:.2f} tokens per pass on prompts that were kept back")
    return 0


def head_parser(name: str, description: str, kind: type[HeadSettings]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"specserve tune {name}", description=description, allow_abbrev=False
    )
    add_run_flags(parser)
    parser.add_argument(
        "--experiment", type=Path, metavar="FILE.toml", help="settings; flags override it"
    )
    add_settings(parser, kind)
    return parser
