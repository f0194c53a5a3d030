"""Counts of proposed, verified and accepted nodes, by drafter and depth. No tensors."""

from collections.abc import Collection

from specserve.step import VerifyResult
from specserve.tree import MAX_NODES, PREDICTION_ID, DraftTree


class DrafterCounts:
    """Totals since the start, by drafter id."""

    def __init__(self, num_drafters: int) -> None:
        ids = [*range(num_drafters + 1), PREDICTION_ID]
        # Lists, because for small trees adding to them takes a tenth of the time of numpy.
        self.proposed = dict.fromkeys(ids, 0)  # before trees are merged
        self.verified = {drafter_id: [0] * MAX_NODES for drafter_id in ids}  # by depth
        self.accepted = {drafter_id: [0] * MAX_NODES for drafter_id in ids}  # by depth

    def propose(self, trees: Collection[DraftTree]) -> None:
        """Count the nodes of trees that one drafter proposed."""
        for tree in trees:
            for drafter_id in tree.drafter_ids.tolist()[1:]:
                self.proposed[drafter_id] += 1

    def record_outcome(
        self, trees: Collection[DraftTree], results: Collection[VerifyResult]
    ) -> None:
        """Count the nodes of verified merged trees, and those that were accepted."""
        for tree in trees:
            nodes = zip(tree.drafter_ids.tolist(), tree.depths, strict=True)
            next(nodes)
            for drafter_id, depth in nodes:
                self.verified[drafter_id][depth] += 1
        for result in results:
            for depth, drafter_id in enumerate(result.drafter_ids[: result.num_accepted], start=1):
                self.accepted[drafter_id][depth] += 1
