"""Counting what verification did to every drafted token it looked at.

A pass looks at drafted tokens along one path, until one is rejected, the tree is exhausted or the
request ends. Tokens behind that point were neither accepted nor rejected, so they do not count:
a stop, EOS or max_tokens cut is no fault of the draft.
"""

from dataclasses import dataclass, field

from specserve.drafting.base import Feedback
from specserve.step import Verdict
from specserve.tree import TARGET_SOURCE, DraftTree


@dataclass(slots=True)
class Acceptance:
    """Looked-at drafted tokens by depth: entry d counts tokens d + 1 below the root."""

    accepted: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)

    @property
    def num_accepted(self) -> int:
        return sum(self.accepted)

    @property
    def num_looked_at(self) -> int:
        return sum(self.accepted) + sum(self.rejected)

    @property
    def share(self) -> float | None:
        """Accepted / looked at; None if the draft proposed nothing."""
        return self.num_accepted / self.num_looked_at if self.num_looked_at else None

    def record(self, tree: DraftTree, verdict: Verdict) -> None:
        for depth in range(verdict.num_accepted):
            _count(self.accepted, depth)
        # The last token came from the target although the draft had proposed one there.
        drawn_by_target = bool(verdict.sources) and verdict.sources[-1] == TARGET_SOURCE
        if drawn_by_target and tree.children(verdict.path[-1]):
            _count(self.rejected, verdict.num_accepted)


class Audit:
    """Counts what verification did; its `observe` watches an engine."""

    def __init__(self) -> None:
        self._acceptance = Acceptance()

    def take(self) -> Acceptance:
        """The counts since the last call."""
        counts, self._acceptance = self._acceptance, Acceptance()
        return counts

    def observe(self, feedback: Feedback) -> None:
        for seq_id, verdict in feedback.verdicts.items():
            self._acceptance.record(feedback.trees[seq_id], verdict)


def _count(by_depth: list[int], depth: int) -> None:
    by_depth.extend([0] * (depth + 1 - len(by_depth)))
    by_depth[depth] += 1
