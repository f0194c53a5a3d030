"""Growing a draft tree best-first with a model: look at a few nodes, take in the successors it
proposes, go on with the best of them.

Knows the nodes and their scores; which model looks at them, and how, is the drafter's matter.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Final

from torch import Tensor

from specserve.sampling import Row, Sampler, SamplingState
from specserve.sequence import SequenceView
from specserve.tree import DraftTree, build_tree

# What a look is worth: tokens that the successors of a node that comes true add to a pass, beside
# those that emit one now.
_GAIN: Final = 0.4
_TOKENS: Final = 1.8
_NEXT: Final = 0.6  # how likely the best successor of a node is, if the node comes true
_MEMORY: Final = 64.0  # drafts that means are of


@dataclass(frozen=True, slots=True)
class Node:
    token: int
    parent: int  # index among the evaluated nodes, -1 for the root
    score: float
    depth: int
    word: int  # ancestors among the evaluated nodes


class Growth:
    """One tree while it grows: evaluated nodes, in cache order, and the candidates they brought."""

    def __init__(self, seq: SequenceView, state: SamplingState, budget: int) -> None:
        self.seq, self.state, self.budget = seq, state, budget
        self.nodes = [Node(seq.tokens[-1], -1, 1.0, 0, 1)]
        self.pool: list[Node] = []  # not evaluated; `word` is the parent's
        self.num_done = 0  # nodes whose KV and candidates are there

    def pick(self, beam: int, max_depth: int, min_score: float = 0.0) -> bool:
        """Move the best candidates to the nodes of the next pass; False if there are none.

        One node of the budget is left for a leaf: evaluating all would be evaluating in vain.
        Compiled: kernels/specserve_kernels/cpu/csrc/draft_head.cpp.
        """
        self.num_done = len(self.nodes)
        room = min(beam, self.budget - 1 - len(self.nodes))
        worth = [n for n in self.pool if n.depth < max_depth and n.score >= min_score]
        for node in sorted(worth, key=lambda node: -node.score)[: max(room, 0)]:
            self.pool.remove(node)
            self.nodes.append(replace(node, word=node.word | 1 << len(self.nodes)))
        return len(self.nodes) > self.num_done

    @property
    def fresh(self) -> list[Node]:
        """The nodes of the next pass."""
        return self.nodes[self.num_done :]

    def sampler_rows(self) -> list[Row]:
        return [
            Row(self.state, self.seq.num_tokens + node.depth, self._path(node))
            for node in self.fresh
        ]

    def add_candidates(self, index: int, tokens: list[int], probabilities: list[float]) -> None:
        """Successors of evaluated node `num_done + index`."""
        parent = self.num_done + index
        node = self.nodes[parent]
        for token, probability in zip(tokens, probabilities, strict=True):
            if probability > 0.0:
                score = node.score * probability
                self.pool.append(Node(token, parent, score, node.depth + 1, node.word))

    def tree(self, source: int) -> DraftTree:
        leaves = sorted(self.pool, key=lambda node: -node.score)[: self.budget - len(self.nodes)]
        nodes = self.nodes + leaves
        return build_tree(
            [node.token for node in nodes],
            [node.parent for node in nodes],
            [node.score for node in nodes],
            source,
        )

    def _path(self, node: Node) -> tuple[int, ...]:
        tokens: list[int] = []
        while node.parent >= 0:
            tokens.append(node.token)
            node = self.nodes[node.parent]
        return tuple(reversed(tokens))


class LookPrice:
    """How likely a node's path has to be for a pass of the draft over it to be worth its time.

    `least` at any rate; more where `step_seconds` tells what a step of the target takes, and a
    node more: it has to be worth the pass, and its successors have to be worth their rows.
    """

    def __init__(
        self, least: float, step_seconds: Callable[[], tuple[float, float] | None]
    ) -> None:
        self._least, self._step_seconds = least, step_seconds
        self._num_drafts = 0
        self._passes = self._seconds = 0.0  # of a draft, their means
        self._variance = self._covariance = 0.0  # of passes, and of both

    def took(self, seconds: float, num_passes: int) -> None:
        """A draft."""
        self._num_drafts += 1
        share = 1.0 / min(self._num_drafts, _MEMORY)
        more_passes, more_seconds = num_passes - self._passes, seconds - self._seconds
        self._passes += share * more_passes
        self._seconds += share * more_seconds
        self._variance += share * ((1 - share) * more_passes**2 - self._variance)
        self._covariance += share * ((1 - share) * more_passes * more_seconds - self._covariance)

    @property
    def min_score(self) -> float:
        seconds = self._step_seconds()
        if seconds is None:
            return self._least
        step, row = seconds
        dearer = max(self._another() / _GAIN, row / _NEXT)
        return max(self._least, round(_TOKENS * dearer / step, 2))

    def _another(self) -> float:
        """Seconds of one pass more: the first finds no weights in the cache, the others do."""
        mean = self._seconds / max(self._passes, 1.0)
        if self._variance < 0.01:  # drafts are all alike
            return mean
        return min(max(self._covariance / self._variance, 0.2 * mean), mean)


def rank(
    growing: Seq[Growth], logits: Tensor, sampler: Sampler, branching: int
) -> tuple[Tensor, Tensor]:
    """Candidates of the nodes just looked at, by log q + g with the target's own noise.

    logits: [num_fresh, vocab_size of the target] float32, growth after growth. Returns tokens and
    log probabilities, [num_fresh, branching].
    """
    rows = [row for growth in growing for row in growth.sampler_rows()]
    perturbed = sampler.perturb(sampler.process(logits, rows), rows)
    best = perturbed.log_softmax(-1).topk(branching)
    return best.indices, best.values


def take(growing: Seq[Growth], tokens: Tensor, scores: Tensor) -> None:
    """Candidates of the nodes just looked at: tokens and log probabilities, [num_fresh, n]."""
    rows = zip(tokens.tolist(), scores.exp().tolist(), strict=True)
    for growth in growing:
        for index in range(len(growth.fresh)):
            growth.add_candidates(index, *next(rows))
