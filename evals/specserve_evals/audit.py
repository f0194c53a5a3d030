"""Counts the drafted tokens that verification accepts and rejects, by depth.

Verification follows one path of the tree until the target draws a token that is not among the
children of the current node (one rejection, however many children there are), the tree ends, or the
request ends. Tokens beyond that point count neither as accepted nor as rejected, so a stop string,
EOS or max_tokens does not lower the acceptance of the draft.
"""

from dataclasses import dataclass, field

from specserve.speculation.drafter import Feedback
from specserve.step import VerifyResult
from specserve.tree import TARGET_ID, DraftTree


@dataclass(slots=True)
class Acceptance:
    """Counts by depth: entry d counts the tokens at depth d + 1 (the root has depth 0)."""

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
        """`num_accepted` / `num_looked_at`; None if the draft proposed nothing."""
        return self.num_accepted / self.num_looked_at if self.num_looked_at else None

    def record(self, tree: DraftTree, result: VerifyResult) -> None:
        """Add the verification result of one tree."""
        for depth in range(result.num_accepted):
            _count(self.accepted, depth)
        # A rejection: the target drew the last token itself although the tree had nodes there.
        drawn_by_target = bool(result.drafter_ids) and result.drafter_ids[-1] == TARGET_ID
        if drawn_by_target and tree.children(result.path[-1]):
            _count(self.rejected, result.num_accepted)


class Audit:
    """Counts over all requests of an engine; `observe` is the callback for `Engine.observe`."""

    def __init__(self) -> None:
        self._acceptance = Acceptance()

    def take(self) -> Acceptance:
        """Return the counts since the last call, and start again from zero."""
        counts, self._acceptance = self._acceptance, Acceptance()
        return counts

    def observe(self, feedback: Feedback) -> None:
        for seq_id, result in feedback.results.items():
            self._acceptance.record(feedback.trees[seq_id], result)


def _count(by_depth: list[int], depth: int) -> None:
    by_depth.extend([0] * (depth + 1 - len(by_depth)))
    by_depth[depth] += 1
