"""Counts of proposed, verified and accepted nodes, by drafter and depth. No tensors."""

from collections.abc import Collection

from specserve.step import VerifyResult
from specserve.tree import MAX_NODES, DraftTree


class DrafterCounts:
    """Totals since the start. Row i counts drafter id i; the last row counts `PREDICTION_ID`."""

    def __init__(self, num_drafters: int) -> None:
        self.num_drafters = num_drafters
        num_rows = num_drafters + 2
        # Lists, because for small trees adding to them takes a tenth of the time of numpy.
        self.proposed = [0] * num_rows  # before trees are merged
        self.verified = [[0] * MAX_NODES for _ in range(num_rows)]  # [drafter id][depth]
        self.accepted = [[0] * MAX_NODES for _ in range(num_rows)]  # [drafter id][depth]

    def propose(self, trees: Collection[DraftTree]) -> None:
        """Count the nodes of trees that one drafter proposed."""
        last = self.num_drafters + 1
        for tree in trees:
            for drafter_id in tree.drafter_ids.tolist()[1:]:
                self.proposed[min(drafter_id, last)] += 1

    def record_outcome(
        self, trees: Collection[DraftTree], results: Collection[VerifyResult]
    ) -> None:
        """Count the nodes of verified merged trees, and those that were accepted."""
        last = self.num_drafters + 1
        for tree in trees:
            nodes = zip(tree.drafter_ids.tolist(), tree.depths, strict=True)
            next(nodes)
            for drafter_id, depth in nodes:
                self.verified[min(drafter_id, last)][depth] += 1
        for result in results:
            for depth, drafter_id in enumerate(result.drafter_ids[: result.num_accepted], start=1):
                self.accepted[min(drafter_id, last)][depth] += 1
