"""Best-first tree expansion with a draft model.

Each expansion step evaluates a few nodes in one forward pass, adds their candidate successors to
the frontier, and selects the nodes to evaluate next. Knows nodes and path probabilities; the
drafter runs the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from torch import Tensor

from specserve.sampling import Row, Sampler, SamplingState
from specserve.sequence import SequenceView
from specserve.tree import DraftTree, build_tree

# Assumptions of `LookPrice`:
_GAIN: Final = 0.4  # tokens per forward pass that an accepted node's successors add
_TOKENS: Final = 1.8  # tokens per forward pass without them
_NEXT: Final = 0.6  # conditional acceptance probability of a node's best successor
_MEMORY: Final = 64.0  # drafts that the running means cover


@dataclass(frozen=True, slots=True)
class Node:
    token: int
    parent: int  # index among the evaluated nodes, -1 for the root
    path_prob: float
    depth: int
    word: int  # bit j: evaluated node j is an ancestor, or the node itself


class Growth:
    """A tree during expansion: the evaluated nodes in the order of their KV, and the frontier."""

    def __init__(self, seq: SequenceView, state: SamplingState, budget: int) -> None:
        self.seq, self.state, self.budget = seq, state, budget
        self.nodes = [Node(seq.tokens[-1], -1, 1.0, 0, 1)]
        self.pool: list[Node] = []  # the frontier: candidates not evaluated; `word` is the parent's
        self.num_done = 0  # leading `nodes` that are evaluated: KV written, candidates added

    def pick(self, beam: int, max_depth: int, min_probability: float = 0.0) -> bool:
        """Select up to `beam` frontier nodes to evaluate next; False if there are none.

        Nodes at `max_depth` or of a path probability below `min_probability` are never evaluated.
        One node of the budget is kept for a leaf: with the budget used up, the successors of the
        last evaluated nodes could not be added. The compiled version is in
        kernels/specserve_kernels/cpu/csrc/draft_head.cpp.
        """
        self.num_done = len(self.nodes)
        room = min(beam, self.budget - 1 - len(self.nodes))
        worth = [n for n in self.pool if n.depth < max_depth and n.path_prob >= min_probability]
        for node in sorted(worth, key=lambda node: -node.path_prob)[: max(room, 0)]:
            self.pool.remove(node)
            self.nodes.append(replace(node, word=node.word | 1 << len(self.nodes)))
        return len(self.nodes) > self.num_done

    @property
    def fresh(self) -> list[Node]:
        """The nodes selected for the next expansion step."""
        return self.nodes[self.num_done :]

    def sampler_rows(self) -> list[Row]:
        """The sampler's row of the position after each fresh node."""
        return [
            Row(self.state, self.seq.num_tokens + node.depth, self._path(node))
            for node in self.fresh
        ]

    def add_candidates(self, index: int, tokens: list[int], probabilities: list[float]) -> None:
        """Add successors of fresh node `index`, given their conditional probabilities."""
        parent = self.num_done + index
        node = self.nodes[parent]
        for token, probability in zip(tokens, probabilities, strict=True):
            if probability > 0.0:
                path_prob = node.path_prob * probability
                self.pool.append(Node(token, parent, path_prob, node.depth + 1, node.word))

    def tree(self, drafter_id: int) -> DraftTree:
        """The evaluated nodes and the best of the frontier, `budget` nodes at most."""
        leaves = sorted(self.pool, key=lambda node: -node.path_prob)
        nodes = self.nodes + leaves[: self.budget - len(self.nodes)]
        return build_tree(
            [node.token for node in nodes],
            [node.parent for node in nodes],
            [node.path_prob for node in nodes],
            drafter_id,
        )

    def _path(self, node: Node) -> tuple[int, ...]:
        tokens: list[int] = []
        while node.parent >= 0:
            tokens.append(node.token)
            node = self.nodes[node.parent]
        return tuple(reversed(tokens))


class LookPrice:
    """The least path probability at which evaluating a node is worth its time.

    `least` if `step_seconds` returns None. Otherwise `step_seconds` returns (step, row), the
    seconds of a step without drafts and of one more verified node; with x the seconds of one more
    expansion step, the bound is max(least, _TOKENS / step * max(x / _GAIN, row / _NEXT)). So the
    tokens expected from evaluating a node, and from verifying its best successor, exceed the tokens
    that plain steps emit in the same time.
    """

    def __init__(
        self, least: float, step_seconds: Callable[[], tuple[float, float] | None]
    ) -> None:
        self._least, self._step_seconds = least, step_seconds
        self._num_drafts = 0
        self._passes = self._seconds = 0.0  # running means per draft
        self._variance = self._covariance = 0.0  # of passes; of passes and seconds

    def took(self, seconds: float, num_passes: int) -> None:
        """Record one draft: its total time and its expansion steps."""
        self._num_drafts += 1
        share = 1.0 / min(self._num_drafts, _MEMORY)
        more_passes, more_seconds = num_passes - self._passes, seconds - self._seconds
        self._passes += share * more_passes
        self._seconds += share * more_seconds
        self._variance += share * ((1 - share) * more_passes**2 - self._variance)
        self._covariance += share * ((1 - share) * more_passes * more_seconds - self._covariance)

    @property
    def min_probability(self) -> float:
        seconds = self._step_seconds()
        if seconds is None:
            return self._least
        step, row = seconds
        dearer = max(self._another() / _GAIN, row / _NEXT)
        return max(self._least, round(_TOKENS * dearer / step, 2))

    def _another(self) -> float:
        """Seconds of one more expansion step.

        The slope of seconds over steps, not the mean: the first step of a draft takes longer, as
        its weights are not in the CPU cache. Limited to 0.2 to 1 times the mean.
        """
        mean = self._seconds / max(self._passes, 1.0)
        if self._variance < 0.01:  # nearly equal numbers of steps determine no slope
            return mean
        return min(max(self._covariance / self._variance, 0.2 * mean), mean)


def rank(
    growing: Sequence[Growth], logits: Tensor, sampler: Sampler, branching: int
) -> tuple[Tensor, Tensor]:
    """The best candidates of the fresh nodes by log q + g, with the target's Gumbel noise g.

    logits: [num_fresh, target vocab_size] float32, the growths one after the other. Returns tokens
    and log-softmax of the perturbed logits, each [num_fresh, branching].
    """
    rows = [row for growth in growing for row in growth.sampler_rows()]
    perturbed = sampler.perturb(sampler.process(logits, rows), rows)
    best = perturbed.log_softmax(-1).topk(branching)
    return best.indices, best.values


def take(growing: Sequence[Growth], tokens: Tensor, log_probs: Tensor) -> None:
    """Add candidates of the fresh nodes: tokens and log probabilities, each [num_fresh, n]."""
    rows = zip(tokens.tolist(), log_probs.exp().tolist(), strict=True)
    for growth in growing:
        for index in range(len(growth.fresh)):
            growth.add_candidates(index, *next(rows))
