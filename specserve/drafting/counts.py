"""How drafted nodes fare, by who proposed them and by depth. No tensors."""

from collections.abc import Collection

from specserve.step import VerifyResult
from specserve.tree import MAX_NODES, DraftTree


class SourceCounts:
    """Totals since the start. Row s counts source s; the last row counts `PREDICTION`."""

    def __init__(self, num_drafters: int) -> None:
        self.num_drafters = num_drafters
        num_rows = num_drafters + 2
        # Lists: adding to them one by one takes a tenth of what numpy takes for a small tree.
        self.proposed = [0] * num_rows  # before trees are merged
        self.verified = [[0] * MAX_NODES for _ in range(num_rows)]  # [source][depth]
        self.accepted = [[0] * MAX_NODES for _ in range(num_rows)]  # [source][depth]

    def propose(self, trees: Collection[DraftTree]) -> None:
        """Trees as one drafter gave them."""
        last = self.num_drafters + 1
        for tree in trees:
            for source in tree.source.tolist()[1:]:
                self.proposed[min(source, last)] += 1

    def settle(self, trees: Collection[DraftTree], results: Collection[VerifyResult]) -> None:
        """Merged trees, and what verification made of them."""
        last = self.num_drafters + 1
        for tree in trees:
            nodes = zip(tree.source.tolist(), tree.depths, strict=True)
            next(nodes)
            for source, depth in nodes:
                self.verified[min(source, last)][depth] += 1
        for result in results:
            for depth, source in enumerate(result.sources[: result.num_accepted], start=1):
                self.accepted[min(source, last)][depth] += 1
