"""Which drafted nodes are worth their rows: the policy's last word, once proposals are there.

Greedy over all sequences together: nodes by falling probability, as many as give the most tokens
per second. Path probabilities fall along a path, so what is kept of a tree is a tree. Host only.
"""

from collections import Counter
from collections.abc import Mapping

from specserve.schedule.cost import PassCosts
from specserve.tree import DraftTree, prune


def worthwhile(
    trees: Mapping[str, DraftTree], num_rows: int, costs: PassCosts
) -> dict[str, DraftTree]:
    """The trees without the nodes that are not worth it; scores are calibrated probabilities.

    `num_rows` of the pass are there without any drafted node, the roots among them. Maximises
    (roots + sum of the nodes' scores) / seconds.
    """
    drafted = sorted(
        ((score, seq_id) for seq_id, tree in trees.items() for score in tree.scores.tolist()[1:]),
        key=lambda node: -node[0],
    )
    if not drafted:
        return dict(trees)
    seconds = costs.seconds(num_rows, num_rows + len(drafted))
    expected = float(len(trees))
    best, best_rate = 0, expected / seconds[0]
    for count, (score, _) in enumerate(drafted, start=1):
        expected += score
        if expected / seconds[count] > best_rate:
            best, best_rate = count, expected / seconds[count]
    kept = Counter(seq_id for _, seq_id in drafted[:best])
    return {seq_id: prune(tree, 1 + kept[seq_id]) for seq_id, tree in trees.items()}
