"""Train an EAGLE-3.1 head for a target on the target's own answers.

specserve tune eagle --prompts train.jsonl --exclude spec_bench.jsonl --out DIR --minutes 120

Answering and training take turns. A run can be killed at any moment and goes on with --resume.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from specserve_drafts.tune.eagle_card import EagleMade, write_card
from specserve_drafts.tune.eagle_run import Run
from specserve_drafts.tune.eagle_settings import add_settings, read_settings
from specserve_drafts.tune.prompts import add_run_flags
from specserve_evals import provenance


def main(argv: Sequence[str] | None = None) -> int:
    """0: made; 2: wrong usage."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(arguments)
    try:
        settings, target = read_settings(args)
        run = Run(args, settings, target)
        run.learn()
    except ValueError as error:
        print(f"tune eagle: error: {error}", file=sys.stderr)
        return 2
    made = EagleMade(
        method="eagle",
        provenance=provenance.collect(
            "specserve.cli", ["tune", "eagle", *arguments], run.llm.engine.platform, args.prompts
        ),
        settings=run.state.settings,
        num_prompts=run.num_prompts,
        num_excluded=run.num_excluded,
        best=max(run.state.curve, key=lambda point: point.tau),
        curve=run.state.curve,
    )
    write_card(args.out, run.trainer.head.shape, made)
    print(f"{args.out}: {made.best.tau:.2f} tokens per pass on prompts that were kept back")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specserve tune eagle",
        description="Train an EAGLE-3.1 head for a target on the target's own answers.",
        allow_abbrev=False,
    )
    add_run_flags(parser)
    parser.add_argument(
        "--experiment", type=Path, metavar="FILE.toml", help="settings; flags override it"
    )
    add_settings(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
