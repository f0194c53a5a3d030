"""Functions of draft trees. A tree comes in as a `TreeView` and goes out as `TreeFields`."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from typing import TypeVar

import numpy as np

from specserve_kernels.host.interface import DRAFTED_ID, TreeFields, TreeView

P = TypeVar("P")


def validate(tree: TreeView, vocab_size: int, max_nodes: int, /) -> None:
    """See `specserve.tree.DraftTree.validate`."""
    n = len(tree.tokens)
    if not 1 <= n <= max_nodes:
        raise ValueError(f"tree has {n} nodes; expected 1 to {max_nodes}")
    if not len(tree.parents) == len(tree.path_probs) == len(tree.drafter_ids) == n:
        raise ValueError("tree arrays differ in length")
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    probs = tree.path_probs.tolist()
    if parents[0] != -1:
        raise ValueError(f"parents[0] is {parents[0]}; the root's parent is -1")
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        raise ValueError(f"a tree token is outside the vocabulary of {vocab_size}")
    if len(set(zip(parents, tokens, strict=True))) != n:
        raise ValueError("two children of one node carry the same token")
    for node in range(1, n):
        if not 0 <= parents[node] < node:
            raise ValueError("a node's parent must come before it")
        if not 0.0 <= probs[node] <= probs[parents[node]]:
            raise ValueError("a path probability must be in [0, its parent's]")


def build_tree(
    tokens: Sequence[int], parents: Sequence[int], path_probs: Sequence[float], drafter_id: int, /
) -> TreeFields:
    """See `specserve.tree.build_tree`."""
    return _lay_out(tokens, parents, path_probs, [0] + [drafter_id] * (len(tokens) - 1))


def prune(tree: TreeView, max_nodes: int) -> TreeFields:
    """Keep the `max_nodes` nodes of the largest path probability, root included.

    They form a tree and keep their order, so the most likely path still comes first. `max_nodes` is
    at most the size of the tree.
    """
    # Stable on (path probability, index): a child never ranks before its parent.
    keep = np.sort(np.argsort(-tree.path_probs, kind="stable")[:max_nodes])
    new_index = np.empty(len(tree.tokens), np.int16)
    new_index[keep] = np.arange(max_nodes)
    parents = new_index[tree.parents[keep]]
    parents[0] = -1
    return tree.tokens[keep], parents, tree.path_probs[keep], tree.drafter_ids[keep]


def merge_trees(
    trees: Sequence[TreeView], acceptance_probs: Sequence[Sequence[float]], max_nodes: int
) -> TreeFields:
    """Merge trees with the same root: nodes of equal (parent, token) become one node.

    `acceptance_probs[i][j]` is the conditional acceptance probability of node j of `trees[i]`. A
    merged node has the largest of its proposers' probabilities, and the id of that drafter. The
    result has the `max_nodes` nodes of the largest path probability.
    """
    tokens, parents, probs = [int(trees[0].tokens[0])], [-1], [1.0]
    drafter_ids = [0]
    index_of: dict[tuple[int, int], int] = {}
    for tree, conditional in zip(trees, acceptance_probs, strict=True):
        nodes = zip(
            *(tree.tokens.tolist(), tree.parents.tolist()),
            *(conditional, tree.drafter_ids.tolist()),
            strict=True,
        )
        next(nodes)
        place = [0]  # of this tree's nodes in the merged one
        for token, parent, prob, drafter_id in nodes:
            key = (place[parent], token)
            index = index_of.setdefault(key, len(tokens))
            if index == len(tokens):
                tokens.append(token)
                parents.append(key[0])
                probs.append(prob)
                drafter_ids.append(drafter_id)
            elif prob > probs[index]:
                probs[index], drafter_ids[index] = prob, drafter_id
            place.append(index)
    path_probs = [1.0]
    for prob, parent in zip(probs[1:], parents[1:], strict=True):
        path_probs.append(prob * path_probs[parent])
    # Stable on (path probability, index): a child never ranks before its parent.
    ranked = sorted(range(len(tokens)), key=lambda node: -path_probs[node])
    keep = sorted(ranked[:max_nodes])
    new_index = {node: index for index, node in enumerate(keep)}
    return _lay_out(
        [tokens[node] for node in keep],
        [-1] + [new_index[parents[node]] for node in keep[1:]],
        [path_probs[node] for node in keep],
        [drafter_ids[node] for node in keep],
    )


def select_nodes(trees: Sequence[TreeView], seconds: Sequence[float], /) -> list[TreeFields | None]:
    """Prune the trees to the nodes worth verifying; None stands for a whole tree.

    Of all drafted nodes, by descending path probability, the number is kept that maximises
    (roots + sum of path probabilities) / seconds[number].
    """
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
    return [
        prune(tree, 1 + kept[index]) if 1 + kept[index] < len(tree.tokens) else None
        for index, tree in enumerate(trees)
    ]


def grow_best_first(
    root: int,
    payload: P,
    expand: Callable[[P, int], Iterable[tuple[int, float, P]]],
    max_nodes: int,
    min_probability: float,
) -> TreeFields:
    """Expand a tree whose expansion step is a lookup, not a forward pass.

    The result has the `max_nodes` most likely nodes, root included, by path probability.
    `expand(payload, depth)` yields the candidate children of a node of that depth: token,
    conditional acceptance probability, and the payload to expand the child with. Nodes of a path
    probability below `min_probability` are left out.
    """
    tokens, parents, path_probs = [root], [-1], [1.0]
    # Frontier entries: (negative path probability, insertion number, parent, depth, token,
    # payload); heapq pops the smallest.
    heap: list[tuple[float, int, int, int, int, P]] = []
    num_found, depth = 0, 0
    while len(tokens) < max_nodes:
        node = len(tokens) - 1
        for token, prob, following in expand(payload, depth):
            path_prob = path_probs[node] * prob
            if path_prob >= min_probability:
                num_found += 1
                heappush(heap, (-path_prob, num_found, node, depth + 1, token, following))
        if not heap:
            break
        negative, _, parent, depth, token, payload = heappop(heap)
        tokens.append(token)
        parents.append(parent)
        path_probs.append(-negative)
    return build_tree(tokens, parents, path_probs, DRAFTED_ID)


def _lay_out(
    tokens: Sequence[int],
    parents: Sequence[int],
    path_probs: Sequence[float],
    drafter_ids: Sequence[int],
) -> TreeFields:
    """Order the nodes depth first, children by descending path probability; see `build_tree`."""
    n = len(tokens)
    capped = [1.0] * n
    children: list[list[int]] = [[] for _ in range(n)]
    for node in range(1, n):
        capped[node] = min(float(path_probs[node]), capped[parents[node]])
        children[parents[node]].append(node)
    order: list[int] = []
    stack = [0]
    while stack:
        node = stack.pop()
        order.append(node)
        stack.extend(sorted(children[node], key=lambda child: (capped[child], -child)))
    new_index = {node: index for index, node in enumerate(order)}
    return (
        np.array([tokens[node] for node in order], np.int32),
        np.array([-1] + [new_index[parents[node]] for node in order[1:]], np.int16),
        np.array([capped[node] for node in order], np.float32),
        np.array([drafter_ids[node] for node in order], np.uint8),
    )
