"""The `none` drafter: proposes the root alone, which is plain decoding, the baseline."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch

from specserve.cache.storage import KVSpec
from specserve.sequence import SequenceView
from specserve.speculation.drafter import DraftContext, DraftOptions, Feedback
from specserve.tree import DraftTree, root_tree


class NoDrafter:
    Options: ClassVar[type[DraftOptions]] = DraftOptions
    aux_layers: tuple[int, ...] = ()
    needs_topk = 0

    def __init__(self, options: DraftOptions, path: Path | None, target: Path) -> None:
        pass

    def kv_spec(self, dtype: torch.dtype) -> KVSpec | None:
        return None

    def bind(self, context: DraftContext) -> None:
        pass

    def propose(self, seqs: Sequence[SequenceView], budgets: Sequence[int]) -> list[DraftTree]:
        return [root_tree(seq.tokens[-1]) for seq in seqs]

    def observe(self, feedback: Feedback) -> None:
        pass

    def forget(self, seq_id: str) -> None:
        pass
