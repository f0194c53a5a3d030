"""The draft tree, which drafters propose and the verifier walks. Numpy only.

Node 0 is the root: the last emitted token, whose KV is not computed yet. A parent comes before its
children. Ancestry is one 64-bit word per node. The most likely path comes first in the layout, so
that its KV is usually written where it belongs and a commit moves nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

MAX_NODES: Final = 64  # bits of an ancestor word

PREDICTION_ID: Final = 255  # drafter id of nodes from the request's `prediction`
TARGET_ID: Final = 0  # drafter id of the root, and of tokens that no drafter proposed


@dataclass(frozen=True)
class DraftTree:
    """A tree of 1 to 64 nodes, immutable: its arrays become read-only.

    `path_probs[i]` is the path probability of node i: the estimated probability that node i and all
    its ancestors are accepted. It is 1 for the root.
    """

    tokens: npt.NDArray[np.int32]  # [n]
    parents: npt.NDArray[np.int16]  # [n], parents[0] = -1, parents[i] < i
    path_probs: npt.NDArray[np.float32]  # [n], never above the parent's
    drafter_ids: npt.NDArray[np.uint8]  # [n], TARGET_ID, 1 + drafter index, or PREDICTION_ID

    def __post_init__(self) -> None:
        for array in (self.tokens, self.parents, self.path_probs, self.drafter_ids):
            array.setflags(write=False)

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Distance of each node from the root."""
        depths = [0]
        for parent in self.parents.tolist()[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def acceptance_probs(self) -> tuple[float, ...]:
        """Conditional acceptance probability of each node, given that its parent is accepted."""
        probs = self.path_probs.tolist()
        above = [1.0, *(probs[parent] for parent in self.parents.tolist()[1:])]
        return tuple(
            [
                prob / before if before > 0.0 else 0.0
                for prob, before in zip(probs, above, strict=True)
            ]
        )

    @cached_property
    def ancestors(self) -> tuple[int, ...]:
        """The ancestor word of each node: bit j of word i is set iff j is i or an ancestor of i."""
        words = [1]
        for node, parent in enumerate(self.parents.tolist()[1:], start=1):
            words.append(words[parent] | 1 << node)
        return tuple(words)

    @cached_property
    def child_of(self) -> Mapping[tuple[int, int], int]:
        """(node, token) -> the child of `node` with `token`."""
        edges = zip(self.parents.tolist(), self.tokens.tolist(), strict=True)
        return MappingProxyType({edge: node for node, edge in enumerate(edges)})

    def children(self, node: int) -> dict[int, int]:
        """token -> child node."""
        edges = self.child_of.items()
        return {token: child for (parent, token), child in edges if parent == node}

    def validate(self, vocab_size: int, max_nodes: int = MAX_NODES) -> None:
        """Raise ValueError if the tree is malformed or larger than `max_nodes`."""
        n = len(self)
        if not 1 <= n <= min(max_nodes, MAX_NODES):
            raise ValueError(f"tree has {n} nodes; expected 1 to {min(max_nodes, MAX_NODES)}")
        if not len(self.parents) == len(self.path_probs) == len(self.drafter_ids) == n:
            raise ValueError("tree arrays differ in length")
        tokens, parents = self.tokens.tolist(), self.parents.tolist()
        probs = self.path_probs.tolist()
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


Trees = dict[str, DraftTree]  # by sequence id


@lru_cache(maxsize=4096)  # keeps the cached properties of the trees too
def root_tree(token: int) -> DraftTree:
    """The tree without drafted nodes: the root alone, cached and shared by all callers.

    `np.frombuffer` makes arrays that cannot be made writeable again.
    """
    tree = _freeze([token], [-1], [1.0], [TARGET_ID])
    return DraftTree(
        np.frombuffer(tree.tokens.tobytes(), np.int32),
        np.frombuffer(tree.parents.tobytes(), np.int16),
        np.frombuffer(tree.path_probs.tobytes(), np.float32),
        np.frombuffer(tree.drafter_ids.tobytes(), np.uint8),
    )


def build_tree(
    tokens: Sequence[int],
    parents: Sequence[int],
    path_probs: Sequence[float],
    drafter_ids: int | Sequence[int],
) -> DraftTree:
    """Build a tree, laid out depth first, with children by descending path probability.

    In the input node 0 is the root and every node comes after its parent. `path_probs` are capped
    by the parent's, so that the n most likely nodes always form a tree.
    `drafter_ids`: one for all nodes, or one per node; the root always has TARGET_ID.
    """
    n = len(tokens)
    ids = [drafter_ids] * n if isinstance(drafter_ids, int) else list(drafter_ids)
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
    return _freeze(
        [tokens[node] for node in order],
        [-1] + [new_index[parents[node]] for node in order[1:]],
        [capped[node] for node in order],
        [TARGET_ID] + [ids[node] for node in order[1:]],
    )


def chain_tree(
    root: int, tokens: Sequence[int], path_probs: Sequence[float], drafter_id: int
) -> DraftTree:
    """A tree of a single path; `path_probs[i]` is the path probability of `tokens[i]`."""
    n = len(tokens)
    return build_tree([root, *tokens], list(range(-1, n)), [1.0, *path_probs], drafter_id)


def prune(tree: DraftTree, max_nodes: int) -> DraftTree:
    """Keep the `max_nodes` nodes of the largest path probability, root included.

    They form a tree and keep their order, so the most likely path still comes first.
    """
    if len(tree) <= max_nodes:
        return tree
    # Stable on (path probability, index): a child never ranks before its parent.
    keep = np.sort(np.argsort(-tree.path_probs, kind="stable")[:max_nodes])
    new_index = np.empty(len(tree), np.int16)
    new_index[keep] = np.arange(max_nodes)
    parents = new_index[tree.parents[keep]]
    parents[0] = -1
    return DraftTree(tree.tokens[keep], parents, tree.path_probs[keep], tree.drafter_ids[keep])


def merge_trees(
    trees: Sequence[DraftTree], acceptance_probs: Sequence[Sequence[float]], max_nodes: int
) -> DraftTree:
    """Merge trees with the same root: nodes of equal (parent, token) become one node.

    `acceptance_probs[i][j]` is the conditional acceptance probability of node j of `trees[i]`. A
    merged node has the largest of its proposers' probabilities, and the id of that drafter. The
    result has the `max_nodes` nodes of the largest path probability.
    """
    tokens, parents, probs = [int(trees[0].tokens[0])], [-1], [1.0]
    drafter_ids = [TARGET_ID]
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
    return build_tree(
        [tokens[node] for node in keep],
        [-1] + [new_index[parents[node]] for node in keep[1:]],
        [path_probs[node] for node in keep],
        [drafter_ids[node] for node in keep],
    )


def _freeze(
    tokens: Sequence[int],
    parents: Sequence[int],
    path_probs: Sequence[float],
    drafter_ids: Sequence[int],
) -> DraftTree:
    return DraftTree(
        np.array(tokens, np.int32),
        np.array(parents, np.int16),
        np.array(path_probs, np.float32),
        np.array(drafter_ids, np.uint8),
    )
