"""The cost model, the selection of nodes, and calibrated acceptance rates."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specserve.speculation.calibration import new_calibration
from specserve.speculation.cost_model import CostModel
from specserve.speculation.node_selection import select_nodes
from specserve.tree import MAX_NODES, DraftTree, build_tree, chain_tree
from specserve_kernels.host.reference import Calibration

FLAT = CostModel({1: 1.0, 64: 1.0})
STEEP = CostModel({1: 1.0, 2: 2.0, 4: 4.0})


def measured(samples: dict[int, float], context: int, fixed: float, per_row: float) -> CostModel:
    costs = CostModel()
    assert not costs.is_measured
    costs.measure(samples, context, fixed, per_row)
    return costs


def select(trees: dict[str, DraftTree], num_rows: int, costs: CostModel) -> dict[str, DraftTree]:
    return select_nodes(trees, costs, num_rows)


def chain(*chances: float) -> DraftTree:
    return chain_tree(7, list(range(len(chances))), np.cumprod(chances).tolist(), 1)


def test_costs_are_interpolated_and_never_decrease() -> None:
    costs = CostModel({1: 2.0, 2: 1.0, 4: 4.0, 8: 6.0})
    assert costs.seconds(1, 4) == pytest.approx([2.0, 2.0, 3.0, 4.0])
    assert costs.seconds(6, 10)[::2] == pytest.approx([5.0, 6.0, 6.0 + 2 * 4 / 6])
    assert CostModel({4: 2.0}).seconds(1, 8) == [2.0, 2.0, 2.0, 2.0, 2.5, 3.0, 3.5, 4.0]


def test_costs_follow_the_passes_of_a_run() -> None:
    costs = measured({1: 1.0, 4: 1.5, 8: 2.0}, 100, 0.001, 0.0)
    costs.record_host(0.5)
    for step in range(3200):
        expected = 2.0 + (3.0 if step % 50 else 30.0)  # now and then a pass is interrupted
        costs.record_pass(4, 1100.0, expected)
    assert costs.seconds(4, 4, 1100.0)[0] - 0.5 == pytest.approx(5.0, rel=0.05)


def test_sizes_that_are_not_seen_are_scaled_too() -> None:
    costs = CostModel({1: 1.0, 8: 2.0})
    for _ in range(320):
        costs.record_pass(1, 0.0, 3.0)
    assert costs.seconds(1, 8)[::7] == pytest.approx([3.0, 6.0], rel=0.02)


def test_context_adds_to_the_cost() -> None:
    costs = measured({1: 1.0, 8: 2.0}, 100, 0.002, 0.001)
    assert costs.seconds(1, 8)[::7] == pytest.approx([1.0, 2.0])
    assert costs.seconds(1, 8, 100)[::7] == pytest.approx([1.0, 2.0])
    assert costs.seconds(1, 8, 1100)[::7] == pytest.approx([1.0 + 2 + 1, 2.0 + 2 + 8])
    # A node that is worth its row after little text is not after much.
    trees = {"a": chain(0.25)}
    assert len(select_nodes(trees, costs, 1, 100)["a"]) == 2
    assert len(select_nodes(trees, costs, 1, 1100)["a"]) == 1


def test_free_nodes_are_all_kept_and_expensive_ones_are_not() -> None:
    trees = {"a": chain(0.9, 0.5, 0.01), "b": chain(0.2)}
    assert {k: len(t) for k, t in select(trees, 2, FLAT).items()} == {"a": 4, "b": 2}
    assert {k: len(t) for k, t in select(trees, 2, STEEP).items()} == {"a": 1, "b": 1}
    # A second row for half the price of the first: worth it for the likely node alone.
    costs = CostModel({2: 2.0, 3: 2.5, 4: 3.0, 8: 5.0})
    assert {k: len(t) for k, t in select(trees, 2, costs).items()} == {"a": 2, "b": 1}
    assert select({}, 3, FLAT) == {}


def test_the_time_of_the_host_is_added_to_every_cost() -> None:
    """What a step takes anyway makes every node cheaper beside it."""
    trees = {"a": chain(0.4, 0.9)}
    costs = CostModel({1: 1.0, 2: 1.5, 4: 2.5})
    assert len(select(trees, 1, costs)["a"]) == 1
    for seconds in (1.0, *[3.0] * 200):
        costs.record_host(seconds)
    assert costs.seconds(1, 2) == pytest.approx([4.0, 4.5], rel=0.01)
    assert len(select(trees, 1, costs)["a"]) == 3


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 9), st.floats(0.0, 1.0)), max_size=9),
        min_size=1,
        max_size=3,
    ),
    st.lists(st.floats(0.1, 9.0), min_size=1, max_size=5),
    st.integers(0, 70),
)
def test_no_other_number_of_nodes_gives_more_tokens_per_second(
    drafts: list[list[tuple[int, float]]], prices: list[float], others: int
) -> None:
    trees = {}
    for index, nodes in enumerate(drafts):
        parents = [-1, *(min(parent, at) for at, (parent, _) in enumerate(nodes))]
        tokens, probs = [0, *range(1, len(nodes) + 1)], [1.0, *(prob for _, prob in nodes)]
        trees[str(index)] = build_tree(tokens, parents, probs, 1)
    costs = CostModel({1 + 8 * at: price for at, price in enumerate(prices)})
    rows = len(trees) + others
    kept = select(trees, rows, costs)
    ranked = sorted((float(x) for t in trees.values() for x in t.path_probs[1:]), reverse=True)
    seconds = costs.seconds(rows, rows + len(ranked))
    rates = (len(trees) + np.cumsum([0.0, *ranked])) / seconds
    for seq_id, tree in kept.items():
        tree.validate(100)
        assert set(tree.tokens.tolist()) <= set(trees[seq_id].tokens.tolist())
    total = sum(float(tree.path_probs.sum()) for tree in kept.values())
    num_drafted = sum(len(tree) - 1 for tree in kept.values())
    rate = total / seconds[num_drafted]
    assert rate == pytest.approx(rates.max(), rel=1e-5)


def rates(calibration: Calibration, sampled: bool, tree: DraftTree) -> list[float]:
    return list(DraftTree(*calibration.merged(sampled, [tree], MAX_NODES)).acceptance_probs)


def test_acceptance_rates_follow_what_is_emitted() -> None:
    calibration = new_calibration()
    tree = chain(0.9, 0.9)
    before = rates(calibration, False, tree)
    assert before[0] == 1.0
    for _ in range(60):
        calibration.record_outcome(False, [tree], [0, 1, 5])  # both nodes are accepted
        calibration.record_outcome(True, [tree], [3])  # neither is
    after = rates(calibration, False, tree)
    assert after[1] > 0.8
    assert after[2] > 0.8
    assert rates(calibration, True, tree)[1] < 0.15, "sampled requests are counted apart"


def test_a_node_whose_parent_was_rejected_is_not_counted() -> None:
    calibration = new_calibration()
    tree = chain(0.9, 0.7)
    before = rates(calibration, False, tree)
    for _ in range(9):
        calibration.record_outcome(False, [tree], [4])
    after = rates(calibration, False, tree)
    assert after[1] < before[1]
    # The drafter's estimates count for less; the second node has no observations of its own.
    assert after[1] < after[2] < before[2]
