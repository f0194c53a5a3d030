"""The training data of heads: the target's own answers, as token ids in shards on disk.

Shards are written atomically, so after a killed run each is complete or missing. An answer depends
on its prompt's number and the seed alone, so several processes can share the work, and a later run
uses the shards of an earlier one.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import torch
from torch import Tensor

from specserve.cli.prompts import Messages
from specserve.llm import LLM
from specserve.speculation.drafter import Feedback
from specserve.types import RequestError
from specserve_drafts.atomic_write import write_json
from specserve_drafts.tune.answering import answer_all
from specserve_drafts.tune.head_settings import HeadSettings
from specserve_drafts.tune.teacher import Teacher
from specserve_drafts.tune.texts import Text, read_texts, write_texts

SHARD_PROMPTS: Final = 64  # prompts of a shard
_COUNTED_PROMPTS: Final = 4000  # prompts whose tokens `prompt_counts` counts
_SETTINGS: Final = "settings.json"
_DEPENDS_ON: Final = (
    *("max_tokens", "max_len", "temperature", "seed"),
    *("prompts", "exclude", "target", "quantization", "dtype"),
)


class Answers:
    """The shards of one run. Prompt n is answered with seed + n; after the last prompt the first
    one follows again.

    `teacher` receives the hidden states that the engine computes while it answers, on platforms
    where they are bitwise equal to the teacher's. Raises ValueError if `folder` has answers that
    were made with other settings.
    """

    def __init__(
        self,
        llm: LLM,
        prompts: Sequence[Messages],
        settings: HeadSettings,
        folder: Path,
        teacher: Teacher | None,
        lasting: Mapping[str, Any],  # see `settings.lasting_settings`
        tick: Callable[[int], None],  # see `answer_all`
    ) -> None:
        self._llm, self._prompts, self._settings = llm, prompts, settings
        self._folder, self._teacher, self._tick = folder, teacher, tick
        # Tokens and hidden states, by sequence id.
        self._rows: dict[str, tuple[Sequence[int], list[Tensor]]] = {}
        if teacher is not None and llm.engine.platform.exact:
            llm.engine.observe(teacher.layers, self._observe)
        folder.mkdir(parents=True, exist_ok=True)
        made_with = {name: lasting[name] for name in _DEPENDS_ON if name in lasting}
        _check_settings(folder / _SETTINGS, made_with)

    def has(self, index: int) -> bool:
        """Whether the shard is on disk, answered by this run or by another."""
        return self._path(index).exists()

    def shard(self, index: int, until: float = math.inf) -> list[Text]:
        """The shard's texts from disk; answers them first if missing, until a point in time."""
        if not self.has(index):
            list(self.answer([index], until))
        return read_texts(self._path(index))

    def answer(self, shards: Sequence[int], until: float = math.inf) -> Iterator[int]:
        """Answer the prompts of several shards, and write each when it is complete, or what there
        is of it at `until` (`time.monotonic()`). Yields the indices of those written."""
        numbers = (
            number
            for index in shards
            for number in range(index * SHARD_PROMPTS, (index + 1) * SHARD_PROMPTS)
        )
        answers = self._answer(self._settings, self._prompts, numbers, until)
        with closing(answers):
            for index in shards:
                own = islice(answers, SHARD_PROMPTS)
                write_texts(self._path(index), [text for text in own if text is not None])
                yield index

    def _path(self, index: int) -> Path:
        return self._folder / f"shard-{index:05}.safetensors"

    def held_out(self, prompts: Sequence[Messages], until: float = math.inf) -> list[Text]:
        """Greedy answers to the held-out prompts, from disk if they are there."""
        path = self._folder / "held_out.safetensors"
        if not path.exists():
            greedy = msgspec.structs.replace(self._settings, temperature=(0.0,))
            answers = self._answer(greedy, prompts, range(len(prompts)), until)
            write_texts(path, [text for text in answers if text is not None])
        return read_texts(path)

    def prompt_counts(self, vocab_size: int) -> Tensor:
        """Token frequencies in the first _COUNTED_PROMPTS prompts: [vocab_size] float32, sum 1."""
        counts = torch.zeros(vocab_size)
        for prompt in self._prompts[:_COUNTED_PROMPTS]:
            try:
                ids = torch.tensor(self._llm.encode(prompt))
            except RequestError:
                continue
            counts.index_add_(0, ids, torch.ones(len(ids)))
        return counts / counts.sum().clamp_min(1)

    def _answer(
        self,
        settings: HeadSettings,
        prompts: Sequence[Messages],
        numbers: Iterable[int],
        until: float,
    ) -> Generator[Text | None, None, None]:
        """The answers to prompts of these numbers; None where there is no room for an answer."""
        jobs = ((prompts[n % len(prompts)], settings.sampling(n)) for n in numbers)
        with closing(answer_all(self._llm, jobs, self._tick, until)) as answers:
            for answer in answers:
                ids, rows = self._rows.pop(answer.id, ((), []))
                if rows and self._teacher is not None:
                    known = torch.cat(rows)[: settings.max_len - 1]
                    self._teacher.keep(np.array(ids[: len(known)], np.int32), known)
                num_prompt = len(answer.prompt_ids)
                tokens = np.array([*answer.prompt_ids, *answer.token_ids], np.int32)
                text = Text(tokens[: settings.max_len], num_prompt)
                served = answer.error is None and num_prompt >= 2 and text.num_answer >= 1
                yield text if served else None

    def _observe(self, feedback: Feedback) -> None:
        """Collect the hidden states of committed tokens, in order. A sequence that was preempted is
        computed again from its first token, so its earlier states are dropped."""
        for seq in feedback.seqs:
            committed = feedback.committed(seq)
            states = feedback.hidden_states(feedback.aux_layers, committed.rows)
            assert states is not None
            if committed.start == 0:
                self._rows[seq.id] = (seq.tokens, [])
            self._rows[seq.id][1].append(states)


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings if `path` does not exist, else compare them. Raises ValueError."""
    if not path.exists():
        write_json(path, settings)
    before = msgspec.json.decode(path.read_bytes())
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"{name}: {value!r}, and the answers in {path.parent} were made with "
                f"{before.get(name)!r}; leave it, or give another directory"
            )
