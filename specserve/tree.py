"""The draft tree, which drafters propose and the verifier walks. Numpy only.

Node 0 is the root: the last emitted token, whose KV is not computed yet. A parent comes before its
children. Ancestry is one 64-bit word per node. The most likely path comes first in the layout, so
that its KV is usually written where it belongs and a commit moves nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from specserve_kernels.host import HOST, interface

MAX_NODES: Final = 64  # bits of an ancestor word

# Drafter id of proposals, until `speculation.compose` knows whose they are.
DRAFTED_ID: Final = interface.DRAFTED_ID
PREDICTION_ID: Final = 255  # drafter id of nodes from the request's `prediction`
TARGET_ID: Final = 0  # drafter id of the root, and of tokens that no drafter proposed


@dataclass(frozen=True)
class DraftTree:
    """A tree of 1 to 64 nodes, immutable: its arrays become read-only."""

    tokens: npt.NDArray[np.int32]  # [n]
    parents: npt.NDArray[np.int16]  # [n], parents[0] = -1, parents[i] < i
    path_probs: npt.NDArray[np.float32]  # [n], that a node and all its ancestors are accepted
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
        pairs = zip(probs, above, strict=True)
        return tuple([prob / before if before > 0.0 else 0.0 for prob, before in pairs])

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
        HOST.validate(self, vocab_size, min(max_nodes, MAX_NODES))


Trees = dict[str, DraftTree]  # by sequence id


@lru_cache(maxsize=4096)  # keeps the cached properties of the trees too
def root_tree(token: int) -> DraftTree:
    """The tree without drafted nodes: the root alone, cached and shared by all callers."""
    tree = build_tree([token], [-1], [1.0], TARGET_ID)
    arrays: list[npt.NDArray[Any]]
    arrays = [tree.tokens, tree.parents, tree.path_probs, tree.drafter_ids]
    # np.frombuffer makes arrays that cannot be made writeable again.
    return DraftTree(*(np.frombuffer(array.tobytes(), array.dtype) for array in arrays))


def build_tree(
    tokens: Sequence[int],
    parents: Sequence[int],
    path_probs: Sequence[float],
    drafter_id: int = DRAFTED_ID,
) -> DraftTree:
    """Build a tree, laid out depth first, with children by descending path probability.

    In the input node 0 is the root and every node comes after its parent. `path_probs` are capped
    by the parent's, so that the n most likely nodes always form a tree.
    `drafter_id` is that of all nodes but the root, which has TARGET_ID.
    """
    return DraftTree(*HOST.build_tree(tokens, parents, path_probs, drafter_id))


def chain_tree(
    root: int, tokens: Sequence[int], path_probs: Sequence[float], drafter_id: int = DRAFTED_ID
) -> DraftTree:
    """A tree of a single path; `path_probs[i]` is the path probability of `tokens[i]`."""
    n = len(tokens)
    return build_tree([root, *tokens], list(range(-1, n)), [1.0, *path_probs], drafter_id)
