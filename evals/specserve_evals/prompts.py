"""Reads prompt files with categories, and selects prompts evenly from the categories.

The format is that of `specserve generate --prompts`; a row may also have "question_id" and
"category", as in Spec-Bench (Xia et al. 2024). This module does not know the model. The same file
and the same limits always give the same prompts in the same order.
"""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from specserve.cli.prompts import Messages, as_chat, read_rows

UNLABELLED = "all"  # category of a row without one


class Prompt(Struct, frozen=True):
    id: str  # the row's question_id, or its index among the rows of the file
    category: str
    messages: Messages


class Selection(Struct, frozen=True):
    """The chosen prompts, and in `passed_over` those skipped because they did not fit."""

    prompts: tuple[Prompt, ...]
    passed_over: tuple[Prompt, ...] = ()

    def describe(self) -> str:
        """One line: the numbers of prompts and categories, and the prompts that did not fit."""
        categories = list(dict.fromkeys(prompt.category for prompt in self.prompts))
        line = f"{len(self.prompts)} prompts from {len(categories)} categories"
        if self.passed_over:
            ids = ", ".join(prompt.id for prompt in self.passed_over)
            line += f"; too long, replaced by the next of their category: {ids}"
        return line


class _Labels(Struct, frozen=True):
    question_id: int | str | None = None
    category: str = UNLABELLED


def load_prompts(file: Path) -> list[Prompt]:
    """Every prompt of a JSONL file. Raises ValueError naming the file and the line."""
    prompts = []
    for index, row in enumerate(read_rows(file)):
        labels = _read_labels(row.line, row.place)
        name = index if labels.question_id is None else labels.question_id
        prompts.append(Prompt(str(name), labels.category, as_chat(row.prompt)))
    return prompts


def select(
    prompts: Sequence[Prompt],
    *,
    limit: int | None = None,
    per_category: int | None = None,
    fits: Callable[[Prompt], bool] = lambda prompt: True,
) -> Selection:
    """Choose one prompt of each category in turn, in the order of the file, up to the limits.

    `limit` bounds the total, `per_category` the prompts of each category. A prompt that does not
    fit is replaced by the next of its category. Raises ValueError if no prompt is chosen.
    """
    queues: dict[str, deque[Prompt]] = {}
    for prompt in prompts:
        queues.setdefault(prompt.category, deque()).append(prompt)
    chosen: list[Prompt] = []
    passed_over: list[Prompt] = []
    most = len(prompts) if limit is None else limit
    for _ in range(len(prompts) if per_category is None else per_category):
        for queue in queues.values():
            if len(chosen) == most:
                break
            while queue and not fits(queue[0]):
                passed_over.append(queue.popleft())
            if queue:
                chosen.append(queue.popleft())
    if not chosen:
        raise ValueError(f"prompts: none of {len(prompts)} fits the limits; allow longer ones")
    return Selection(tuple(chosen), tuple(passed_over))


def _read_labels(line: str, place: str) -> _Labels:
    try:
        row = msgspec.json.decode(line, type=_Labels | str)
    except msgspec.ValidationError as error:
        raise ValueError(f"prompts: {place}: {error}") from error
    return _Labels() if isinstance(row, str) else row
