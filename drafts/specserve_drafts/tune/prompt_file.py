"""What a draft is trained on: prompts of a file, without those that an evaluation asks."""

import argparse
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from specserve.cli.prompts import Messages
from specserve.config import TargetConfig
from specserve_evals.prompts import load_prompts
from specserve_evals.provenance import DataFile

NGRAM: Final = 13  # words in a row that make a prompt one of an evaluation's (Brown et al. 2020, C)
HELD_OUT: Final = 32  # prompts that are never learned from
DATA_SETTINGS: Final = ("prompts", "exclude", "target", "quantization", "dtype")
_WORDS: Final = re.compile(r"\w+")


class Prompts(NamedTuple):
    learned: list[Messages]  # in random order
    held_out: list[Messages]
    num_excluded: int


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


def data_settings(args: argparse.Namespace, target: Mapping[str, Any]) -> dict[str, Any]:
    """`DATA_SETTINGS`: of which prompts and which target, as JSON has it."""
    default = TargetConfig()
    return {
        "prompts": DataFile.of(args.prompts).label,
        "exclude": [DataFile.of(path).label for path in args.exclude],
        "target": Path(target.get("target", default.target)).name,
        "quantization": target.get("quantization", default.quantization),
        "dtype": target.get("dtype", default.dtype),
    }


def training_prompts(file: Path, exclude: Sequence[Path], seed: int) -> Prompts:
    """The prompts of `file`, each once, without those that share an n-gram with one of `exclude`.

    Raises ValueError if too few are left.
    """
    asked = {
        ngram
        for other in exclude
        for prompt in load_prompts(other)
        for ngram in _ngrams(prompt.messages)
    }
    prompts = {msgspec.json.encode(each.messages): each.messages for each in load_prompts(file)}
    kept = [prompt for prompt in prompts.values() if asked.isdisjoint(_ngrams(prompt))]
    if len(kept) <= HELD_OUT:
        raise ValueError(
            f"prompts: {file} has {len(kept)} different ones that are in no --exclude; "
            f"give more than {HELD_OUT}"
        )
    random.Random(seed).shuffle(kept)
    return Prompts(kept[:-HELD_OUT], kept[-HELD_OUT:], len(prompts) - len(kept))


def _ngrams(prompt: Messages) -> Iterator[tuple[str, ...]]:
    """Runs of `NGRAM` words, whatever stands between them; a shorter text is one by itself."""
    words = _WORDS.findall(" ".join(message["content"] for message in prompt).lower())
    if len(words) < NGRAM:
        yield tuple(words)
    for start in range(len(words) - NGRAM + 1):
        yield tuple(words[start : start + NGRAM])
