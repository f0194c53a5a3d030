"""The verification rule for one tree: replay the target's sampler along it.

At the current node the sampler draws a token, which is emitted. If a child has this token, the walk
continues there; otherwise it ends. Each draw has the position and history that it has in plain
decoding, so the emitted tokens are the same, whatever the tree proposes.
"""

from dataclasses import dataclass, field

from specserve.step import FinishInfo, VerifyResult
from specserve.tree import TARGET_ID, DraftTree
from specserve.types import TokenLogprobs


@dataclass(slots=True)
class Walk:
    """The state of the walk through one tree. The walk is finished when `node` is None."""

    tree: DraftTree
    node: int | None = 0
    path: list[int] = field(default_factory=lambda: [0])  # nodes whose KV is kept, root included
    emitted: list[int] = field(default_factory=list)
    drafter_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishInfo | None = None
    error: str | None = None

    def emit(self, token: int, finish: FinishInfo | None) -> None:
        """Emit `token`, drawn at the current node; the walk ends there if `finish` is given."""
        assert self.node is not None
        child = self.tree.child_of.get((self.node, token))
        self.emitted.append(token)
        self.drafter_ids.append(TARGET_ID if child is None else int(self.tree.drafter_ids[child]))
        self.finish = finish
        if child is None or finish is not None:
            self.node = None
        else:
            self.node = child
            self.path.append(child)

    def end(self, finish: FinishInfo) -> None:
        """End the walk, and the request, without a draw."""
        self.finish = finish
        self.node = None

    def fail(self, error: str) -> None:
        """End the walk with an error. Other requests are not affected."""
        self.error = error
        self.node = None

    def result(self) -> VerifyResult:
        return VerifyResult(
            path=tuple(self.path),
            emitted=tuple(self.emitted),
            drafter_ids=tuple(self.drafter_ids),
            num_accepted=len(self.drafter_ids) - self.drafter_ids.count(TARGET_ID),
            logprobs=tuple(self.logprobs),
            finish=self.finish,
            error=self.error,
        )
