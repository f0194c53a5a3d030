"""The speculation controller: sequences that are drafted for, and drafters that are used."""

import itertools

import pytest
import torch

from specserve.batch import ModelOutput
from specserve.cache.table import BlockTable
from specserve.sequence import SequenceState, SequenceView
from specserve.speculation.compose import ComposedDrafter
from specserve.speculation.controller import SpeculationController
from specserve.speculation.cost_model import CostModel
from specserve.speculation.drafter import Feedback, NoModelDrafter
from specserve.step import Entry, StepPlan, VerifyResult
from specserve.tree import DraftTree, chain_tree, root_tree
from specserve.types import Request, SamplingParams, SpeculationParams

COSTS = {1: 1.0, 2: 1.0, 4: 1.2, 8: 2.0}  # seconds by rows
EMITTED_ONE = VerifyResult((0,), (5,), (0,), 0)


def sequence(
    name: str = "a", *, max_tokens: int = 100, max_nodes: int | None = None
) -> SequenceState:
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens)
    speculation = SpeculationParams(max_nodes=max_nodes)
    return SequenceState(Request(name, (7,), sampling, speculation), [7], BlockTable(16))


def adaptive(costs: dict[int, float] = COSTS, max_nodes: int = 4) -> SpeculationController:
    return SpeculationController(max_nodes, CostModel(costs))


def tree(num_nodes: int, expected: float) -> DraftTree:
    """A chain whose drafted nodes yield `expected` tokens together."""
    return chain_tree(7, list(range(num_nodes)), [expected / 3] * num_nodes, 1)


def run(
    controller: SpeculationController,
    seqs: list[SequenceState],
    expected: dict[str, float],
    seconds: float,
    num_steps: int,
) -> list[list[bool]]:
    """Per step, which sequences were drafted for; drafting takes `seconds` per sequence.

    The forward pass of a step takes as long as the cost model expects of it.
    """
    spent, found = {"forward": 0.0}, []
    for _ in range(num_steps):
        budgets = controller.budgets(seqs, 64)
        drafted = [budget > 1 for budget in budgets]
        trees = {
            seq.id: tree(3 * draft, expected[seq.id])
            for seq, draft in zip(seqs, drafted, strict=True)
        }
        num_rows = sum(map(len, trees.values()))
        assert controller._costs is not None
        spent["forward"] += controller._costs.seconds(num_rows, num_rows)[0]
        plan = StepPlan(tuple(Entry(seq, 0, 4) for seq in seqs))
        results = dict.fromkeys(trees, EMITTED_ONE)
        controller.record_step(plan, trees, results, spent, seconds * sum(drafted))
        found.append(drafted)
    return found


def test_rows_are_divided_and_no_tree_is_larger_than_useful() -> None:
    controller = SpeculationController(8, None)
    seqs = [sequence("a"), sequence("b", max_nodes=3), sequence("c", max_tokens=2)]
    assert controller.budgets(seqs, 64) == [8, 3, 2]
    assert controller.budgets(seqs, 6) == [3, 3, 2]
    assert controller.budgets(seqs, 2) == [1, 1, 1]
    assert controller.budgets([], 8) == []


def test_drafting_that_gains_more_than_it_costs_continues() -> None:
    assert all(map(all, run(adaptive(), [sequence()], {"a": 2}, 0.1, 200)))


@pytest.mark.parametrize("seconds", [0.1, 0.5])
def test_drafting_that_gains_nothing_is_tried_less_and_less_often(seconds: float) -> None:
    drafted = [each for (each,) in run(adaptive(), [sequence()], {"a": 0}, seconds, 300)]
    assert drafted[0]
    tries = [index for index, each in enumerate(drafted) if each][-5:]
    gaps = [after - before for before, after in itertools.pairwise(tries)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == 17
    assert sum(drafted) < 80


def test_a_sequence_whose_drafts_become_good_is_drafted_for_again() -> None:
    controller, seq = adaptive(), sequence()
    run(controller, [seq], {"a": 0}, 0.1, 100)
    drafted = [each for (each,) in run(controller, [seq], {"a": 3}, 0.1, 200)]
    assert all(drafted[100:])


def test_every_sequence_has_its_own_record() -> None:
    controller = adaptive()
    seqs = [sequence("good"), sequence("bad")]
    drafted = run(controller, seqs, {"good": 3, "bad": 0}, 0.02, 200)[100:]
    good, bad = (sum(each[index] for each in drafted) for index in range(2))
    assert good == 100
    assert bad < 20
    controller.forget("bad")
    assert controller.budgets(seqs, 64) == [4, 4], "a new request of that name is drafted for"


def test_the_same_draft_does_not_pay_in_a_large_batch() -> None:
    """Half a token per step for a tenth of a step: it pays alone, but not while 15 others wait."""
    seqs = [sequence(f"s{index}") for index in range(16)]
    shares = {}
    for count in (1, 16):
        controller = adaptive({1: 1.0, 64: 1.0})
        expected = {seq.id: 0.5 for seq in seqs}
        drafted = run(controller, seqs[:count], expected, 0.1, 200)[100:]
        shares[count] = sum(map(sum, drafted)) / (100 * count)
    assert shares[1] == 1.0
    assert shares[16] < 0.2


STEP_S = 0.004  # of a step that emits two tokens
EMITTED_TWO = VerifyResult((0,), (5, 6), (0, 0), 1)


class Gate:
    """A controller that sees steps of STEP_S, in which a drafter "head" is used where it pays."""

    def __init__(self) -> None:
        self.controller = adaptive({1: STEP_S})
        self._seq, self._spent = sequence(), {"forward": 0.0}

    def step(self) -> None:
        self._spent["forward"] += STEP_S
        self.controller.record_step(
            StepPlan((Entry(self._seq, 0, 1),)),
            {"a": root_tree(7)},
            {"a": EMITTED_TWO},
            self._spent,
            0.0,
        )
        self.controller.budgets([self._seq], 0)

    def count_uses(
        self,
        num_steps: int,
        seconds: float,
        gain: float,
        *,
        sampled: bool = False,
    ) -> int:
        """In how many of the steps the drafter is used, which takes and gains so much."""
        count = 0
        for _ in range(num_steps):
            if not self.controller.is_paused("head", sampled):
                count += 1
                self.controller.record_draft_time("head", sampled, seconds)
                self.controller.record_gain("head", sampled, gain)
            self.step()
        return count


def test_a_drafter_that_pays_is_always_used() -> None:
    assert Gate().count_uses(2000, 0.0005, 0.5) == 2000


def test_a_drafter_that_does_not_pay_is_tried_less_and_less_often() -> None:
    gate = Gate()
    first, later = gate.count_uses(1000, 0.0005, 0.2), gate.count_uses(10_000, 0.0005, 0.2)
    assert 32 <= first <= 130
    assert 0 < later <= 10_000 * 0.03


def test_a_drafter_that_pays_again_is_used_again() -> None:
    gate = Gate()
    gate.count_uses(5000, 0.0005, 0.0)
    gate.count_uses(4200, 0.0005, 0.5)  # the longest pause is over
    assert gate.count_uses(500, 0.0005, 0.5) == 500


def test_observing_is_a_part_of_the_cost() -> None:
    for seconds, expected in ((0.0, 200), (0.001, 32)):
        gate = Gate()
        gate.controller.record_observe_time("head", False, seconds)
        assert gate.count_uses(200, 0.0005, 0.5) in (expected, expected + 32)


def test_sampled_requests_have_records_of_their_own() -> None:
    gate = Gate()
    assert gate.count_uses(200, 0.0005, 0.0) < 200
    assert gate.count_uses(200, 0.0005, 0.5, sampled=True) == 200


def test_a_drafter_that_takes_no_time_is_not_expensive() -> None:
    gate = Gate()
    assert not gate.controller.is_expensive("head", False), "it was never used"
    for seconds, expensive in ((STEP_S / 100, False), (STEP_S / 10, True)):
        for _ in range(100):
            gate.controller.record_draft_time("head", False, seconds)
            gate.step()
        assert gate.controller.is_expensive("head", False) == expensive


def test_nothing_is_decided_before_a_trial() -> None:
    gate = Gate()
    gate.step()
    assert gate.count_uses(31, 1.0, 400.0) == 31, "it gains little more than half of its cost"
    gate = Gate()
    gate.step()
    assert gate.count_uses(31, 1.0, 0.0) == 8, "it gains nothing"


class Listener(NoModelDrafter):
    """A drafter that proposes nothing and remembers which sequences it was called for."""

    def __init__(self, *aux_layers: int) -> None:
        self.aux_layers = aux_layers
        self.proposed_for: list[str] = []
        self.observed: list[str] = []

    def propose_tree(self, seq: SequenceView, budget: int) -> DraftTree:
        self.proposed_for.append(seq.id)
        return super().propose_tree(seq, budget)

    def observe(self, feedback: Feedback) -> None:
        self.observed += [seq.id for seq in feedback.seqs]


def test_a_paused_drafter_with_hidden_states_skips_new_requests() -> None:
    gate, table, head = Gate(), Listener(), Listener(0, 1)
    controller = gate.controller
    drafters = ComposedDrafter({"table": table, "head": head}, 10, controller)

    def steps(name: str, count: int, *, wanted: tuple[str, ...] | None = None) -> None:
        request = Request(
            name, (7,), SamplingParams(temperature=0.0), SpeculationParams(drafters=wanted)
        )
        seq = SequenceView(SequenceState(request, [7], BlockTable(16)))
        feedback = Feedback((seq,), {}, {}, ModelOutput(torch.empty(0, 10)), (), {})
        for _ in range(count):
            drafters.propose([seq], [8])
            drafters.observe(feedback)
            controller.budgets([sequence()], 0)

    steps("before", 1)
    while not controller.is_paused("head", False):
        controller.record_draft_time("head", False, STEP_S)
        gate.step()
        controller.record_gain("head", False, 0.0)
    steps("before", 1)
    steps("new", 1)
    steps("by name", 1, wanted=("head",))
    assert table.observed == ["before", "before", "new", "by name"]
    assert head.observed == ["before", "before", "by name"], "it goes on with what it observed"
    assert head.proposed_for == ["before", "by name"]
    steps("new", 140)
    assert not controller.is_paused("head", False), "the pause is over"
    assert "new" not in head.proposed_for, "it missed the beginning"
    steps("later", 1)
    assert head.proposed_for[-1] == head.observed[-1] == "later"
