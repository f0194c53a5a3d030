"""Invariants of draft trees that are built, pruned or merged."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specserve.tree import (
    MAX_NODES,
    DraftTree,
    build_tree,
    chain_tree,
    root_tree,
)
from specserve_kernels.host.reference.tree import merge_trees, prune

VOCAB = 12


@st.composite
def trees(draw: st.DrawFn, root: int = 3, max_nodes: int = 24) -> DraftTree:
    count = draw(st.integers(0, max_nodes - 1))
    tokens, parents, path_probs = [root], [-1], [1.0]
    taken: set[tuple[int, int]] = set()
    for node in range(1, count + 1):
        parent = draw(st.integers(0, len(tokens) - 1))
        token = draw(st.integers(0, VOCAB - 1))
        if (parent, token) in taken:
            continue
        taken.add((parent, token))
        tokens.append(token)
        parents.append(parent)
        path_probs.append(draw(st.floats(0.0, 1.0, width=32)))
        assert node
    return build_tree(tokens, parents, path_probs, draw(st.integers(1, 3)))


def paths(tree: DraftTree) -> dict[tuple[int, ...], float]:
    """Every node as the tokens on its path, with its path probability."""
    found: dict[tuple[int, ...], float] = {}
    by_node: list[tuple[int, ...]] = []
    for node in range(len(tree)):
        above = () if node == 0 else by_node[tree.parents[node]]
        by_node.append((*above, int(tree.tokens[node])))
        found[by_node[-1]] = float(tree.path_probs[node])
    return found


@given(trees())
def test_built_trees_are_valid_and_begin_with_the_most_likely_path(tree: DraftTree) -> None:
    tree.validate(VOCAB)
    node, expected = 0, 0
    while tree.children(node):  # the best child of each node follows it directly
        children = list(tree.children(node).values())
        best = max(float(tree.path_probs[child]) for child in children)
        node, expected = node + 1, expected + 1
        assert node in children
        assert tree.path_probs[node] == best
    assert tree.depths[node] == expected


@given(trees())
def test_ancestor_words_follow_the_parents(tree: DraftTree) -> None:
    for node in range(len(tree)):
        word, above = 0, node
        while above >= 0:
            word |= 1 << above
            above = int(tree.parents[above])
        assert tree.ancestors[node] == word
        assert tree.depths[node] == word.bit_count() - 1


@given(trees(), st.integers(1, 24))
def test_pruning_keeps_the_best_nodes(tree: DraftTree, max_nodes: int) -> None:
    pruned = DraftTree(*prune(tree, min(max_nodes, len(tree))))
    pruned.validate(VOCAB, max_nodes)
    assert len(pruned) == min(len(tree), max_nodes)
    before, after = paths(tree), paths(pruned)
    assert after.items() <= before.items()
    dropped = [path_prob for path, path_prob in before.items() if path not in after]
    assert not dropped or max(dropped) <= min(after.values())


def merged(trees: list[DraftTree]) -> DraftTree:
    return DraftTree(*merge_trees(trees, [tree.acceptance_probs for tree in trees], MAX_NODES))


@given(st.lists(trees(), min_size=1, max_size=4))
def test_merging_joins_nodes_of_equal_path(proposals: list[DraftTree]) -> None:
    tree = merged(proposals)
    tree.validate(VOCAB)
    highest: dict[tuple[int, ...], float] = {}
    for proposal in proposals:
        path_probs = paths(proposal)
        for path, path_prob in path_probs.items():
            above = path_probs.get(path[:-1], 1.0)
            prob = path_prob / above if above else 0.0
            highest[path] = max(prob, highest.get(path, 0.0))
    found = paths(tree)
    assert found.keys() <= highest.keys()
    for path, path_prob in found.items():
        probs = [highest[path[: end + 1]] for end in range(len(path))]
        assert path_prob == pytest.approx(math.prod(probs), rel=1e-4, abs=1e-30)
    if len(highest) <= MAX_NODES:
        assert found.keys() == highest.keys()


def test_a_merged_node_has_the_drafter_id_of_the_most_confident_proposer() -> None:
    sure, unsure = chain_tree(3, [5, 6], [0.9, 0.8], 1), chain_tree(3, [5, 7], [0.5, 0.4], 2)
    tree = merged([unsure, sure])
    assert tree.tokens.tolist() == [3, 5, 6, 7]
    assert tree.drafter_ids.tolist() == [0, 1, 1, 2]


def test_path_probs_never_exceed_the_parents() -> None:
    tree = chain_tree(0, [1, 2], [0.3, 0.9], 1)
    assert tree.path_probs.tolist() == [1.0, np.float32(0.3), np.float32(0.3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.array([0, VOCAB, 2], np.int32)}, "outside the vocabulary"),
        ({"parents": np.array([-1, 1, 0], np.int16)}, "parent must come before"),
        ({"parents": np.array([0, 0, 0], np.int16)}, "parents\\[0\\]"),
        ({"tokens": np.array([0, 2, 2], np.int32)}, "same token"),
        ({"path_probs": np.array([1, 0.5, 1.5], np.float32)}, "path probability"),
        ({"drafter_ids": np.array([0], np.uint8)}, "differ in length"),
    ],
)
def test_validate_names_what_is_wrong(change: dict[str, object], message: str) -> None:
    fields: dict[str, object] = {
        "tokens": np.array([0, 1, 2], np.int32),
        "parents": np.array([-1, 0, 0], np.int16),
        "path_probs": np.array([1, 0.5, 0.4], np.float32),
        "drafter_ids": np.array([0, 1, 1], np.uint8),
    }
    with pytest.raises(ValueError, match=message):
        DraftTree(**(fields | change)).validate(VOCAB)  # type: ignore[arg-type]


def test_a_tree_over_its_budget_is_refused() -> None:
    root_tree(1).validate(VOCAB, 1)
    with pytest.raises(ValueError, match="2 nodes; expected 1 to 1"):
        chain_tree(1, [2], [0.5], 1).validate(VOCAB, 1)
