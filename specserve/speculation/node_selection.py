"""Selects which drafted nodes are verified: as many as give the most expected tokens per second.

Greedy over all sequences together, by descending path probability. Path probabilities never
increase along a path, so what is kept of a tree is a tree. Host only; uses the compiled function
where there is one, and `kept_nodes` is its reference implementation.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from specserve.speculation.cost_model import CostModel
from specserve.tree import DraftTree, prune
from specserve_kernels.dispatch import native_host


class NodeSelection:
    def __init__(self, costs: CostModel) -> None:
        self._costs = costs
        self._host = native_host()

    def select(
        self, trees: Mapping[str, DraftTree], num_rows: int, context: float | None = None
    ) -> dict[str, DraftTree]:
        """Prune the trees, which have calibrated path probabilities, to the selected nodes.

        Maximises (roots + sum of the path probabilities of drafted nodes) / seconds. `num_rows` is
        the number of rows of the forward pass without drafted nodes, roots included, and `context`
        the mean number of tokens before them.
        """
        proposed = list(trees.values())
        num_drafted = sum(map(len, proposed)) - len(proposed)
        if not num_drafted:
            return dict(trees)
        seconds = self._costs.seconds(num_rows, num_rows + num_drafted, context)
        if self._host is not None:
            pruned = self._host.select_nodes(proposed, seconds)
            kept = [
                tree if fields is None else DraftTree(*fields)
                for tree, fields in zip(proposed, pruned, strict=True)
            ]
        else:
            counts = kept_nodes(proposed, seconds)
            kept = [prune(tree, count) for tree, count in zip(proposed, counts, strict=True)]
        return dict(zip(trees, kept, strict=True))


def kept_nodes(trees: Sequence[DraftTree], seconds: Sequence[float]) -> list[int]:
    """Per tree the number of nodes to keep; `seconds[n]`: of a step with n drafted nodes."""
    drafted = sorted(
        (
            (prob, index)
            for index, tree in enumerate(trees)
            for prob in tree.path_probs.tolist()[1:]
        ),
        key=lambda node: -node[0],
    )
    expected = float(len(trees))
    best, best_rate = 0, expected / seconds[0]
    for count, (prob, _) in enumerate(drafted, start=1):
        expected += prob
        if expected / seconds[count] > best_rate:
            best, best_rate = count, expected / seconds[count]
    kept = Counter(index for _, index in drafted[:best])
    return [1 + kept[index] for index in range(len(trees))]
