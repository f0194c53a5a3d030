"""The draft tree: what every drafter proposes and the verifier walks. Numpy only.

Node 0 is the root, the last emitted token, whose KV is not computed yet. Parents come before their
children, ancestry is one 64-bit word per node, and nodes are laid out with the most likely chain
first, so that the usual accepted path already lies where its KV belongs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

MAX_NODES: Final = 64
WORD: Final = np.uint64  # ancestor word: bit j of node i is set iff j is i or an ancestor of i

PREDICTION: Final = 255  # `source` of nodes taken from the text the caller predicted
TARGET_SOURCE: Final = 0  # `source` of the root, and of tokens the target drew itself


@dataclass(frozen=True)
class DraftTree:
    """At most 64 nodes. `scores[i]` estimates P(the path to i is accepted); the root has 1."""

    tokens: npt.NDArray[np.int32]  # [n]
    parents: npt.NDArray[np.int16]  # [n], parents[0] = -1, parents[i] < i
    scores: npt.NDArray[np.float32]  # [n], never above the parent's
    source: npt.NDArray[np.uint8]  # [n], 0 target, else 1 + index of the drafter

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def depths(self) -> npt.NDArray[np.int32]:
        """[n] distance from the root."""
        depths = np.zeros(len(self), np.int32)
        for node in range(1, len(self)):
            depths[node] = depths[self.parents[node]] + 1
        return depths

    @cached_property
    def shares(self) -> npt.NDArray[np.float32]:
        """[n] estimated P(a node is accepted), given its parent is."""
        above = self.scores[self.parents]
        above[0] = 1.0
        shares: npt.NDArray[np.float32] = np.divide(
            self.scores, above, out=np.zeros_like(above), where=above > 0
        )
        return shares

    @cached_property
    def ancestors(self) -> npt.NDArray[np.uint64]:
        """[n] ancestor words."""
        words = [1] * len(self)
        for node in range(1, len(self)):
            words[node] = words[self.parents[node]] | (1 << node)
        return np.array(words, WORD)

    @cached_property
    def children(self) -> list[dict[int, int]]:
        """Per node: token -> child node."""
        children: list[dict[int, int]] = [{} for _ in range(len(self))]
        for node in range(1, len(self)):
            children[self.parents[node]][int(self.tokens[node])] = node
        return children

    def validate(self, vocab_size: int, max_nodes: int = MAX_NODES) -> None:
        """Raise ValueError unless this is a tree that the verifier may walk."""
        n = len(self)
        if not 1 <= n <= min(max_nodes, MAX_NODES):
            raise ValueError(f"tree has {n} nodes; expected 1 to {min(max_nodes, MAX_NODES)}")
        if not len(self.parents) == len(self.scores) == len(self.source) == n:
            raise ValueError("tree arrays differ in length")
        tokens, parents, scores = (
            self.tokens.tolist(),
            self.parents.tolist(),
            self.scores.tolist(),
        )
        if parents[0] != -1:
            raise ValueError(f"parents[0] is {parents[0]}; the root's parent is -1")
        if min(tokens) < 0 or max(tokens) >= vocab_size:
            raise ValueError(f"a tree token is outside the vocabulary of {vocab_size}")
        if len(set(zip(parents, tokens, strict=True))) != n:
            raise ValueError("two children of one node carry the same token")
        for node in range(1, n):
            if not 0 <= parents[node] < node:
                raise ValueError("a node's parent must come before it")
            if not 0.0 <= scores[node] <= scores[parents[node]]:
                raise ValueError("a path score must be in [0, its parent's score]")


def root_tree(token: int) -> DraftTree:
    """No draft: the root alone."""
    return _freeze([token], [-1], [1.0], [TARGET_SOURCE])


def build_tree(
    tokens: Sequence[int],
    parents: Sequence[int],
    scores: Sequence[float],
    source: int | Sequence[int],
) -> DraftTree:
    """Lay nodes out chain-first (depth first, children by descending score).

    Node 0 is the root; every node comes after its parent. Scores are capped by the parent's, so
    that the best nodes of a tree always form a tree. `source` applies to all but the root.
    """
    n = len(tokens)
    sources = [source] * n if isinstance(source, int) else list(source)
    capped = [1.0] * n
    children: list[list[int]] = [[] for _ in range(n)]
    for node in range(1, n):
        capped[node] = min(float(scores[node]), capped[parents[node]])
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
        [TARGET_SOURCE] + [sources[node] for node in order[1:]],
    )


def chain_tree(root: int, tokens: Sequence[int], scores: Sequence[float], source: int) -> DraftTree:
    """One path: `scores[i]` is the path score of `tokens[i]`."""
    n = len(tokens)
    return build_tree([root, *tokens], list(range(-1, n)), [1.0, *scores], source)


def rescored(tree: DraftTree, scores: npt.NDArray[np.float32]) -> DraftTree:
    """The same tree with other path scores [n], none above its parent's."""
    return DraftTree(tree.tokens, tree.parents, scores, tree.source)


def prune(tree: DraftTree, max_nodes: int) -> DraftTree:
    """Keep the `max_nodes` best nodes by path score, root included; they form a tree."""
    if len(tree) <= max_nodes:
        return tree
    # Stable on (score, index): a child never ranks before its parent.
    keep = np.sort(np.argsort(-tree.scores, kind="stable")[:max_nodes])
    new_index = {int(node): index for index, node in enumerate(keep)}
    return build_tree(
        tree.tokens[keep].tolist(),
        [-1] + [new_index[int(parent)] for parent in tree.parents[keep[1:]]],
        tree.scores[keep].tolist(),
        tree.source[keep].tolist(),
    )


def merge(trees: Sequence[DraftTree], max_nodes: int) -> DraftTree:
    """One tree from several with the same root: nodes unite by (parent, token).

    Given its parent, a united node is as likely as the surest of its proposers says, whose source
    it takes; paths multiply.
    """
    if len(trees) == 1:
        return prune(trees[0], max_nodes)
    tokens, parents = [int(trees[0].tokens[0])], [-1]
    shares, sources = [1.0], [TARGET_SOURCE]
    index_of: dict[tuple[int, int], int] = {}
    for tree in trees:
        merged = [0] * len(tree)
        of_tree = tree.shares.tolist()
        nodes = zip(
            tree.tokens.tolist(), tree.parents.tolist(), of_tree, tree.source.tolist(), strict=True
        )
        for node, (token, parent, share, source) in enumerate(nodes):
            if node == 0:
                continue
            key = (merged[parent], token)
            if key not in index_of:
                index_of[key] = len(tokens)
                tokens.append(token)
                parents.append(key[0])
                shares.append(share)
                sources.append(source)
            elif share > shares[index_of[key]]:
                shares[index_of[key]] = share
                sources[index_of[key]] = source
            merged[node] = index_of[key]
    scores = list(shares)
    for node in range(1, len(tokens)):
        scores[node] *= scores[parents[node]]
    return prune(build_tree(tokens, parents, scores, sources), max_nodes)


def _freeze(
    tokens: Sequence[int], parents: Sequence[int], scores: Sequence[float], source: Sequence[int]
) -> DraftTree:
    return DraftTree(
        np.array(tokens, np.int32),
        np.array(parents, np.int16),
        np.array(scores, np.float32),
        np.array(source, np.uint8),
    )
