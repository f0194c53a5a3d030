"""Which drafters are asked: those that earn their time, others now and then."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from specserve.batch import ModelOutput
from specserve.cache.storage import KVSpec
from specserve.cache.table import BlockTable
from specserve.sequence import SequenceState, SequenceView
from specserve.speculation.compose import ComposedDrafter
from specserve.speculation.drafter import DraftContext, DraftOptions, Feedback
from specserve.speculation.drafter_gate import Worth
from specserve.step import EntryView
from specserve.tree import DraftTree, root_tree
from specserve.types import Request, SamplingParams, SpeculationParams

STEP = 0.004  # seconds, for two tokens


def asked(
    worth: Worth,
    steps: int,
    seconds: float,
    gain: float,
    *,
    sampled: bool = False,
    promised: float = 1.0,
) -> int:
    """Steps of so many in which a drafter that takes and gives so much is asked."""
    count = 0
    for _ in range(steps):
        worth.begin_step()
        if worth.asks("head", sampled, promised):
            count += 1
            worth.took("head", sampled, seconds)
            worth.judge("head", sampled, promised, gain)
        worth.end_step(STEP, 2)
    return count


def test_a_drafter_that_earns_its_time_is_always_asked() -> None:
    assert asked(Worth(), 2000, 0.0005, 0.5) == 2000


def test_one_that_does_not_is_tried_ever_more_rarely() -> None:
    worth = Worth()
    first, later = asked(worth, 1000, 0.0005, 0.2), asked(worth, 10_000, 0.0005, 0.2)
    assert 32 <= first <= 130
    assert 0 < later <= 10_000 * 0.03


def test_it_is_back_once_the_text_suits_it() -> None:
    worth = Worth()
    asked(worth, 5000, 0.0005, 0.0)
    asked(worth, 4200, 0.0005, 0.5)  # the longest pause is over
    assert asked(worth, 500, 0.0005, 0.5) == 500


def test_following_the_text_is_part_of_the_price() -> None:
    for following, expected in ((0.0, 200), (0.001, 32)):
        worth = Worth()
        worth.followed("head", False, following)
        assert asked(worth, 200, 0.0005, 0.5) in (expected, expected + 32)


def test_sampled_requests_are_judged_apart() -> None:
    worth = Worth()
    assert asked(worth, 200, 0.0005, 0.0) < 200
    assert asked(worth, 200, 0.0005, 0.5, sampled=True) == 200


def test_trees_that_promise_much_are_judged_apart() -> None:
    """A head is worth asking where the others have little to say, and followed for that."""
    worth = Worth()
    for _ in range(3):
        assert asked(worth, 100, 0.0005, 0.5, promised=1.2) == 100
        assert asked(worth, 100, 0.0005, 0.0, promised=3.5) < 10
    assert worth.follows("head", False)
    worth = Worth()
    for promised in (1.2, 2.0, 2.5, 3.5):
        asked(worth, 25, 0.0005, -0.5, promised=promised)
    assert not worth.follows("head", False)


def test_what_takes_no_time_is_not_judged() -> None:
    worth = Worth()
    assert not worth.is_dear("head", False), "it was never asked"
    for seconds, dear in ((STEP / 100, False), (STEP / 10, True)):
        for _ in range(100):
            worth.took("head", False, seconds)
            worth.end_step(STEP, 2)
        assert worth.is_dear("head", False) == dear


def test_nothing_is_decided_before_a_trial() -> None:
    assert asked(Worth(), 31, 1.0, 400.0) == 31  # little more than half of what it takes
    assert asked(Worth(), 31, 1.0, 0.0) == 8, "nowhere near"


class Listener:
    """A drafter that proposes nothing and remembers what it was told."""

    Options: ClassVar[type[DraftOptions]] = DraftOptions
    needs_topk = 0

    def __init__(self, *aux_layers: int) -> None:
        self.aux_layers = aux_layers
        self.asked: list[str] = []
        self.heard: list[str] = []

    def kv_spec(self, dtype: torch.dtype) -> KVSpec | None:
        return None

    def bind(self, context: DraftContext) -> None: ...

    def propose(self, seqs: Sequence[SequenceView], budgets: Sequence[int]) -> list[DraftTree]:
        self.asked += [seq.id for seq in seqs]
        return [root_tree(seq.tokens[-1]) for seq in seqs]

    def observe(self, feedback: Feedback) -> None:
        self.heard += [entry.seq.id for entry in feedback.entries]

    def forget(self, seq_id: str) -> None: ...


def test_a_paused_head_does_not_follow_new_requests() -> None:
    worth, table, head = Worth(), Listener(), Listener(0, 1)
    drafters = ComposedDrafter({"table": table, "head": head}, 10, worth)

    def passes(name: str, count: int, *, wanted: tuple[str, ...] | None = None) -> None:
        request = Request(
            name, (7,), SamplingParams(temperature=0.0), SpeculationParams(drafters=wanted)
        )
        seq = SequenceView(SequenceState(request, [7], BlockTable(16)))
        heard = Feedback([EntryView(seq, 1, 0)], {}, {}, ModelOutput(torch.empty(0, 10)))
        for _ in range(count):
            drafters.propose([seq], [8])
            drafters.observe(heard)

    passes("before", 1)
    for promised in (1.0, 2.0, 2.5, 3.5):
        while worth.asks("head", False, promised):
            worth.took("head", False, STEP)
            worth.end_step(STEP, 2)
            worth.judge("head", False, promised, 0.0)
    passes("before", 1)
    passes("new", 1)
    passes("by name", 1, wanted=("head",))
    assert table.heard == ["before", "before", "new", "by name"]
    assert head.heard == ["before", "before", "by name"], "what it follows it goes on with"
    assert head.asked == ["before", "by name"]
    passes("new", 140)
    assert worth.follows("head", False), "the pause is over"
    assert "new" not in head.asked, "it missed the beginning"
    passes("later", 1)
    assert head.asked[-1] == head.heard[-1] == "later"
