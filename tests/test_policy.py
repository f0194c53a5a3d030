"""Who is drafted for: budgets, and whom the drafters' time is worth."""

import itertools

import pytest

from specserve.cache.table import BlockTable
from specserve.sequence import SequenceState
from specserve.speculation.cost_model import PassCosts
from specserve.speculation.policy import FixedPolicy, MeasuredPolicy
from specserve.step import VerifyResult
from specserve.tree import DraftTree, chain_tree
from specserve.types import Request, SamplingParams, SpeculationParams

COSTS = PassCosts({1: 1.0, 2: 1.0, 4: 1.2, 8: 2.0})


def sequence(
    name: str = "a", *, max_tokens: int = 100, max_nodes: int | None = None
) -> SequenceState:
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens)
    speculation = SpeculationParams(max_nodes=max_nodes)
    return SequenceState(Request(name, (7,), sampling, speculation), [7], BlockTable(16))


NOTHING = VerifyResult((0,), (5,), (0,), 0)


def tree(num_nodes: int, expected: float) -> DraftTree:
    """Of nodes that are good for so many tokens together."""
    return chain_tree(7, list(range(num_nodes)), [expected / 3] * num_nodes, 1)


def passes(
    policy: MeasuredPolicy,
    seqs: list[SequenceState],
    expected: dict[str, float],
    seconds: float,
    n: int,
) -> list[list[bool]]:
    """Who is drafted for in each of n passes, each drafted sequence costing `seconds`."""
    asked = []
    for _ in range(n):
        budgets = policy.budgets(seqs, 64)
        drafted = [budget > 1 for budget in budgets]
        trees = {
            seq.id: tree(3 * ask, expected[seq.id]) for seq, ask in zip(seqs, drafted, strict=True)
        }
        results = dict.fromkeys(trees, NOTHING)
        policy.settle(trees, results, seconds * sum(drafted))
        asked.append(drafted)
    return asked


def test_rows_are_shared_out_and_what_ends_a_request_is_not_drafted_beyond() -> None:
    policy = FixedPolicy(8)
    seqs = [sequence("a"), sequence("b", max_nodes=3), sequence("c", max_tokens=2)]
    assert policy.budgets(seqs, 64) == [8, 3, 2]
    assert policy.budgets(seqs, 6) == [3, 3, 2]
    assert policy.budgets(seqs, 2) == [1, 1, 1]
    assert policy.budgets([], 8) == []


def test_drafts_that_bring_more_than_their_time_go_on() -> None:
    asked = passes(MeasuredPolicy(4, COSTS), [sequence()], {"a": 2}, 0.1, 200)
    assert all(map(all, asked))


@pytest.mark.parametrize("seconds", [0.1, 0.5])
def test_drafts_that_bring_nothing_are_tried_ever_more_seldom(seconds: float) -> None:
    asked = [
        each for (each,) in passes(MeasuredPolicy(4, COSTS), [sequence()], {"a": 0}, seconds, 300)
    ]
    assert asked[0]
    tries = [index for index, each in enumerate(asked) if each][-5:]
    gaps = [after - before for before, after in itertools.pairwise(tries)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == 17
    assert sum(asked) < 80


def test_a_sequence_that_comes_round_is_drafted_for_again() -> None:
    policy, seq = MeasuredPolicy(4, COSTS), sequence()
    passes(policy, [seq], {"a": 0}, 0.1, 100)
    asked = [each for (each,) in passes(policy, [seq], {"a": 3}, 0.1, 200)]
    assert all(asked[100:])


def test_every_sequence_has_its_own_record() -> None:
    policy = MeasuredPolicy(4, COSTS)
    seqs = [sequence("good"), sequence("bad")]
    asked = passes(policy, seqs, {"good": 3, "bad": 0}, 0.02, 200)[100:]
    good, bad = (sum(each[index] for each in asked) for index in range(2))
    assert good == 100
    assert bad < 20
    policy.forget("bad")
    assert policy.budgets(seqs, 64) == [4, 4], "a new request of that name is given a chance"


def test_the_same_draft_is_dear_where_many_wait_for_it() -> None:
    """One half token a pass for a tenth of a pass: worth it alone, not while 16 others wait."""
    flat = PassCosts({1: 1.0, 64: 1.0})
    seqs = [sequence(f"s{index}") for index in range(16)]
    shares = {}
    for count in (1, 16):
        policy = MeasuredPolicy(4, flat)
        drafted = 0
        for index in range(200):
            expected = {seq.id: 0.5 for seq in seqs}
            (asked,) = passes(policy, seqs[:count], expected, 0.1, 1)
            drafted += sum(asked) if index >= 100 else 0
        shares[count] = drafted / (100 * count)
    assert shares[1] == 1.0
    assert shares[16] < 0.2
