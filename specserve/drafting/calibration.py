"""How often a drafted node comes true once its parent has: learned from what is emitted.

Owns the counts, by source, depth and the drafter's own score, over all requests and for each.
What a drafter says is a claim; every drafter's is weighed by its record before trees are merged.
Whole proposals count, verified or not: the text tells what would have come of them. Knows no costs.
"""

from collections import defaultdict
from collections.abc import Sequence as Seq
from typing import Final

from specserve.sequence import Sequence
from specserve.tree import DraftTree

# Source, depth, twentieths of the node's share, temperature above 0.
_Key = tuple[int, int, int, bool]

_MAX_DEPTH: Final = 4  # deeper nodes count together
_GUESS_SHARE: Final = 0.5  # of the drafter's own score, before anything was seen
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
    """The same for every drafter; a request's own record outweighs that of all once it is long."""

    def __init__(self) -> None:
        self._all: defaultdict[_Key, _Counts] = defaultdict(_Counts)
        # Of all nodes of a source: how often they came true for each time they claimed to.
        self._claims: defaultdict[int, _Counts] = defaultdict(_Counts)
        self._own: defaultdict[str, defaultdict[_Key, _Counts]] = defaultdict(
            lambda: defaultdict(_Counts)
        )

    def shares(self, seq: Sequence, tree: DraftTree) -> list[float]:
        """Per node, how likely it comes true once its parent has; 1 for the root."""
        own, shares = self._own[seq.id], [1.0]
        for key, share in _keys(seq, tree):
            guess = self._claims[key[0]].rate(_GUESS_SHARE) * share
            shares.append(own[key].rate(self._all[key].rate(min(guess, 1.0))))
        return shares

    def settle(self, seq: Sequence, tree: DraftTree, emitted: Seq[int]) -> None:
        """Count the nodes of a proposal whose parents were emitted."""
        if len(tree) == 1:
            return
        own, node, keys = self._own[seq.id], 0, _keys(seq, tree)
        for token in emitted:
            children = tree.children[node]
            for drafted, child in children.items():
                key, share = keys[child - 1]
                self._all[key].add(drafted == token, 1.0, _MEMORY)
                self._claims[key[0]].add(drafted == token, share, _MEMORY)
                own[key].add(drafted == token, 1.0, _REQUEST_MEMORY)
            if token not in children:
                return
            node = children[token]

    def forget(self, seq_id: str) -> None:
        self._own.pop(seq_id, None)


def _keys(seq: Sequence, tree: DraftTree) -> list[tuple[_Key, float]]:
    """Of every node but the root: its key, and what the drafter gives it if its parent is right."""
    noisy = not seq.request.sampling.greedy
    nodes = zip(tree.source.tolist(), tree.depths.tolist(), tree.shares, strict=True)
    next(nodes)
    return [
        ((source, min(depth, _MAX_DEPTH), round(20 * share), noisy), share)
        for source, depth, share in nodes
    ]
