"""How drafted nodes fare, by who proposed them and by depth. No tensors."""

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from specserve.step import Verdict
from specserve.tree import MAX_NODES, DraftTree

_NONE = np.empty(0, np.uint8)


class SourceCounts:
    """Totals since the start. Row s counts source s; the last row counts `PREDICTION`."""

    def __init__(self, num_drafters: int) -> None:
        self.num_drafters = num_drafters
        num_rows = num_drafters + 2
        self.proposed = np.zeros(num_rows, np.int64)  # before trees are merged
        self.verified = np.zeros((num_rows, MAX_NODES), np.int64)  # [source, depth]
        self.accepted = np.zeros((num_rows, MAX_NODES), np.int64)  # [source, depth]

    def propose(self, trees: Collection[DraftTree]) -> None:
        """Trees as one drafter gave them."""
        np.add.at(self.proposed, self._rows(trees), 1)

    def settle(self, trees: Collection[DraftTree], verdicts: Collection[Verdict]) -> None:
        """Merged trees, and what verification made of them."""
        depths = np.concatenate([_NONE, *(tree.depths[1:] for tree in trees)])
        np.add.at(self.verified, (self._rows(trees), depths), 1)
        last = self.num_drafters + 1
        for verdict in verdicts:
            for depth, source in enumerate(verdict.sources[: verdict.num_accepted], start=1):
                self.accepted[min(source, last), depth] += 1

    def _rows(self, trees: Collection[DraftTree]) -> npt.NDArray[np.uint8]:
        """The row of every node but the roots."""
        sources = np.concatenate([_NONE, *(tree.source[1:] for tree in trees)])
        rows: npt.NDArray[np.uint8] = np.minimum(sources, self.num_drafters + 1)
        return rows
