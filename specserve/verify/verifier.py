"""Verifies all trees of a forward pass together, one `Walk` per tree.

If the model returned its top-k tokens, walks of plain greedy requests use them and need no sampler.
For the other walks, each round draws one token per unfinished walk in a single batched sampler
call. A row that cannot be sampled fails its own request only.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor

from specserve.batch import ModelOutput
from specserve.sampling import Row, Sampler, SamplingState, token_logprobs
from specserve.sequence import SequenceState
from specserve.step import Entry, VerifyResult
from specserve.text import Tokenizer
from specserve.tree import DraftTree
from specserve.verify.stopping import StopRule
from specserve.verify.walk import Walk

_NOT_NUMBERS: Final = "the model produced logits that are not numbers"


class Verifier:
    """Owns the sampling state and the stop rule of every running request."""

    def __init__(
        self, sampler: Sampler, eos_ids: Sequence[int], vocab_size: int, tokenizer: Tokenizer | None
    ) -> None:
        self._sampler = sampler
        self._eos_ids = tuple(eos_ids)
        self._vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._states: dict[str, SamplingState] = {}
        self._stops: dict[str, StopRule] = {}

    def state(self, seq: SequenceState) -> SamplingState:
        """The sampling state of `seq`, updated with every token emitted so far."""
        if seq.id not in self._states:
            self._states[seq.id] = SamplingState(
                seq.request, self._eos_ids, self._vocab_size, self._sampler.device
            )
            self._stops[seq.id] = StopRule(seq.request, self._eos_ids, self._tokenizer)
        self._states[seq.id].advance(seq.tokens)
        return self._states[seq.id]

    def state_of(self, seq_id: str) -> SamplingState:
        """The same, for a sequence whose `state` was asked for in this step."""
        return self._states[seq_id]

    def forget(self, seq_id: str) -> None:
        self._states.pop(seq_id, None)
        self._stops.pop(seq_id, None)

    def __call__(
        self, entries: Sequence[Entry], trees: Sequence[DraftTree], out: ModelOutput
    ) -> list[VerifyResult]:
        """Return one verification result per entry.

        The logits rows of `out` are the nodes of `trees`, tree after tree.
        """
        states = [self.state(entry.seq) for entry in entries]
        walks = [Walk(tree) for tree in trees]
        first_rows = list(accumulate((len(tree) for tree in trees), initial=0))
        if out.topk is not None:
            best = out.topk.cpu().numpy()[:, 0].tolist()
            for walk, state, entry, first in zip(walks, states, entries, first_rows, strict=False):
                while state.plain_greedy and walk.node is not None:
                    at = first + walk.node
                    drawn = best[at] if best[at] >= 0 else _NOT_NUMBERS
                    self._emit(walk, entry.seq, drawn, out.logits, at)
        while live := [index for index, walk in enumerate(walks) if walk.node is not None]:
            rows, picked = [], []
            for index in live:
                walk = walks[index]
                assert walk.node is not None
                path = tuple(walk.emitted)
                rows.append(Row(states[index], entries[index].seq.num_tokens + len(path), path))
                picked.append(first_rows[index] + walk.node)
            at_nodes = out.logits[picked]
            tokens = self._draw(at_nodes, rows)
            for row, (index, token) in enumerate(zip(live, tokens, strict=True)):
                self._emit(walks[index], entries[index].seq, token, at_nodes, row)
        return [walk.result() for walk in walks]

    def _draw(self, logits: Tensor, rows: Sequence[Row]) -> list[int | str]:
        """Sample one token per row. Returns the token, or an error message for a failed row."""
        try:
            finite = torch.isfinite(logits.amax(dim=-1)).tolist()
            tokens = self._sampler.draw(self._sampler.process(logits, rows), rows).tolist()
        except Exception as error:
            if len(rows) == 1:
                return [f"sampling failed: {type(error).__name__}: {error}"]
            return [self._draw(logits[i : i + 1], rows[i : i + 1])[0] for i in range(len(rows))]
        return [token if ok else _NOT_NUMBERS for token, ok in zip(tokens, finite, strict=True)]

    def _emit(
        self, walk: Walk, seq: SequenceState, drawn: int | str, logits: Tensor, row: int
    ) -> None:
        """Advance `walk` by the token `drawn` from `logits[row]`, or fail it with the message."""
        if isinstance(drawn, str):
            walk.fail(drawn)
            return
        num_top = seq.request.sampling.logprobs
        if num_top is not None:
            walk.logprobs.append(token_logprobs(logits[row], drawn, num_top))
        walk.emit(drawn, self._stops[seq.id].feed(drawn))
