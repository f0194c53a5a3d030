"""The `ngram` drafter: prompt lookup (Saxena 2023, "Prompt Lookup Decoding").

It proposes the tokens that followed the latest earlier occurrence of the last few tokens, searching
the request's own prompt and output; the longest match wins. All work is on the host and takes
microseconds per proposal.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch

from specserve.cache.storage import KVSpec
from specserve.sequence import SequenceView
from specserve.speculation.drafter import DraftContext, DraftError, DraftOptions, Feedback
from specserve.speculation.lookup import TextIndex, copied_text
from specserve.tree import DraftTree, root_tree


class NgramOptions(DraftOptions, frozen=True, forbid_unknown_fields=True):
    min_match: int = 1  # tokens that must match before anything is proposed
    max_match: int = 4  # the longest match looked up, in tokens


class NgramDrafter:
    Options: ClassVar[type[DraftOptions]] = NgramOptions
    aux_layers: tuple[int, ...] = ()
    needs_topk = 0

    def __init__(self, options: DraftOptions, path: Path | None, target: Path) -> None:
        assert isinstance(options, NgramOptions)
        if not 1 <= options.min_match <= options.max_match <= 16:
            raise DraftError(
                f"draft.options.ngram: min_match {options.min_match}, max_match "
                f"{options.max_match}; expected 1 <= min_match <= max_match <= 16"
            )
        self._options = options
        self._indexes: dict[str, TextIndex] = {}  # by sequence id

    def kv_spec(self, dtype: torch.dtype) -> KVSpec | None:
        return None

    def bind(self, context: DraftContext) -> None:
        self._drafter_id = context.drafter_id

    def propose(self, seqs: Sequence[SequenceView], budgets: Sequence[int]) -> list[DraftTree]:
        return [self._propose(seq, budget) for seq, budget in zip(seqs, budgets, strict=True)]

    def observe(self, feedback: Feedback) -> None:
        pass  # tokens are indexed when they are first needed

    def forget(self, seq_id: str) -> None:
        self._indexes.pop(seq_id, None)

    def _propose(self, seq: SequenceView, budget: int) -> DraftTree:
        index = self._indexes.get(seq.id)
        if index is None:
            index = TextIndex(self._options.min_match, self._options.max_match)
            self._indexes[seq.id] = index
        index.extend(seq.tokens)
        found = index.find(seq.tokens[-self._options.max_match :])
        if found is None:
            return root_tree(seq.tokens[-1])
        match, position = found
        return copied_text(seq.tokens[-1], seq.tokens, position, match, budget, self._drafter_id)
