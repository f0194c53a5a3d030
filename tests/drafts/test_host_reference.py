"""The compiled host code of drafting gives the same bits as its reference in Python."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specserve.speculation.calibration import new_calibration
from specserve.speculation.cost_model import CostModel
from specserve.speculation.node_selection import select_nodes
from specserve.tree import MAX_NODES, DraftTree, build_tree
from specserve_drafts.recycle.topk_table import REQUEST_RULE, TopKTable
from specserve_drafts.suffix.drafter import new_search
from specserve_kernels.host import COMPILED, HostCode, reference
from specserve_kernels.host.interface import END, WIDTH

pytestmark = pytest.mark.skipif(COMPILED is None, reason="not built")

T = TypeVar("T")
tokens = st.integers(0, 5)


def both(make: Callable[[HostCode], T]) -> tuple[T, T]:
    """Compiled, and in Python."""
    assert COMPILED is not None
    return make(COMPILED), make(reference)


def assert_same(compiled: DraftTree, python: DraftTree) -> None:
    for name in ("tokens", "parents", "path_probs", "drafter_ids"):
        ours, theirs = getattr(compiled, name), getattr(python, name)
        assert ours.dtype == theirs.dtype
        assert ours.tolist() == theirs.tolist(), name


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 12) -> DraftTree:
    """A tree with root 3, whose probabilities have few values, so that some are equal."""
    nodes: dict[tuple[int, int], float] = {}
    path_probs = [1.0]
    for _ in range(draw(st.integers(0, max_nodes - 1))):
        key = (draw(st.integers(0, len(nodes))), draw(tokens))
        if key not in nodes:
            nodes[key] = path_probs[key[0]] * draw(st.sampled_from([0.0, 0.1, 0.5, 0.5, 0.9, 1.0]))
            path_probs.append(nodes[key])
    drafted, parents = [3], [-1]
    for parent, token in nodes:
        drafted.append(token)
        parents.append(parent)
    return build_tree(drafted, parents, path_probs, draw(st.sampled_from([1, 2, 255])))


Step = tuple[bool, list[DraftTree], list[int], int]


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.lists(trees(), min_size=1, max_size=3),
            st.lists(tokens, min_size=1, max_size=4),
            st.integers(1, 20),
        ),
        max_size=12,
    )
)
def test_calibrated_trees(steps: list[Step]) -> None:
    compiled, python = both(new_calibration)
    for sampled, proposed, emitted, budget in steps:
        ours, theirs = (
            DraftTree(*each.merged(sampled, proposed, budget)) for each in (compiled, python)
        )
        assert_same(ours, theirs)
        ours.validate(6, budget)
        for each in (compiled, python):
            each.record_outcome(sampled, proposed, emitted)


@given(st.lists(trees(), max_size=4), st.lists(st.floats(0.1, 9.0), min_size=1, max_size=5))
def test_selected_nodes(proposed: list[DraftTree], prices: list[float]) -> None:
    costs = CostModel({1 + 8 * at: price for at, price in enumerate(prices)})
    named = {str(index): tree for index, tree in enumerate(proposed)}
    ours, theirs = both(lambda host: select_nodes(named, costs, len(proposed), host=host))
    assert ours.keys() == theirs.keys()
    for name, tree in ours.items():
        assert_same(tree, theirs[name])


@given(trees())
def test_built_trees(tree: DraftTree) -> None:
    arguments = (tree.tokens.tolist(), tree.parents.tolist(), tree.path_probs.tolist(), 3)
    assert_same(*both(lambda host: DraftTree(*host.build_tree(*arguments))))


@given(trees(), st.integers(0, 2), st.integers(0, 5), st.integers(-2, 99), st.floats(-1, 2))
def test_invalid_trees(tree: DraftTree, which: int, at: int, value: int, path_prob: float) -> None:
    """Both raise the same error."""
    arrays = (tree.tokens.copy(), tree.parents.copy(), tree.path_probs.copy())
    arrays[which][at % len(tree)] = path_prob if which == 2 else value
    broken = DraftTree(*arrays, tree.drafter_ids)
    said: list[str] = []
    for validate in both(lambda host: host.validate):
        try:
            validate(broken, 6, 8)
            said.append("sound")
        except ValueError as error:
            said.append(str(error))
    assert said[0] == said[1]


Lesson = tuple[int, list[int], DraftTree, list[list[tuple[int, float]]]]
row = st.lists(
    st.tuples(st.integers(0, 9), st.floats(0.0, 4.0, width=16)),
    min_size=WIDTH,
    max_size=WIDTH,
    unique_by=lambda pair: pair[0],
)


@pytest.mark.parametrize("vocab_size", [10, 70_000])
@settings(deadline=None)
@given(
    lessons=st.lists(
        st.tuples(
            st.sampled_from([0, 11, 2**64 - 5]),
            st.lists(tokens, max_size=2),
            trees(max_nodes=3),
            st.lists(row, min_size=3, max_size=3),
        ),
        min_size=1,
        max_size=12,
    ),
    num_rows=st.sampled_from([8, 64, 2**12]),
)
def test_topk_tables(lessons: list[Lesson], num_rows: int, vocab_size: int) -> None:
    compiled, python = both(lambda host: TopKTable(num_rows, vocab_size, host=host))
    own = both(lambda host: TopKTable(64, vocab_size, REQUEST_RULE, host))
    for salt, before, tree, rows in lessons:
        # One node at a time: a difference in one node's rows, see below, may be read for another.
        root = build_tree([int(tree.tokens[0])], [-1], [1.0], 1)
        ranked = sorted(rows[0], key=lambda pair: -pair[1])
        best = np.array([[token for token, _ in ranked]], np.int64)
        logits = np.array([[logit for _, logit in ranked]], np.float32)
        for each in (compiled, python):
            each.learn(salt, before, root, best, logits)
        ours, theirs = compiled._rows, python._rows
        np.testing.assert_array_equal(ours["tags"], theirs["tags"])
        # A probability is stored in steps; the last bit of a logarithm may turn one.
        np.testing.assert_allclose(ours["prob_steps"], theirs["prob_steps"].astype(int), atol=1)
        theirs[:] = ours
        salts, context = (salt, 0) if salt else (0,), [int(tree.tokens[0]), *before]
        for of_text in own:
            of_text.learn_text([*before, *tree.tokens.tolist()])
        np.testing.assert_array_equal(own[0]._rows, own[1]._rows)
        for floor, of_texts in ((0.0, (None, None)), (0.05, (None, None)), (0.0, own)):
            grown = [
                each.grow(salts, context, 8, floor, of_text)
                for each, of_text in zip((compiled, python), of_texts, strict=True)
            ]
            assert_same(*grown)
            grown[0].validate(vocab_size, 8)


def test_topk_tables_after_a_tree() -> None:
    """With contexts along several branches, and rows without probabilities."""
    tree = build_tree([7, 1, 2, 3], [-1, 0, 0, 1], [1.0, 0.9, 0.5, 0.4], 1)
    best = np.arange(16).reshape(4, 4)
    best[2, 3] = -1
    logits = np.zeros((4, 4), np.float32)
    logits[3] = np.nan
    for table in both(lambda host: TopKTable(2**10, 100, host=host)):
        table.learn(5, [8, 9], tree, best, logits)
        assert table.grow([5], [7, 8, 9], 5, 0.0).children(0).keys() == {0, 1, 2, 3}
        assert table.grow([5], [1, 7, 8], 5, 0.0).children(0).keys() == {4, 5, 6, 7}
        assert len(table.grow([5], [int(tree.tokens[2]), 7, 8], 5, 0.0)) == 1
        assert len(table.grow([5], [int(tree.tokens[3])], 5, 0.0)) == 1
        assert table.num_filled == 6


@given(
    logs=st.lists(st.lists(st.one_of(tokens, st.just(END)), max_size=40), min_size=1, max_size=3),
    pieces=st.integers(1, 4),
    sizes=st.sampled_from([(4, 2, 1), (1,), (4, 2), (3,)]),
    recent=st.lists(tokens, min_size=1, max_size=16),
    budget=st.integers(2, MAX_NODES),
)
def test_trees_of_suffixes(
    logs: list[list[int]], pieces: int, sizes: Sequence[int], recent: list[int], budget: int
) -> None:
    searches = both(lambda host: (host.TokenLog, new_search(sizes, 0.02, host)))
    trees = []
    for new_log, search in searches:
        filled = []
        for text in [*logs, recent]:
            log = new_log(sizes)
            for start in range(0, len(text), pieces):
                log.extend(text[start : start + pieces])
            assert len(log) == len(text)
            filled.append(log)
        trees.append(DraftTree(*search.tree(filled, recent, budget)))
    assert_same(*trees)
    trees[0].validate(6, budget)


def test_a_long_log_finds_the_latest(rng: np.random.Generator) -> None:
    """With more n-grams than the hash table has room for at first."""
    text = rng.integers(0, 30, 20_000).tolist()
    searches = both(lambda host: (host.TokenLog((4, 2, 1)), new_search((4, 2, 1), 0.02, host)))
    trees = []
    for log, search in searches:
        log.extend(text)
        grown = [search.tree([log], text[at : at + 9], 24) for at in range(0, 9000, 97)]
        trees.append([DraftTree(*fields) for fields in grown])
    for ours, theirs in zip(*trees, strict=True):
        assert_same(ours, theirs)
        assert len(ours) > 4


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
