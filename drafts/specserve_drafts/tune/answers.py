"""What a head learns from: the target's own answers, as token ids in shards on disk.

Shards are written once and whole, so a run that was killed finds each of them complete or not at
all. An answer depends on its prompt's number and the seed alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from specserve.cli.prompts import Messages
from specserve.drafting.base import Feedback
from specserve.llm import LLM
from specserve.types import RequestError, SamplingParams
from specserve_drafts.tune.head_settings import HeadSettings
from specserve_drafts.tune.teacher import Teacher
from specserve_drafts.tune.texts import Text, read_texts, write_texts

SHARD_PROMPTS: Final = 64  # answered between two saves: less than a minute
HELD_OUT: Final = 32  # prompts that are never learned from
_COUNTED_PROMPTS: Final = 4000


class Answers:
    """The shards of one run. Prompt n is answered with seed + n; prompts come round again.

    `teacher` gets the rows that the engine has anyway while it answers, where they are the same
    to the bit.
    """

    def __init__(
        self,
        llm: LLM,
        prompts: Sequence[Messages],
        settings: HeadSettings,
        folder: Path,
        teacher: Teacher,
    ) -> None:
        self._llm, self._prompts, self._settings = llm, prompts, settings
        self._folder, self._teacher = folder, teacher
        self._rows: dict[str, tuple[Sequence[int], list[Tensor]]] = {}  # tokens and rows, by id
        if llm.engine.platform.exact:
            llm.engine.watch(teacher.layers, self._observe)
        folder.mkdir(parents=True, exist_ok=True)

    def shard(self, index: int) -> list[Text]:
        """From disk, or answered now."""
        path = self._folder / f"shard-{index:05}.safetensors"
        if not path.exists():
            first = index * SHARD_PROMPTS
            write_texts(path, self._answer(self._prompts, range(first, first + SHARD_PROMPTS)))
        return read_texts(path)

    def held_out(self, prompts: Sequence[Messages]) -> list[Text]:
        """Greedy answers to prompts of their own."""
        path = self._folder / "held_out.safetensors"
        if not path.exists():
            write_texts(path, self._answer(prompts, range(len(prompts)), temperature=0.0))
        return read_texts(path)

    def prompt_counts(self, vocab_size: int) -> Tensor:
        """[vocab_size] float32: how often a token stands in the first prompts, in all 1."""
        counts = torch.zeros(vocab_size)
        for prompt in self._prompts[:_COUNTED_PROMPTS]:
            try:
                ids = torch.tensor(self._llm.encode(prompt))
            except RequestError:
                continue
            counts.index_add_(0, ids, torch.ones(len(ids)))
        return counts / counts.sum().clamp_min(1)

    def _answer(
        self, prompts: Sequence[Messages], numbers: range, temperature: float | None = None
    ) -> list[Text]:
        settings = self._settings
        mix = settings.temperature if temperature is None else (temperature,)
        sampling = [
            SamplingParams(
                temperature=mix[number % len(mix)],
                max_tokens=settings.max_tokens,
                seed=settings.seed + number,
            )
            for number in numbers
        ]
        answers = self._llm.generate([prompts[n % len(prompts)] for n in numbers], sampling)
        for ids, rows in self._rows.values():
            tokens = np.array(ids[: settings.max_len - 1], np.int32)
            known = torch.cat(rows)[: len(tokens)]
            self._teacher.keep(tokens[: len(known)], known)
        self._rows = {}
        texts = []
        for answer in answers:
            num_prompt = len(answer.prompt_ids)
            tokens = np.array([*answer.prompt_ids, *answer.token_ids], np.int32)
            text = Text(tokens[: settings.max_len], num_prompt)
            if answer.error is None and num_prompt >= 2 and text.num_answer >= 1:
                texts.append(text)
        return texts

    def _observe(self, feedback: Feedback) -> None:
        """Chains and roots in order; who had to give way in between begins again."""
        taps, first = feedback.output.taps, 0
        assert taps is not None
        for entry in feedback.entries:
            seq, end = entry.seq, first + entry.num_chain + min(entry.num_nodes, 1)
            if seq.num_committed == end - first:
                self._rows[seq.id] = (seq.tokens, [])
            self._rows[seq.id][1].append(taps[first:end])
            first = end
