"""Shared by the commands of `specserve tune`: flags, errors, the engine that runs the target."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from specserve.cli.loading import without_gc
from specserve.cli.parser import PROMPTS_HELP
from specserve.cli.progress import show_progress
from specserve.config import ScheduleConfig, TargetConfig
from specserve.hub import resolve
from specserve.llm import LLM
from specserve_drafts.tune.gain import Gain
from specserve_drafts.tune.prompt_file import HELD_OUT


def new_parser(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"specserve tune {name}", description=description, allow_abbrev=False
    )


def run_command(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    run: Callable[[argparse.Namespace], str],
) -> int:
    """Parse `argv`, run the command and print the line that it returns. The exit code is 0, or 2
    after a ValueError, whose message is printed."""
    args = parser.parse_args(argv)
    try:
        print(run(args))
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every training run: prompts, exclusions, output directory, resuming."""
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help=f"{PROMPTS_HELP}; a quarter of them, {HELD_OUT} at most, are held out",
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


def fetch(target: TargetConfig) -> Path:
    """The directory of the target, which is downloaded if it is missing."""
    with show_progress() as progress:
        return resolve(target.target, progress=progress)


def open_llm(target: TargetConfig, batch: int, rows_each: int = 1, **settings: Any) -> LLM:
    """An engine that runs `batch` sequences together, with `rows_each` rows for each of them."""
    rows = max(batch * rows_each, ScheduleConfig().max_num_batched_tokens)
    with without_gc():
        return LLM(
            max_num_seqs=batch,
            max_num_batched_tokens=rows,
            prefix_caching=False,
            **msgspec.structs.asdict(target),
            **settings,
        )


def served(draft: Path, target: TargetConfig, gain: Gain) -> str:
    """The last line of a command: what the draft gains, and the command that serves it."""
    path = str(draft) if len(draft.parts) > 1 else os.path.join(".", draft)  # not a drafter's name
    return f"{draft}: {gain}; specserve serve {target_words(target)} --draft {shlex.quote(path)}"


def target_words(target: TargetConfig) -> str:
    """The target and its settings as words of a command line."""
    words = [target.target]
    for info in msgspec.structs.fields(TargetConfig):
        value = getattr(target, info.name)
        if info.name != "target" and value != info.default:
            words += [f"--{info.name.replace('_', '-')}", str(value)]
    return shlex.join(words)
