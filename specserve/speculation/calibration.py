"""Turns the probabilities that drafters claim into observed acceptance rates.

A drafter estimates for each node how likely it is accepted once its parent is. These estimates
differ in quality between drafters, so they are replaced by rates observed so far before trees are
merged. All nodes of a proposal are counted whose parent was emitted, verified or not: the emitted
tokens tell what would have become of them. Knows no costs.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from specserve.tree import DraftTree, merge_trees
from specserve_kernels.dispatch import native_host

if TYPE_CHECKING:
    from specserve_kernels.host import _native

# Drafter id, depth, the estimate in steps of 1/20, and whether the request is sampled.
_Key = tuple[int, int, int, bool]

_MAX_DEPTH: Final = 4  # nodes at this depth or deeper share their counts
_PRIOR_RATIO: Final = 0.5  # acceptances per estimated acceptance, before anything was observed
_PRIOR_WEIGHT: Final = 4.0  # observations that a prior counts for
_MEMORY: Final = 256.0  # observations after which counts are halved, so that old ones fade


class _Counts:
    """Observations that fade: both numbers are halved whenever `visits` reaches _MEMORY."""

    __slots__ = ("hits", "visits")

    def __init__(self) -> None:
        self.hits = self.visits = 0.0

    def add(self, hit: bool, weight: float) -> None:
        if self.visits >= _MEMORY:
            self.hits, self.visits = self.hits / 2, self.visits / 2
        self.hits, self.visits = self.hits + hit, self.visits + weight

    def rate(self, prior: float) -> float:
        return (self.hits + _PRIOR_WEIGHT * prior) / (self.visits + _PRIOR_WEIGHT)


class Calibration:
    """Observed acceptance rates of all drafters.

    Every rate has the drafter's own estimate as its prior, times how often its nodes were accepted
    in relation to its estimates. Greedy and sampled requests are counted apart. Uses the compiled
    class where there is one; see `specserve_kernels.host`.
    """

    def __init__(self) -> None:
        host = native_host()
        self._native: _native.Calibration | None = None
        if host is not None:
            self._native = host.Calibration(
                max_depth=_MAX_DEPTH,
                prior_ratio=_PRIOR_RATIO,
                prior_weight=_PRIOR_WEIGHT,
                memory=_MEMORY,
            )
        self._counts: defaultdict[_Key, _Counts] = defaultdict(_Counts)
        # By drafter id: accepted nodes, in relation to the sum of their estimates.
        self._ratios: defaultdict[int, _Counts] = defaultdict(_Counts)

    def merged(self, sampled: bool, trees: Sequence[DraftTree], max_nodes: int) -> DraftTree:
        """Merge trees with the same root into one with calibrated path probabilities.

        A node that several drafters proposed has the largest of their probabilities. The tree has
        the `max_nodes` nodes of the largest path probability. `sampled`: temperature > 0.
        """
        if self._native is not None:
            return DraftTree(*self._native.merged(sampled, trees, max_nodes))
        return merge_trees(trees, [self._rates(sampled, tree) for tree in trees], max_nodes)

    def record_outcome(
        self, sampled: bool, trees: Sequence[DraftTree], emitted: Sequence[int]
    ) -> None:
        """Count the nodes of the proposed `trees` whose parents were emitted."""
        if self._native is not None:
            self._native.record_outcome(sampled, trees, emitted)
            return
        for tree in trees:
            keys = _keys(sampled, tree)
            for node, hit in _reached(tree.tokens.tolist(), tree.parents.tolist(), emitted):
                key, estimate = keys[node - 1]
                self._counts[key].add(hit, 1.0)
                self._ratios[key[0]].add(hit, estimate)

    def _rates(self, sampled: bool, tree: DraftTree) -> list[float]:
        """The conditional acceptance probability of each node; 1 for the root."""
        rates = [1.0]
        for key, estimate in _keys(sampled, tree):
            prior = min(self._ratios[key[0]].rate(_PRIOR_RATIO) * estimate, 1.0)
            rates.append(self._counts[key].rate(prior))
        return rates


def _keys(sampled: bool, tree: DraftTree) -> list[tuple[_Key, float]]:
    """Per node but the root: the key of its counts, and the drafter's estimate."""
    nodes = zip(tree.drafter_ids.tolist(), tree.depths, tree.acceptance_probs, strict=True)
    next(nodes)
    return [
        ((drafter_id, min(depth, _MAX_DEPTH), round(20 * estimate), sampled), estimate)
        for drafter_id, depth, estimate in nodes
    ]


def _reached(
    tokens: Sequence[int], parents: Sequence[int], emitted: Sequence[int]
) -> Iterator[tuple[int, bool]]:
    """The children of the root and of every emitted node, and whether each was emitted itself."""
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
