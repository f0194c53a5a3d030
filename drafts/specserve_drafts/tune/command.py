"""Shared by the commands of `specserve tune`: flags, errors, the engine that runs the target."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from specserve.cli.parser import PROMPTS_HELP
from specserve.cli.progress import show_progress
from specserve.config import ScheduleConfig, TargetConfig
from specserve.llm import LLM
from specserve_drafts.tune.prompt_file import HELD_OUT


def new_parser(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"specserve tune {name}", description=description, allow_abbrev=False
    )


def run_command(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    run: Callable[[argparse.Namespace], str | None],
) -> int:
    """Parse `argv`, run the command and print the line that it returns. The exit code is 0, or 2
    after a ValueError, whose message is printed."""
    args = parser.parse_args(argv)
    try:
        line = run(args)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    if line is not None:
        print(line)
    return 0


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every training run: prompts, exclusions, output directory, resuming."""
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help=f"{PROMPTS_HELP}; {HELD_OUT} of them are held out",
    )
    parser.add_argument(
        "--exclude",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.jsonl",
        help="leave out prompts that share 13 words in a row with one of these; repeatable",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="directory of the draft"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in DIR")


def open_llm(target: TargetConfig, batch: int, rows_each: int = 1, **settings: Any) -> LLM:
    """An engine that runs `batch` sequences together, with `rows_each` rows for each of them."""
    rows = max(batch * rows_each, ScheduleConfig().max_num_batched_tokens)
    with show_progress() as progress:
        return LLM(
            max_num_seqs=batch,
            max_num_batched_tokens=rows,
            prefix_caching=False,
            progress=progress,
            **msgspec.structs.asdict(target),
            **settings,
        )
