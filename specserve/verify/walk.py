"""The verification rule for one tree: replay the sampler along it.

At the current node the target's sampler draws a token; it is emitted; if a child carries it the
walk moves there, else it ends. What comes out is what plain decoding would have produced, because
it is the same draw at the same position with the same history. Any tree is lossless.
"""

from dataclasses import dataclass, field

from specserve.step import Ending, Verdict
from specserve.tree import TARGET_SOURCE, DraftTree
from specserve.types import TokenLogprobs


@dataclass(slots=True)
class Walk:
    """Where the replay of one tree stands. It is over when `node` is None."""

    tree: DraftTree
    node: int | None = 0
    path: list[int] = field(default_factory=lambda: [0])  # nodes whose KV stays, root included
    emitted: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    ending: Ending | None = None
    error: str | None = None

    @property
    def num_accepted(self) -> int:
        """Emitted tokens that the draft had proposed."""
        return sum(source != TARGET_SOURCE for source in self.sources)

    def emit(self, token: int, ending: Ending | None) -> None:
        """The target drew `token` at the current node; `ending` cuts the walk right there."""
        assert self.node is not None
        child = self.tree.child_of.get((self.node, token))
        self.emitted.append(token)
        self.sources.append(TARGET_SOURCE if child is None else int(self.tree.source[child]))
        self.ending = ending
        if child is None or ending is not None:
            self.node = None
        else:
            self.node = child
            self.path.append(child)

    def fail(self, error: str) -> None:
        """End the walk: this request cannot go on, the others can."""
        self.error = error
        self.node = None

    def verdict(self) -> Verdict:
        return Verdict(
            path=tuple(self.path),
            emitted=tuple(self.emitted),
            sources=tuple(self.sources),
            num_accepted=self.num_accepted,
            logprobs=tuple(self.logprobs),
            ending=self.ending,
            error=self.error,
        )
