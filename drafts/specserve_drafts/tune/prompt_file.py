"""Training prompts: those of a file, without prompts that overlap with an evaluation's."""

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from specserve.cli.prompts import Messages
from specserve_evals.prompts import load_prompts

# Words in a row shared with an evaluation prompt that exclude a prompt (Brown et al. 2020, app. C).
NGRAM: Final = 13
HELD_OUT: Final = 32  # prompts that are never trained on, at most; a quarter of fewer prompts
_WORDS: Final = re.compile(r"\w+")


class Prompts(NamedTuple):
    learned: list[Messages]  # the training prompts, in random order
    held_out: list[Messages]
    num_excluded: int


def training_prompts(file: Path, exclude: Sequence[Path], seed: int) -> Prompts:
    """The different prompts of `file` that share no n-gram with a prompt of `exclude`.

    Raises ValueError unless one is left for each of both.
    """
    asked = {
        ngram
        for other in exclude
        for prompt in load_prompts(other)
        for ngram in _ngrams(prompt.messages)
    }
    prompts = {msgspec.json.encode(each.messages): each.messages for each in load_prompts(file)}
    kept = [prompt for prompt in prompts.values() if asked.isdisjoint(_ngrams(prompt))]
    if len(kept) < 2:
        raise ValueError(
            f"prompts: {file} has {len(kept)} different ones that are in no --exclude; give more"
        )
    random.Random(seed).shuffle(kept)
    held_out = max(1, min(HELD_OUT, len(kept) // 4))
    return Prompts(kept[:-held_out], kept[-held_out:], len(prompts) - len(kept))


def _ngrams(prompt: Messages) -> Iterator[tuple[str, ...]]:
    """All runs of `NGRAM` words, case and punctuation ignored; a shorter text gives all its words
    as one."""
    words = _WORDS.findall(" ".join(message["content"] for message in prompt).lower())
    if len(words) < NGRAM:
        yield tuple(words)
    for start in range(len(words) - NGRAM + 1):
        yield tuple(words[start : start + NGRAM])
