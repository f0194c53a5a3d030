"""Selects which drafted nodes are verified: as many as give the most expected tokens per second.

Greedy over all sequences together, by descending path probability. Path probabilities never
increase along a path, so what is kept of a tree is a tree. Host only.
"""

from collections.abc import Mapping

from specserve.speculation.cost_model import CostModel
from specserve.tree import DraftTree
from specserve_kernels.host import HOST, HostCode


class NodeSelection:
    def __init__(self, costs: CostModel, host: HostCode = HOST) -> None:
        self._costs = costs
        self._host = host

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
        pruned = self._host.select_nodes(proposed, seconds)
        kept = [
            tree if fields is None else DraftTree(*fields)
            for tree, fields in zip(proposed, pruned, strict=True)
        ]
        return dict(zip(trees, kept, strict=True))
