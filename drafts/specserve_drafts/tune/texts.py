"""Prompts with the target's answers as token ids: their files on disk, and training batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from specserve_drafts.atomic_write import atomic_write

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Text:
    tokens: Ids  # [n], the prompt first
    num_prompt: int

    @property
    def num_answer(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_draft_inputs(self) -> int:
        """Draft inputs that a chain can read: all but those of the first token and the last one."""
        return len(self.tokens) - 2


def write_texts(path: Path, texts: Sequence[Text]) -> None:
    """Write texts as one safetensors file, atomically. Raises ValueError."""
    lengths = [(text.num_prompt, len(text.tokens)) for text in texts]
    arrays = {
        "tokens": np.concatenate([np.empty(0, np.int32), *(text.tokens for text in texts)]),
        "lengths": np.array(lengths, np.int32).reshape(-1, 2),
    }
    with atomic_write(path) as part:
        save_file(arrays, part)


def read_texts(path: Path) -> list[Text]:
    """Read a file of `write_texts`."""
    arrays = load_file(path)
    ends = np.cumsum(arrays["lengths"][:, 1])
    pieces = np.split(arrays["tokens"], ends[:-1]) if len(ends) else []
    prompts = arrays["lengths"][:, 0].tolist()
    return [Text(piece, num) for piece, num in zip(pieces, prompts, strict=True)]


def whole_texts(texts: Sequence[Text]) -> list[Text]:
    """The texts with prompts counted as answers, except the common beginning of all texts, which
    comes from the chat template."""
    shortest = min(len(text.tokens) for text in texts)
    rows = np.stack([text.tokens[:shortest] for text in texts])
    different = (rows != rows[0]).any(0)
    start = int(different.argmax()) if different.any() else 0
    return [Text(text.tokens, min(max(start, 2), text.num_prompt)) for text in texts]


def batches(texts: Sequence[Text], step_tokens: int, seed: Sequence[int]) -> list[list[Text]]:
    """Random batches of about `step_tokens` answer tokens each.

    The texts of a batch are sorted by length, so that groups of neighbours need little padding.
    """
    order = np.random.default_rng(seed).permutation(len(texts))
    num_tokens = sum(text.num_answer for text in texts)
    num_batches = max(1, round(num_tokens / step_tokens))
    parts: list[list[Text]] = [[]]
    done = 0
    for index in order:
        if done >= len(parts) * num_tokens / num_batches and len(parts) < num_batches:
            parts.append([])
        parts[-1].append(texts[index])
        done += texts[index].num_answer
    return [sorted(part, key=lambda text: len(text.tokens)) for part in parts if part]
