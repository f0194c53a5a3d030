"""The commands that train heads: flags, one run, the card."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from specserve_drafts.tune.clock import Clock, Progress
from specserve_drafts.tune.command import add_run_flags, fetch, new_parser, run_command, served
from specserve_drafts.tune.gain import measure_gain
from specserve_drafts.tune.head_card import HeadMade, write_head_card
from specserve_drafts.tune.head_run import Run, answer
from specserve_drafts.tune.head_training import Method
from specserve_drafts.tune.run_state import claimed
from specserve_drafts.tune.settings import add_settings, read_settings
from specserve_evals import provenance
from specserve_evals.progress import track
from specserve_evals.runs import at_least_one


def train(kind: type[Method], argv: Sequence[str], started: float | None = None) -> int:
    """Run the command of a method; the exit code is 0, or 2 after an error.

    started: when the command began, in `time.monotonic()` seconds; None: now.
    """

    def run(args: argparse.Namespace) -> str:
        settings, target = read_settings(args, kind.Settings, args.experiment)
        method = kind(settings)
        fetch(target)
        if args.answer:
            num_prompts = answer(args, settings, target)
            return f"{args.out}: {num_prompts} prompts answered; train on them without --answer"
        clock = Clock(settings, started)
        with (
            claimed(args.out),
            track(settings.limit) as advance,
            Progress(settings, clock, advance) as progress,
        ):
            run = Run(args, settings, target, method, clock, progress)
            run.learn()
            command, platform = ["tune", method.name, *argv], run.llm.engine.platform
            origin = provenance.collect("specserve.cli", command, platform, args.prompts)
            run.llm.close()  # its memory
            gain = measure_gain(
                target, args.out, run.held_out, clock.end, lambda: run.show("measuring")
            )
            made = HeadMade(
                method=method.name,
                provenance=origin,
                settings=run.state.settings,
                num_prompts=run.num_prompts,
                num_excluded=run.num_excluded,
                gain=gain,
                best=max(run.state.curve, key=lambda point: point.tau),
                curve=run.state.curve,
            )
            about = method.about(run.trainer, made.settings["target"], made.coverage)
            write_head_card(args.out, made, method.kind, about, method.layout)
        return served(args.out, target, gain)

    return run_command(head_parser(kind), argv, run)


def head_parser(kind: type[Method]) -> argparse.ArgumentParser:
    """The parser of the command of a method, with its settings as flags."""
    parser = new_parser(
        kind.name, f"Train heads ({kind.kind}) for a target on the target's own answers."
    )
    add_run_flags(parser)
    parser.add_argument(
        "--experiment", type=Path, metavar="FILE.toml", help="settings; flags override it"
    )
    parser.add_argument(
        "--answer",
        type=at_least_one,
        metavar="N",
        help="only answer the first N prompts, however long that takes, and train on them in a "
        "later run in DIR",
    )
    parser.add_argument(
        "--part",
        type=_part,
        metavar="K/M",
        help="with --answer: answer part K of M only, so that M processes share the work; not "
        "given: all",
    )
    add_settings(parser, kind.Settings)
    return parser


def _part(text: str) -> tuple[int, int]:
    try:
        part, num_parts = map(int, text.split("/"))
    except ValueError:
        part, num_parts = 0, 0
    if not 1 <= part <= num_parts:
        raise argparse.ArgumentTypeError(f"{text!r}: expected K/M with K from 1 to M")
    return part, num_parts
