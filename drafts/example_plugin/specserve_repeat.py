"""The `repeat` drafter: it proposes that the last tokens are repeated."""

from pathlib import Path
from typing import Annotated, ClassVar

from msgspec import Meta

from specserve.sequence import SequenceView
from specserve.speculation.drafter import DraftOptions, NoModelDrafter
from specserve.tree import DraftTree, chain_tree


class RepeatOptions(DraftOptions, frozen=True, forbid_unknown_fields=True):
    period: Annotated[int, Meta(ge=1, le=64)] = 4  # tokens that are repeated


class RepeatDrafter(NoModelDrafter):
    Options: ClassVar[type[DraftOptions]] = RepeatOptions

    def __init__(self, options: DraftOptions, path: Path | None, target: Path) -> None:
        assert isinstance(options, RepeatOptions)
        self._period = options.period

    def propose_tree(self, seq: SequenceView, budget: int) -> DraftTree:
        tokens = (seq.tokens[-self._period :] * budget)[: budget - 1]
        path_probs = [0.5 ** (depth + 1) for depth in range(len(tokens))]
        return chain_tree(seq.tokens[-1], tokens, path_probs)
