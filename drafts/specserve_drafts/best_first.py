"""Growing a draft tree by its most likely paths, where looking what may follow costs nothing.

The compiled drafters have the same in kernels/specserve_kernels/host/csrc/tree.h.
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
    source: int,
) -> DraftTree:
    """`expand(payload, depth)`: per token that may follow a node, how likely it is, its payload."""
    tokens, parents, scores = [root], [-1], [1.0]
    # Open nodes: score (negative: a heap pops the least), age, parent, depth, token, payload.
    heap: list[tuple[float, int, int, int, int, P]] = []
    num_found, depth = 0, 0
    while len(tokens) < max_nodes:
        node = len(tokens) - 1
        for token, share, following in expand(payload, depth):
            score = scores[node] * share
            if score >= min_probability:
                num_found += 1
                heappush(heap, (-score, num_found, node, depth + 1, token, following))
        if not heap:
            break
        negative, _, parent, depth, token, payload = heappop(heap)
        tokens.append(token)
        parents.append(parent)
        scores.append(-negative)
    return build_tree(tokens, parents, scores, source)
