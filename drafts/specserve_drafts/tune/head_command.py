"""The command line of methods that train heads: parses flags, performs one run, writes the card."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from specserve_drafts.tune.claim import claimed
from specserve_drafts.tune.head_card import HeadMade, write_card
from specserve_drafts.tune.head_run import Method, Run, answer
from specserve_drafts.tune.head_settings import (
    HeadSettings,
    Settings,
    add_settings,
    read_settings,
)
from specserve_drafts.tune.prompt_file import add_run_flags
from specserve_evals import provenance
from specserve_evals.runs import at_least_one


def train(
    parser: argparse.ArgumentParser,
    kind: type[Settings],
    make: Callable[[Settings], Method],
    argv: Sequence[str] | None,
) -> int:
    """Run the command; the exit code is 0, or 2 for wrong usage.

    kind: the method's settings; make: creates the method from them; argv: None: sys.argv.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(arguments)
    try:
        settings, target = read_settings(args, kind)
        method = make(settings)
        if args.answer:
            answer(args, settings, target)
            return 0
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
    print(f"{args.out}: {made.best.tau:.2f} tokens per forward pass on held-out prompts")
    return 0


def head_parser(name: str, description: str, kind: type[HeadSettings]) -> argparse.ArgumentParser:
    """The parser of `specserve tune NAME`, with the settings of `kind` as flags."""
    parser = argparse.ArgumentParser(
        prog=f"specserve tune {name}", description=description, allow_abbrev=False
    )
    add_run_flags(parser)
    parser.add_argument(
        "--experiment", type=Path, metavar="FILE.toml", help="settings; flags override it"
    )
    parser.add_argument(
        "--answer",
        type=at_least_one,
        default=0,
        metavar="N",
        help="only answer the first N prompts, and train on them in a later run in DIR",
    )
    parser.add_argument(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="K/M",
        help="with --answer: answer part K of M only, so that M processes share the work",
    )
    add_settings(parser, kind)
    return parser


def _part(text: str) -> tuple[int, int]:
    try:
        part, num_parts = map(int, text.split("/"))
    except ValueError:
        part, num_parts = 0, 0
    if not 1 <= part <= num_parts:
        raise argparse.ArgumentTypeError(f"{text!r}: expected K/M with K from 1 to M")
    return part, num_parts
