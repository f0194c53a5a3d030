"""Computes the logprobs of prompt tokens from the hidden states of prompt chunks.

The logits of a whole chunk would take num_rows * vocab_size floats, so they are computed for a few
rows at a time. A row does not depend on the others, so neither do the logprobs.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from specserve.batch import ModelOutput
from specserve.models.model import Model
from specserve.sampling import token_logprobs
from specserve.step import Entry, Scores
from specserve.types import PromptLogprobs, TokenLogprobs
from specserve.verify.verifier import NOT_NUMBERS

_NUM_ROWS: Final = 64  # of logits that are in memory at the same time


@dataclass(eq=False)
class PromptScorer:
    model: Model
    # Of the latest call, by tenant: the seconds that it took, and the number of prompt rows.
    seconds: dict[str, tuple[float, int]] = field(default_factory=dict)

    def __call__(self, entries: Sequence[Entry], out: ModelOutput) -> Scores:
        """The logprobs of the next prompt tokens of every sequence that wants some.

        `entries` are those of the forward pass that returned `out`; their KV is not committed yet.
        """
        scores: Scores = {}
        self.seconds, first = {}, 0
        for entry in entries:
            seq = entry.seq
            if not entry.num_prefill and not seq.is_scored:
                continue  # most entries
            started = time.perf_counter()
            if seq.is_scored:
                scored = entry.scored_rows
                scores[seq.id] = self._score(entry, out, slice(first, first + len(scored)))
                first += len(scored)
            if entry.num_prefill:
                seconds, rows = self.seconds.get(seq.request.tenant, (0.0, 0))
                seconds += time.perf_counter() - started
                self.seconds[seq.request.tenant] = seconds, rows + entry.num_prefill
        return scores

    def _score(self, entry: Entry, out: ModelOutput, rows: slice) -> PromptLogprobs | str:
        """The entries of one sequence. `rows` are its rows of `out.scored_states`."""
        seq, scored = entry.seq, entry.scored_rows
        first: PromptLogprobs = () if seq.num_scored else (None,)
        if not scored:
            return first
        assert out.scored_states is not None
        start = seq.num_committed + 1  # a row gives the logits of the next token
        tokens = seq.tokens[start + scored.start : start + scored.stop]
        num_top = seq.request.sampling.prompt_logprobs or 0
        try:
            return first + self._logprobs(out.scored_states[rows], tokens, num_top)
        except Exception as error:
            return f"logprobs of the prompt failed: {type(error).__name__}: {error}"

    def _logprobs(
        self, states: Tensor, tokens: Sequence[int], num_top: int
    ) -> tuple[TokenLogprobs, ...]:
        """Logprobs of one token per row of `states`, [num_rows, hidden_size]."""
        entries: list[TokenLogprobs] = []
        for start in range(0, len(tokens), _NUM_ROWS):
            part = slice(start, start + _NUM_ROWS)
            logits = self.model.logits(states[part])
            if not torch.isfinite(logits.amax(dim=-1)).all():
                raise ValueError(NOT_NUMBERS)
            entries += token_logprobs(logits, tokens[part], num_top)
        return tuple(entries)
