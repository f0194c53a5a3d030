"""Prompt lookup: what followed the last few tokens when they last occurred.

Looks in the request's own prompt and output and in the `prediction` it brought along; the longest
match wins. (Saxena 2023, "Prompt Lookup Decoding".) Host only, microseconds per proposal.
"""

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import ClassVar

import torch

from specserve.cache.storage import KVSpec
from specserve.drafting.base import DraftContext, DraftError, DraftOptions, Feedback
from specserve.sequence import Sequence
from specserve.tree import PREDICTION, DraftTree, chain_tree


class NgramOptions(DraftOptions, frozen=True, forbid_unknown_fields=True):
    min_match: int = 1  # tokens that must match before anything is proposed
    max_match: int = 4


class TextIndex:
    """n-gram -> the position after its latest occurrence that something follows."""

    def __init__(self, min_match: int, max_match: int) -> None:
        self._sizes = range(max_match, min_match - 1, -1)
        self._next: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def extend(self, tokens: Seq[int]) -> None:
        """Index the n-grams that end before the last token; `tokens` only ever grows."""
        for end in range(max(self._num_indexed, 1), len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._next[tuple(tokens[end - size : end])] = end
        self._num_indexed = len(tokens)

    def find(self, context: Seq[int]) -> tuple[int, int] | None:
        """(match length, position of the continuation) for the longest suffix of `context`."""
        for size in self._sizes:
            if size <= len(context):
                position = self._next.get(tuple(context[len(context) - size :]))
                if position is not None:
                    return size, position
        return None


class NgramDrafter:
    Options: ClassVar[type[DraftOptions]] = NgramOptions
    needs_taps: tuple[int, ...] = ()
    needs_topk = 0

    def __init__(self, options: DraftOptions, path: Path | None, target: Path) -> None:
        assert isinstance(options, NgramOptions)
        if not 1 <= options.min_match <= options.max_match <= 16:
            raise DraftError(
                f"draft.options.ngram: min_match {options.min_match}, max_match "
                f"{options.max_match}; expected 1 <= min_match <= max_match <= 16"
            )
        self._options = options
        self._own: dict[str, TextIndex] = {}  # by sequence id
        self._predicted: dict[str, TextIndex] = {}

    def kv_spec(self, dtype: torch.dtype) -> KVSpec | None:
        return None

    def bind(self, context: DraftContext) -> None:
        self._source = context.source

    def propose(self, seqs: Seq[Sequence], budgets: Seq[int]) -> list[DraftTree]:
        return [self._propose(seq, budget) for seq, budget in zip(seqs, budgets, strict=True)]

    def observe(self, feedback: Feedback) -> None:
        pass  # tokens are indexed when they are first needed

    def forget(self, seq_id: str) -> None:
        self._own.pop(seq_id, None)
        self._predicted.pop(seq_id, None)

    def _propose(self, seq: Sequence, budget: int) -> DraftTree:
        size, continuation, source = self._match(seq)
        drafted: list[int] = []
        while continuation and len(drafted) < budget - 1:
            # A match that runs into the end of the text goes on with what it has just drafted.
            beyond = len(drafted) - len(continuation)
            drafted.append(continuation[len(drafted)] if beyond < 0 else drafted[beyond])
        per_token = 1.0 - 0.5 ** (size + 1)
        scores = [per_token ** (depth + 1) for depth in range(len(drafted))]
        return chain_tree(seq.tokens[-1], drafted, scores, source)

    def _match(self, seq: Sequence) -> tuple[int, Seq[int], int]:
        """Length of the longest match, the text after it, its source; a prediction wins a tie."""
        own = self._own.setdefault(seq.id, self._index())
        own.extend(seq.tokens)
        candidates: list[tuple[int, Seq[int], int, int]] = []
        if found := own.find(seq.tokens):
            candidates.append((found[0], seq.tokens, found[1], self._source))
        prediction = seq.request.speculation.prediction
        if prediction:
            predicted = self._predicted.get(seq.id)
            if predicted is None:
                predicted = self._predicted[seq.id] = self._index()
                predicted.extend(prediction)
            if seq.num_output == 0:  # nothing emitted yet: expect the prediction from its start
                return self._options.max_match, prediction, PREDICTION
            if found := predicted.find(seq.tokens[seq.num_prompt :]):
                candidates.insert(0, (found[0], prediction, found[1], PREDICTION))
        if not candidates:
            return 0, (), self._source
        size, text, position, source = max(candidates, key=lambda candidate: candidate[0])
        return size, text[position : position + 64], source

    def _index(self) -> TextIndex:
        return TextIndex(self._options.min_match, self._options.max_match)
