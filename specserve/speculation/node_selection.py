"""Selects which drafted nodes are verified: as many as give the most expected tokens per second.

Those of the largest path probability of all trees together. Path probabilities never increase along
a path, so what is kept of a tree is a tree. Host only.
"""

from collections.abc import Mapping

from specserve.speculation.cost_model import CostModel
from specserve.tree import DraftTree, Trees
from specserve_kernels.host import HOST, HostCode


def select_nodes(
    trees: Mapping[str, DraftTree],
    costs: CostModel,
    num_rows: int,
    context: float | None = None,
    host: HostCode = HOST,
) -> Trees:
    """Prune the trees, which have calibrated path probabilities, to the selected nodes.

    Maximises (roots + sum of the path probabilities of drafted nodes) / seconds. `num_rows` is the
    number of rows of the forward pass without drafted nodes, roots included, and `context` the mean
    number of tokens before them.
    """
    num_drafted = sum(map(len, trees.values())) - len(trees)
    if not num_drafted:
        return dict(trees)
    seconds = costs.seconds(num_rows, num_rows + num_drafted, context)
    pruned = host.select_nodes(list(trees.values()), seconds)
    return {
        seq_id: tree if fields is None else DraftTree(*fields)
        for (seq_id, tree), fields in zip(trees.items(), pruned, strict=True)
    }
