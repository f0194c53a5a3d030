"""Best-first tree expansion for drafters whose expansion step is a lookup, not a forward pass.

The compiled drafters use the same algorithm in kernels/specserve_kernels/host/csrc/tree.h.
"""

from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from typing import TypeVar

from specserve.tree import DraftTree, build_tree

P = TypeVar("P")


def grow_best_first(
    root: int,
    payload: P,
    expand: Callable[[P, int], Iterable[tuple[int, float, P]]],
    max_nodes: int,
    min_probability: float,
    drafter_id: int,
) -> DraftTree:
    """The tree of the `max_nodes` most likely nodes, root included, by path probability.

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
    return build_tree(tokens, parents, path_probs, drafter_id)
