"""What tenants get of an engine: the scheduler over a real KV manager, with passes that are counted
instead of run."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from specserve.cache.manager import KVCacheManager
from specserve.config import ScheduleConfig
from specserve.schedule.cost import PassCosts
from specserve.schedule.policy import FixedPolicy
from specserve.schedule.scheduler import Scheduler
from specserve.sequence import Status
from specserve.step import FinishInfo, VerifyResult
from specserve.tree import root_tree
from specserve.types import Request, SamplingParams

BLOCK = 8
FIXED = 4.0  # ms of a pass
FLAT, STEEP = 0.125, 2.0  # ms of a row of it: where passes are large for nothing, and on a CPU


class Machine:
    """Every pass emits a token per decoding sequence, a function of the tokens before it."""

    def __init__(
        self,
        *,
        num_blocks: int = 1000,
        costs: bool = True,
        per_row: float = FLAT,
        prefix_caching: bool = False,
        **schedule: int,
    ) -> None:
        self.kv = KVCacheManager(num_blocks, BLOCK, prefix_caching=prefix_caching)
        config = ScheduleConfig(**schedule)
        self.scheduler = Scheduler(
            self.kv,
            FixedPolicy(1),
            config,
            lambda seq_id: None,
            PassCosts({n: FIXED + per_row * n for n in (1, 8, 64)}) if costs else None,
        )
        self.max_rows, self.max_seqs = config.max_batch_rows, config.max_num_seqs
        self.outputs: dict[str, tuple[int, ...]] = {}
        self.order: list[str] = []  # as they finished
        self.time = 0.0  # of all passes
        self.per_row = per_row
        self.rows: Counter[str] = Counter()  # by tenant
        self._num = 0

    def send(
        self, tenant: str, num_prompt: int, max_tokens: int, *, priority: int = 0, name: str = ""
    ) -> str:
        self._num += 1
        name = name or f"{tenant}{self._num}"
        prompt = tuple((self._num * 31 + at) % 97 for at in range(num_prompt))
        params = SamplingParams(max_tokens=max_tokens, seed=1)
        self.scheduler.add(
            Request(name, prompt, params, priority=priority, cache_salt=tenant, tenant=tenant)
        )
        return name

    def step(self) -> None:
        scheduler = self.scheduler
        plan = scheduler.plan()
        trees, results = {}, {}
        num_rows = 0
        for entry in plan.entries:
            seq = entry.seq
            assert seq.status is Status.RUNNING
            num_rows += entry.num_prefill + entry.num_nodes
            self.rows[seq.request.tenant] += entry.num_prefill + entry.num_nodes
            if entry.num_nodes:
                assert entry.num_prefill == seq.num_pending - 1
                token = sum(seq.tokens) % 97
                trees[seq.id] = root_tree(seq.tokens[-1])
                done = seq.num_output + 1 == seq.request.sampling.max_tokens
                finish = FinishInfo("length") if done else None
                results[seq.id] = VerifyResult((0,), (token,), (0,), 0, finish=finish)
                self.outputs[seq.id] = (*self.outputs.get(seq.id, ()), token)
                if done:
                    self.order.append(seq.id)
            self.kv.commit(seq.table, entry.num_prefill, (0,) if entry.num_nodes else ())
        assert num_rows <= self.max_rows
        assert len(scheduler.running) <= self.max_seqs
        scheduler.commit(plan, trees, results)
        self.kv.check_integrity(seq.table for seq in scheduler.running)
        self.time += FIXED + self.per_row * num_rows

    def run(self, until: Callable[[], bool] = lambda: False, most: int = 20_000) -> int:
        """Steps until it holds, or nothing is left; how many."""
        steps = 0
        while self.scheduler.has_work and not until():
            self.step()
            steps += 1
            assert steps < most, "somebody waits for ever"
        return steps

    def done(self, *names: str) -> Callable[[], bool]:
        return lambda: set(names) <= set(self.order)

    def num_running(self, tenant: str) -> int:
        return sum(seq.request.tenant == tenant for seq in self.scheduler.running)


def flood(machine: Machine, tenant: str, num_prompt: int, max_tokens: int) -> Callable[[], None]:
    """Keeps as many requests waiting as there are places, for ever."""

    def top_up() -> None:
        waiting = sum(seq.request.tenant == tenant for seq in machine.scheduler.waiting)
        for _ in range(machine.max_seqs - waiting):
            machine.send(tenant, num_prompt, max_tokens)

    return top_up


def alone(num_prompt: int, max_tokens: int, **options: Any) -> float:
    machine = Machine(**options)
    machine.send("a", num_prompt, max_tokens)
    machine.run()
    return machine.time


@pytest.mark.parametrize("costs", [True, False])
@pytest.mark.parametrize("prompt", [20, 300])
def test_a_stream_beside_fresh_prompts_has_half_its_share(costs: bool, prompt: int) -> None:
    """A fair share is half of the speed it has alone, so half of that is a quarter."""
    machine = Machine(costs=costs, num_blocks=40_000)
    top_up = flood(machine, "b", 4000, 1)
    top_up()
    for _ in range(10):
        machine.step()
    machine.time = 0.0
    name = machine.send("a", prompt, 80)
    while name not in machine.order:
        top_up()
        machine.step()
    assert machine.time < 4 * alone(prompt, 80)
    assert machine.rows["b"] > 1000, "the other one stands still"


@pytest.mark.parametrize("per_row", [FLAT, STEEP])
def test_a_stream_beside_many_streams_has_half_its_share(per_row: float) -> None:
    """They take turns, more of them in a pass where rows cost little."""
    machine = Machine(per_row=per_row)
    others = [machine.send("b", 10, 1000) for _ in range(40)]
    for _ in range(20):
        machine.step()
    machine.time = 0.0
    machine.rows.clear()
    name = machine.send("a", 20, 80)
    assert machine.run(machine.done(name)) == 80
    assert machine.time < 4 * alone(20, 80, per_row=per_row)
    lengths = [len(machine.outputs[other]) for other in others if other in machine.outputs]
    assert len(lengths) >= 31
    assert machine.rows["b"] > (1200 if per_row == FLAT else 60), "the others stand still"
    running = [seq.num_output for seq in machine.scheduler.running]
    assert max(running) - min(running) < 25, "some of the others stand still"


def test_a_pass_stays_short_while_another_may_come_back() -> None:
    machine = Machine(num_blocks=4000)
    machine.run(machine.done(machine.send("a", 10, 2)))
    machine.send("b", 3000, 1)
    for _ in range(5):
        before = machine.rows["b"]
        machine.step()
        assert machine.rows["b"] - before == 64
    machine.scheduler.tenants._num_planned += 300
    before = machine.rows["b"]
    machine.step()
    assert machine.rows["b"] - before == 256


def test_the_prompts_have_their_share_too() -> None:
    machine = Machine(num_blocks=4000)
    machine.send("a", 10, 5000)
    machine.run(lambda: bool(machine.outputs))
    machine.time = 0.0
    name = machine.send("b", 4000, 1)
    machine.run(machine.done(name))
    assert machine.time < 4 * alone(4000, 1)


def test_places_are_shared_at_once() -> None:
    machine = Machine(max_num_seqs=8)
    for _ in range(20):
        machine.send("b", 10, 300)
    for _ in range(10):
        machine.step()
    assert machine.num_running("b") == 8
    first = machine.send("a", 10, 4)
    assert machine.run(machine.done(first)) == 4, "it had to wait"
    many = [machine.send("a", 10, 300) for _ in range(6)]
    machine.run(lambda: machine.num_running("a") == 4, most=10)
    assert machine.num_running("b") == 4
    before = machine.scheduler.num_preemptions
    machine.run(machine.done(*many))
    assert machine.scheduler.num_preemptions <= before + 2, "they take places from each other"


def test_one_place_is_taken_in_turns() -> None:
    machine = Machine(max_num_seqs=1)
    long, short = machine.send("b", 10, 2000), ""
    for _ in range(40):
        machine.step()
    short = machine.send("a", 10, 20)
    assert machine.run(machine.done(short)) == 20
    rounds = [machine.send("a", 10, 500), machine.send("c", 10, 500)]
    machine.run(machine.done(*rounds))
    assert long not in machine.order
    machine.run()
    assert machine.scheduler.num_preemptions < 3000 / 30


def test_priority_is_a_matter_within_a_tenant() -> None:
    machine = Machine(max_num_seqs=4)
    low = machine.send("b", 10, 60, priority=-1)
    high = [machine.send("b", 10, 60, priority=1000) for _ in range(8)]
    for _ in range(5):
        machine.step()
    mine = machine.send("a", 10, 5, priority=-1000)
    assert machine.run(machine.done(mine)) == 5
    machine.run()
    assert [name for name in machine.order if name != mine][-1] == low
    assert set(machine.order) == {low, mine, *high}


def test_room_is_taken_from_who_has_most() -> None:
    """The pool is full of one tenant's sequences, which do not end."""
    machine = Machine(num_blocks=100, max_num_seqs=16, prefix_caching=True)
    for _ in range(10):
        machine.send("b", 70, 400)
    for _ in range(20):
        machine.step()
    mine = [machine.send("a", 150, 20) for _ in range(2)]
    machine.run(machine.done(*mine), most=60)
    machine.run()


def test_a_giant_does_not_stop_the_others() -> None:
    """One that needs more than its share waits for its turn, and gets it."""
    machine = Machine(num_blocks=100, max_num_seqs=8)
    giants = [machine.send("b", 500, 250), machine.send("b", 500, 250)]
    for _ in range(30):
        machine.step()
    for _ in range(10):
        mine = machine.send("a", 20, 10)
        machine.run(machine.done(mine), most=15)
    top_up = flood(machine, "a", 20, 30)
    for _ in range(4000):
        top_up()
        machine.step()
        if set(giants) <= set(machine.order):
            break
    assert set(giants) <= set(machine.order), "it waits for ever"


requests = st.tuples(
    st.sampled_from("abc"),
    st.integers(1, 60),  # prompt
    st.integers(1, 40),  # tokens
    st.integers(-2, 2),  # priority
    st.integers(0, 20),  # steps before it comes
)


@settings(deadline=None, max_examples=30)
@given(
    load=st.lists(requests, min_size=1, max_size=14),
    num_blocks=st.integers(16, 60),
    max_num_seqs=st.integers(1, 6),
    prefix_caching=st.booleans(),
    costs=st.booleans(),
)
def test_everybody_is_served_and_the_same(
    load: Sequence[tuple[str, int, int, int, int]],
    num_blocks: int,
    max_num_seqs: int,
    prefix_caching: bool,
    costs: bool,
) -> None:
    """Whatever is preempted or cut into pieces: all end, with the tokens they have alone."""
    machine = Machine(
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_batch_rows=16,
        prefix_caching=prefix_caching,
        costs=costs,
    )
    names = []
    for tenant, num_prompt, max_tokens, priority, steps in load:
        for _ in range(steps):
            machine.step()
        names.append(machine.send(tenant, num_prompt, max_tokens, priority=priority))
    machine.run()
    assert set(machine.order) == set(names)
    assert machine.kv.pool.num_available == num_blocks
    for number, (_, num_prompt, max_tokens, _, _) in enumerate(load, start=1):
        tokens = [(number * 31 + at) % 97 for at in range(num_prompt)]
        for _ in range(max_tokens):
            tokens.append(sum(tokens) % 97)
        assert machine.outputs[names[number - 1]] == tuple(tokens[num_prompt:])


@settings(deadline=None, max_examples=30)
@given(
    load=st.lists(requests, min_size=1, max_size=12),
    max_num_seqs=st.integers(2, 6),
    name=st.sampled_from(["", "a"]),
)
def test_one_tenant_goes_by_priority_then_age(
    load: Sequence[tuple[str, int, int, int, int]], max_num_seqs: int, name: str
) -> None:
    """Its places are filled in this order, as early as can be, and its chunks fill the pass."""
    machine = Machine(max_num_seqs=max_num_seqs, max_batch_rows=16)
    for _, num_prompt, max_tokens, priority, _ in load:
        machine.send(name, num_prompt, max_tokens, priority=priority)
    scheduler = machine.scheduler
    ranks = {seq.id: rank for rank, seq in enumerate((*scheduler.running, *scheduler.waiting))}
    while scheduler.has_work:
        before = machine.rows[name]
        machine.step()
        known = [ranks[seq.id] for seq in scheduler.running]
        assert known == sorted(known)
        assert all(rank < ranks[seq.id] for rank in known for seq in scheduler.waiting)
        prefilling = any(seq.num_pending > 1 for seq in scheduler.running)
        assert not prefilling or machine.rows[name] - before == 16
    assert scheduler.num_preemptions == 0
