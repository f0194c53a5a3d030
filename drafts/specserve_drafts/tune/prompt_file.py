"""What a draft is trained on: prompts of a file, without those that an evaluation asks."""

import argparse
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from specserve.cli.prompts import Messages
from specserve_evals.prompts import load_prompts

NGRAM: Final = 13  # words in a row that make a prompt one of an evaluation's (Brown et al. 2020, C)
_WORDS: Final = re.compile(r"\w+")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """What every method asks: which prompts, where to, and whether to go on."""
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument(
        "--exclude",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.jsonl",
        help="leave out prompts that share 13 words in a row with one of these; repeatable",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the draft")
    parser.add_argument("--resume", action="store_true", help="go on with the run in DIR")


def training_prompts(file: Path, exclude: Sequence[Path], seed: int) -> tuple[list[Messages], int]:
    """The prompts of `file` in random order, and how many were left out for being in `exclude`.

    Raises ValueError if nothing is left.
    """
    asked = {
        ngram
        for other in exclude
        for prompt in load_prompts(other)
        for ngram in _ngrams(prompt.messages)
    }
    prompts = [prompt.messages for prompt in load_prompts(file)]
    kept = [prompt for prompt in prompts if asked.isdisjoint(_ngrams(prompt))]
    if not kept:
        raise ValueError(f"prompts: every prompt of {file} is in {[str(path) for path in exclude]}")
    random.Random(seed).shuffle(kept)
    return kept, len(prompts) - len(kept)


def _ngrams(prompt: Messages) -> Iterator[tuple[str, ...]]:
    """Runs of `NGRAM` words, whatever stands between them; a shorter text is one by itself."""
    words = _WORDS.findall(" ".join(message["content"] for message in prompt).lower())
    if len(words) < NGRAM:
        yield tuple(words)
    for start in range(len(words) - NGRAM + 1):
        yield tuple(words[start : start + NGRAM])
