"""Observed acceptance rates of drafted nodes, and the merging of draft trees by these rates."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from specserve_kernels.host.interface import TreeFields, TreeView
from specserve_kernels.host.reference.tree import merge_trees

# Drafter id, depth, the estimate in steps of 1/20, and whether the request is sampled.
_Key = tuple[int, int, int, bool]


class _Counts:
    """Observations that fade: both numbers are halved whenever `visits` reaches `memory`."""

    __slots__ = ("hits", "visits")

    def __init__(self) -> None:
        self.hits = self.visits = 0.0

    def add(self, hit: bool, weight: float, memory: float) -> None:
        if self.visits >= memory:
            self.hits, self.visits = self.hits / 2, self.visits / 2
        self.hits, self.visits = self.hits + hit, self.visits + weight

    def rate(self, prior: float, prior_weight: float) -> float:
        return (self.hits + prior_weight * prior) / (self.visits + prior_weight)


class Calibration:
    """Observed acceptance rates of all drafters.

    Nodes at `max_depth` or deeper share their counts. prior_ratio: acceptances per estimated
    acceptance, before anything was observed. prior_weight: the observations that a prior counts
    for. memory: the observations after which counts are halved.
    """

    def __init__(
        self, *, max_depth: int, prior_ratio: float, prior_weight: float, memory: float
    ) -> None:
        self._max_depth, self._memory = max_depth, memory
        self._prior_ratio, self._prior_weight = prior_ratio, prior_weight
        self._counts: defaultdict[_Key, _Counts] = defaultdict(_Counts)
        # By drafter id: accepted nodes, in relation to the sum of their estimates.
        self._ratios: defaultdict[int, _Counts] = defaultdict(_Counts)

    def merged(self, sampled: bool, trees: Sequence[TreeView], max_nodes: int, /) -> TreeFields:
        """Merge trees with the same root into one with calibrated path probabilities.

        A node that several drafters proposed has the largest of their probabilities. The tree has
        the `max_nodes` nodes of the largest path probability. `sampled`: temperature > 0.
        """
        return merge_trees(trees, [self._rates(sampled, tree) for tree in trees], max_nodes)

    def record_outcome(
        self, sampled: bool, trees: Sequence[TreeView], emitted: Sequence[int], /
    ) -> None:
        """Count the nodes of the proposed `trees` whose parents were emitted."""
        for tree in trees:
            keys = self._keys(sampled, tree)
            for node, hit in _reached(tree.tokens.tolist(), tree.parents.tolist(), emitted):
                key, estimate = keys[node - 1]
                self._counts[key].add(hit, 1.0, self._memory)
                self._ratios[key[0]].add(hit, estimate, self._memory)

    def _rates(self, sampled: bool, tree: TreeView) -> list[float]:
        """The conditional acceptance probability of each node; 1 for the root."""
        rates = [1.0]
        for key, estimate in self._keys(sampled, tree):
            ratio = self._ratios[key[0]].rate(self._prior_ratio, self._prior_weight)
            rates.append(self._counts[key].rate(min(ratio * estimate, 1.0), self._prior_weight))
        return rates

    def _keys(self, sampled: bool, tree: TreeView) -> list[tuple[_Key, float]]:
        """Per node but the root: the key of its counts, and the drafter's estimate."""
        nodes = zip(tree.drafter_ids.tolist(), tree.depths, tree.acceptance_probs, strict=True)
        next(nodes)
        return [
            ((drafter_id, min(depth, self._max_depth), round(20 * estimate), sampled), estimate)
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
