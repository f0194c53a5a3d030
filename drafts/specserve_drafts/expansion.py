"""Best-first tree expansion with a draft model.

Each expansion step evaluates the selected nodes in one forward pass, adds their likeliest
successors to the frontier, and selects the nodes to evaluate next. Knows nodes and path
probabilities; the drafter runs the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from torch import Tensor

from specserve.sampling import Row, Sampler, SamplingState
from specserve.sequence import SequenceView
from specserve.tree import DraftTree, build_tree

# Assumptions of `ExpansionThreshold`:
_GAIN: Final = 0.4  # tokens per forward pass that an accepted node's successors add
_TOKENS: Final = 1.8  # tokens per forward pass without them
_BEST_CHILD: Final = 0.6  # conditional acceptance probability of a node's best successor
_WINDOW: Final = 64.0  # drafts that the running means cover


@dataclass(frozen=True, slots=True)
class Node:
    token: int
    parent: int  # index among the evaluated nodes, -1 for the root
    path_prob: float
    depth: int
    ancestors: int  # bit j: evaluated node j is an ancestor, or the node itself


class TreeExpansion:
    """A tree during expansion: nodes in the order of their KV, and the frontier."""

    def __init__(self, seq: SequenceView, state: SamplingState, budget: int) -> None:
        self.seq, self.state, self.budget = seq, state, budget
        self.nodes = [Node(seq.tokens[-1], -1, 1.0, 0, 1)]
        # Candidates that were not evaluated; their `ancestors` are those of the parent.
        self.frontier: list[Node] = []
        self.num_evaluated = 0  # leading `nodes` with KV written and candidates added

    def select_next(self, beam: int, max_depth: int, min_probability: float = 0.0) -> None:
        """Select up to `beam` frontier nodes to evaluate next.

        Nodes at `max_depth` or of a path probability below `min_probability` are never evaluated.
        One node of the budget is kept for a leaf: with the budget used up, the successors of the
        last evaluated nodes could not be added. The compiled version is in
        kernels/specserve_kernels/cpu/csrc/draft_head.cpp.
        """
        self.num_evaluated = len(self.nodes)
        room = min(beam, self.budget - 1 - len(self.nodes))
        likely = [
            node
            for node in self.frontier
            if node.depth < max_depth and node.path_prob >= min_probability
        ]
        for node in sorted(likely, key=lambda node: -node.path_prob)[: max(room, 0)]:
            self.frontier.remove(node)
            self.nodes.append(replace(node, ancestors=node.ancestors | 1 << len(self.nodes)))

    @property
    def selected(self) -> list[Node]:
        """The nodes to evaluate in the next expansion step; empty at the end."""
        return self.nodes[self.num_evaluated :]

    def sampler_rows(self) -> list[Row]:
        """The sampler's row of the position after each selected node."""
        return [
            Row(self.state, self.seq.num_tokens + node.depth, self._path(node))
            for node in self.selected
        ]

    def tree(self) -> DraftTree:
        """The evaluated nodes and the best of the frontier, `budget` nodes at most."""
        leaves = sorted(self.frontier, key=lambda node: -node.path_prob)
        nodes = self.nodes + leaves[: self.budget - len(self.nodes)]
        return build_tree(
            [node.token for node in nodes],
            [node.parent for node in nodes],
            [node.path_prob for node in nodes],
        )

    def _path(self, node: Node) -> tuple[int, ...]:
        tokens: list[int] = []
        while node.parent >= 0:
            tokens.append(node.token)
            node = self.nodes[node.parent]
        return tuple(reversed(tokens))


class ExpansionThreshold:
    """The least path probability at which evaluating a node saves more time than it takes.

    `floor` without `step_seconds`, or if it returns None. Otherwise it returns (step, row), the
    seconds of a step without drafts and of one more verified node; with x the seconds of one more
    expansion step, the threshold is max(floor, _TOKENS / step * max(x / _GAIN, row / _BEST_CHILD)).
    So the tokens expected from evaluating a node, and from verifying its best successor, exceed the
    tokens that plain steps emit in the same time.
    """

    def __init__(
        self, floor: float, step_seconds: Callable[[], tuple[float, float] | None] | None
    ) -> None:
        self._floor, self._step_seconds = floor, step_seconds
        self._num_drafts = 0
        self._mean_steps = self._mean_seconds = 0.0  # running means per draft
        self._variance = self._covariance = 0.0  # of the steps; of steps and seconds

    def record(self, seconds: float, num_steps: int) -> None:
        """Record one draft: its total time and its expansion steps."""
        self._num_drafts += 1
        weight = 1.0 / min(self._num_drafts, _WINDOW)
        more_steps, more_seconds = num_steps - self._mean_steps, seconds - self._mean_seconds
        self._mean_steps += weight * more_steps
        self._mean_seconds += weight * more_seconds
        self._variance += weight * ((1 - weight) * more_steps**2 - self._variance)
        self._covariance += weight * ((1 - weight) * more_steps * more_seconds - self._covariance)

    @property
    def min_probability(self) -> float:
        seconds = None if self._step_seconds is None else self._step_seconds()
        if seconds is None:
            return self._floor
        step, row = seconds
        cost = max(self._marginal_seconds() / _GAIN, row / _BEST_CHILD)
        return max(self._floor, round(_TOKENS * cost / step, 2))

    def _marginal_seconds(self) -> float:
        """Seconds of one more expansion step.

        The slope of seconds over steps, not the mean: the first step of a draft takes longer, as
        its weights are not in the CPU cache. Limited to 0.2 to 1 times the mean.
        """
        mean = self._mean_seconds / max(self._mean_steps, 1.0)
        if self._variance < 0.01:  # nearly equal numbers of steps determine no slope
            return mean
        return min(max(self._covariance / self._variance, 0.2 * mean), mean)


def rank_candidates(
    expansions: Sequence[TreeExpansion], logits: Tensor, sampler: Sampler, branching: int
) -> tuple[Tensor, Tensor]:
    """The best successors of the selected nodes by log q + g, with the target's Gumbel noise g.

    logits: [num_selected, target vocab_size] float32, in the order of `expansions`. Returns tokens
    and log-softmax of the perturbed logits, each [num_selected, branching].
    """
    rows = [row for expansion in expansions for row in expansion.sampler_rows()]
    perturbed = sampler.perturb(sampler.process(logits, rows), rows)
    best = perturbed.log_softmax(-1).topk(branching)
    return best.indices, best.values


def add_ranked(expansions: Sequence[TreeExpansion], tokens: Tensor, log_probs: Tensor) -> None:
    """Add successors of the selected nodes: tokens and log probabilities, each [num_selected, n].

    Both are in the order of `expansions`.
    """
    rows = zip(tokens.tolist(), log_probs.exp().tolist(), strict=True)
    for expansion in expansions:
        for index, node in enumerate(expansion.selected, expansion.num_evaluated):
            for token, prob in zip(*next(rows), strict=True):
                if prob > 0.0:
                    path_prob, depth = node.path_prob * prob, node.depth + 1
                    expansion.frontier.append(Node(token, index, path_prob, depth, node.ancestors))
