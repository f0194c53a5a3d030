"""How often a drafted node comes true once its parent has: learned from what is emitted.

Owns the counts, by drafter id, depth and the drafter's own estimate, over all and each request.
What a drafter says is a claim; every drafter's is weighed by its record before trees are merged.
Of a merged node it counts as well who proposed it and who did not: that another drafter looked at
the same place and named other tokens speaks against it, and the surest is often too sure.
Whole proposals count, verified or not: the text tells what would have come of them. Knows no costs.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from specserve.tree import DraftTree, MergedTree, merge_trees
from specserve_kernels.dispatch import native_host

if TYPE_CHECKING:
    from specserve_kernels.host import _native

# Drafter id, depth, twentieths of the node's acceptance probability, temperature above 0.
_Key = tuple[int, int, int, bool]
# Who proposed a merged node, who proposed anything beside it, twentieths, temperature above 0.
_Agreement = tuple[int, int, int, bool]

_MAX_DEPTH: Final = 4  # deeper nodes count together
_GUESS_SHARE: Final = 0.5  # of the drafter's own estimate, before anything was seen
_GUESS_WEIGHT: Final = 4.0  # in observations
_MEMORY: Final = 256.0  # observations of a key after which old ones weigh half
_REQUEST_MEMORY: Final = 32.0


class _Counts:
    """Observations of one key that fade."""

    __slots__ = ("hits", "visits")

    def __init__(self) -> None:
        self.hits = self.visits = 0.0

    def add(self, hit: bool, weight: float, memory: float) -> None:
        if self.visits >= memory:
            self.hits, self.visits = self.hits / 2, self.visits / 2
        self.hits, self.visits = self.hits + hit, self.visits + weight

    def rate(self, guess: float) -> float:
        return (self.hits + _GUESS_WEIGHT * guess) / (self.visits + _GUESS_WEIGHT)


class Calibration:
    """The same for every drafter; a request's own record outweighs that of all once it is long.

    `sampled`: temperature > 0. Compiled where it is built, see `specserve_kernels.host`.
    """

    def __init__(self) -> None:
        host = native_host()
        self._native: _native.Calibration | None = None
        if host is not None:
            self._native = host.Calibration(
                max_depth=_MAX_DEPTH,
                guess_share=_GUESS_SHARE,
                guess_weight=_GUESS_WEIGHT,
                memory=_MEMORY,
                request_memory=_REQUEST_MEMORY,
            )
        self._all: defaultdict[_Key, _Counts] = defaultdict(_Counts)
        # Of all nodes of a drafter: how often they came true for each time they claimed to.
        self._claims: defaultdict[int, _Counts] = defaultdict(_Counts)
        self._agreement: defaultdict[_Agreement, _Counts] = defaultdict(_Counts)
        self._own: defaultdict[str, defaultdict[_Key, _Counts]] = defaultdict(
            lambda: defaultdict(_Counts)
        )

    def merged(
        self, seq_id: str, sampled: bool, trees: Sequence[DraftTree], max_nodes: int
    ) -> DraftTree:
        """One tree of proposals with the same root; its path probabilities are calibrated."""
        if self._native is not None:
            return DraftTree(*self._native.merged(seq_id, sampled, trees, max_nodes))
        merged = self._merge(seq_id, sampled, trees)
        keys = _agreements(merged, sampled)
        agreed = (
            self._agreement[key].rate(prob)
            for key, prob in zip(keys, merged.acceptance_probs[1:], strict=True)
        )
        return merged.tree([1.0, *agreed], max_nodes)

    def settle(
        self, seq_id: str, sampled: bool, trees: Sequence[DraftTree], emitted: Sequence[int]
    ) -> None:
        """Count the nodes of proposals whose parents were emitted."""
        if self._native is not None:
            self._native.settle(seq_id, sampled, trees, emitted)
            return
        merged = self._merge(seq_id, sampled, trees)
        keys = _agreements(merged, sampled)
        for node, hit in _followed(merged.tokens, merged.parents, emitted):
            self._agreement[keys[node - 1]].add(hit, 1.0, _MEMORY)
        for tree in trees:
            self._settle(seq_id, sampled, tree, emitted)

    def forget(self, seq_id: str) -> None:
        self._own.pop(seq_id, None)
        if self._native is not None:
            self._native.forget(seq_id)

    def _acceptance_probs(self, seq_id: str, sampled: bool, tree: DraftTree) -> list[float]:
        """Per node, how likely it comes true once its parent has; 1 for the root."""
        own, probs = self._own[seq_id], [1.0]
        for key, prob in _keys(sampled, tree):
            guess = self._claims[key[0]].rate(_GUESS_SHARE) * prob
            probs.append(own[key].rate(self._all[key].rate(min(guess, 1.0))))
        return probs

    def _merge(self, seq_id: str, sampled: bool, trees: Sequence[DraftTree]) -> MergedTree:
        return merge_trees(trees, [self._acceptance_probs(seq_id, sampled, tree) for tree in trees])

    def _settle(self, seq_id: str, sampled: bool, tree: DraftTree, emitted: Sequence[int]) -> None:
        own, keys = self._own[seq_id], _keys(sampled, tree)
        for node, hit in _followed(tree.tokens.tolist(), tree.parents.tolist(), emitted):
            key, prob = keys[node - 1]
            self._all[key].add(hit, 1.0, _MEMORY)
            self._claims[key[0]].add(hit, prob, _MEMORY)
            own[key].add(hit, 1.0, _REQUEST_MEMORY)


def _followed(
    tokens: Sequence[int], parents: Sequence[int], emitted: Sequence[int]
) -> Iterator[tuple[int, bool]]:
    """The children of the root and of every node that was emitted, and whether they were."""
    at: int | None = 0
    for token in emitted:
        following = None
        for node, parent in enumerate(parents):
            if parent == at:
                hit = tokens[node] == token
                yield node, hit
                following = node if hit else following
        if following is None:
            return
        at = following


def _agreements(merged: MergedTree, sampled: bool) -> list[_Agreement]:
    """Of every node but the root."""
    nodes = zip(
        merged.proposers[1:], merged.sibling_drafters[1:], merged.acceptance_probs[1:], strict=True
    )
    return [(who, beside, round(20 * prob), sampled) for who, beside, prob in nodes]


def _keys(sampled: bool, tree: DraftTree) -> list[tuple[_Key, float]]:
    """Of every node but the root: its key, and what the drafter gives it if its parent is right."""
    nodes = zip(tree.drafter_ids.tolist(), tree.depths, tree.acceptance_probs, strict=True)
    next(nodes)
    return [
        ((drafter_id, min(depth, _MAX_DEPTH), round(20 * prob), sampled), prob)
        for drafter_id, depth, prob in nodes
    ]
