"""Which drafted nodes are worth their rows: the policy's last word, once proposals are there.

Greedy over all sequences together: nodes by falling probability, as many as give the most tokens
per second. Path probabilities fall along a path, so what is kept of a tree is a tree. Host only.
"""

from collections.abc import Mapping

import numpy as np

from specserve.schedule.cost import PassCosts
from specserve.tree import DraftTree, prune


def worthwhile(
    trees: Mapping[str, DraftTree], num_rows: int, costs: PassCosts
) -> dict[str, DraftTree]:
    """The trees without the nodes that are not worth it; scores are calibrated probabilities.

    `num_rows` of the pass are there without any drafted node, the roots among them. Maximises
    (roots + sum of the nodes' scores) / seconds.
    """
    if all(len(tree) == 1 for tree in trees.values()):
        return dict(trees)
    drafted = np.concatenate([tree.scores[1:] for tree in trees.values()])
    owners = np.concatenate([np.full(len(tree) - 1, i) for i, tree in enumerate(trees.values())])
    order = np.argsort(-drafted, kind="stable")
    expected = len(trees) + np.concatenate([[0.0], np.cumsum(drafted[order], dtype=np.float64)])
    seconds = costs.seconds(num_rows + np.arange(len(drafted) + 1))
    best = int(np.argmax(expected / seconds))
    kept = np.bincount(owners[order[:best]].astype(np.int64), minlength=len(trees))
    return {
        seq_id: prune(tree, 1 + int(count))
        for (seq_id, tree), count in zip(trees.items(), kept, strict=True)
    }
