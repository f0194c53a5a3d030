"""Verifies all trees of a forward pass together, one `Walk` per tree.

Walks of plain greedy requests use the model's top tokens, if it returned some. For the others, each
round draws one token per unfinished walk, in one sampler call per tenant. A row that cannot be
sampled fails its own request only.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor

from specserve.batch import ModelOutput
from specserve.sampling import Row, Sampler, SamplingState, token_logprobs
from specserve.sequence import SequenceState
from specserve.step import Entry, FinishInfo, VerifyResult
from specserve.text import Tokenizer
from specserve.tree import DraftTree
from specserve.verify.stopping import StopRule
from specserve.verify.walk import Walk

NOT_NUMBERS: Final = "the model produced logits that are not numbers"


@dataclass(eq=False)
class Verifier:
    """Owns the sampling state and the stop rule of every running request."""

    sampler: Sampler
    eos_ids: tuple[int, ...]
    vocab_size: int
    tokenizer: Tokenizer | None
    # Of the latest call, by tenant: the seconds of its draws, and its number of sequences.
    draws: dict[str, tuple[float, int]] = field(default_factory=dict)
    _states: dict[str, SamplingState] = field(default_factory=dict)
    _stops: dict[str, StopRule] = field(default_factory=dict)

    def state(self, seq: SequenceState) -> SamplingState:
        """The sampling state of `seq`, updated with every token emitted so far."""
        if seq.id not in self._states:
            self._states[seq.id] = SamplingState(
                seq.request, self.eos_ids, self.vocab_size, self.sampler.device
            )
            self._stops[seq.id] = StopRule(seq.request, self.eos_ids, self.tokenizer)
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
        """One result per entry. The logits rows of `out` are the nodes of `trees`, in order."""
        states = [self.state(entry.seq) for entry in entries]
        walks = [Walk(tree) for tree in trees]
        by_tenant: dict[str, list[int]] = {}
        for at, entry in enumerate(entries):
            by_tenant.setdefault(entry.seq.request.tenant, []).append(at)
            if entry.seq.request.sampling.max_tokens == 0:
                walks[at].end(FinishInfo("length"))
        first_rows = list(accumulate((len(tree) for tree in trees), initial=0))
        best = None if out.topk is None else out.topk.cpu().numpy()[:, 0].tolist()
        self.draws = {}
        for tenant, own in by_tenant.items():
            started = time.perf_counter()
            for at in own:
                walk = walks[at]
                while best is not None and states[at].plain_greedy and walk.node is not None:
                    row = first_rows[at] + walk.node
                    drawn = best[row] if best[row] >= 0 else NOT_NUMBERS
                    self._emit(walk, entries[at].seq, drawn, out.logits, row)
            while live := [at for at in own if walks[at].node is not None]:
                self._draw_round(
                    [(entries[at].seq, states[at], walks[at], first_rows[at]) for at in live], out
                )
            self.draws[tenant] = (time.perf_counter() - started, len(own))
        return [walk.result() for walk in walks]

    def _draw_round(
        self, live: Sequence[tuple[SequenceState, SamplingState, Walk, int]], out: ModelOutput
    ) -> None:
        """Draw one token for each of these walks. The last number is the walk's first row."""
        rows, picked = [], []
        for seq, state, walk, first in live:
            assert walk.node is not None
            rows.append(Row(state, seq.num_tokens + len(walk.emitted), tuple(walk.emitted)))
            picked.append(first + walk.node)
        at_nodes = out.logits[picked]
        tokens = self._draw(at_nodes, rows)
        for row, ((seq, _, walk, _), token) in enumerate(zip(live, tokens, strict=True)):
            self._emit(walk, seq, token, at_nodes, row)

    def _draw(self, logits: Tensor, rows: Sequence[Row]) -> list[int | str]:
        """Sample one token per row. Returns the token, or an error message for a failed row."""
        try:
            finite = torch.isfinite(logits.amax(dim=-1)).tolist()
            tokens = self.sampler.draw(self.sampler.process(logits, rows), rows).tolist()
        except Exception as error:
            if len(rows) == 1:
                return [f"sampling failed: {type(error).__name__}: {error}"]
            return [self._draw(logits[i : i + 1], rows[i : i + 1])[0] for i in range(len(rows))]
        return [token if ok else NOT_NUMBERS for token, ok in zip(tokens, finite, strict=True)]

    def _emit(
        self, walk: Walk, seq: SequenceState, drawn: int | str, logits: Tensor, row: int
    ) -> None:
        """Advance `walk` by the token `drawn` from `logits[row]`, or fail it with the message."""
        if isinstance(drawn, str):
            walk.fail(drawn)
            return
        num_top = seq.request.sampling.logprobs
        if num_top is not None:
            walk.logprobs += token_logprobs(logits[row : row + 1], [drawn], num_top)
        walk.emit(drawn, self._stops[seq.id].feed(drawn))
