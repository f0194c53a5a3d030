"""What tenants get of an engine: the scheduler over a real KV manager, with simulated passes."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from specserve.cache.manager import KVCacheManager
from specserve.config import ScheduleConfig
from specserve.schedule.scheduler import Scheduler
from specserve.sequence import Status
from specserve.speculation.controller import SpeculationController
from specserve.speculation.cost_model import CostModel
from specserve.step import FinishInfo, VerifyResult
from specserve.tree import root_tree
from specserve.types import Request, SamplingParams

BLOCK = 8
FIXED = 4.0  # ms of a pass
FLAT, STEEP = 0.125, 2.0  # ms per row, if rows cost little and if they cost much


class SimulatedEngine:
    """A pass advances the clock and emits a token per decoding sequence.

    The token is a function of the tokens before it.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 1000,
        costs: bool = True,
        per_row: float = FLAT,
        draw: Mapping[str, float] = MappingProxyType({}),
        score: Mapping[str, float] = MappingProxyType({}),
        prefix_caching: bool = False,
        **schedule: int,
    ) -> None:
        self.kv = KVCacheManager(num_blocks, BLOCK, prefix_caching=prefix_caching)
        config = ScheduleConfig(**schedule)
        self.scheduler = Scheduler(
            self.kv,
            SpeculationController(1, None),
            config,
            lambda seq_id: None,
            CostModel({n: FIXED + per_row * n for n in (1, 8, 64)}) if costs else None,
        )
        self.max_rows, self.max_seqs = config.max_num_batched_tokens, config.max_num_seqs
        self.outputs: dict[str, tuple[int, ...]] = {}
        self.order: list[str] = []  # as they finished
        self.time = 0.0  # of all passes
        self.per_row = per_row
        self.draw = draw  # ms to draw a token, by tenant
        self.score = score  # ms to compute the logprobs of a prompt row, by tenant
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
        num_drawn = Counter(entry.seq.request.tenant for entry in plan.decoding)
        draws = {name: (self.draw.get(name, 0.0) * num, num) for name, num in num_drawn.items()}
        prompt_rows = Counter[str]()
        for entry in plan.entries:
            prompt_rows[entry.seq.request.tenant] += entry.num_prefill
        scoring = {name: (self.score.get(name, 0.0) * n, n) for name, n in prompt_rows.items() if n}
        scheduler.tenants.record_draws(draws, scoring)
        scheduler.commit(plan, trees, results, {})
        self.kv.check_integrity(seq.table for seq in scheduler.running)
        self.time += FIXED + self.per_row * num_rows + sum(spent for spent, _ in draws.values())
        self.time += sum(spent for spent, _ in scoring.values())

    def run(self, until: Callable[[], bool] = lambda: False, most: int = 20_000) -> int:
        """Step until the condition holds or nothing is left; return the number of steps."""
        steps = 0
        while self.scheduler.has_work and not until():
            self.step()
            steps += 1
            assert steps < most, "a request never ends"
        return steps

    def done(self, *names: str) -> Callable[[], bool]:
        return lambda: set(names) <= set(self.order)

    def num_running(self, tenant: str) -> int:
        return sum(seq.request.tenant == tenant for seq in self.scheduler.running)


def flood(
    engine: SimulatedEngine, tenant: str, num_prompt: int, max_tokens: int
) -> Callable[[], None]:
    """A function that fills the queue up to as many waiting requests as there are places."""

    def top_up() -> None:
        waiting = sum(seq.request.tenant == tenant for seq in engine.scheduler.waiting)
        for _ in range(engine.max_seqs - waiting):
            engine.send(tenant, num_prompt, max_tokens)

    return top_up


def alone(num_prompt: int, max_tokens: int, **options: Any) -> float:
    engine = SimulatedEngine(**options)
    engine.send("a", num_prompt, max_tokens)
    engine.run()
    return engine.time


@pytest.mark.parametrize("costs", [True, False])
@pytest.mark.parametrize("prompt", [20, 300])
def test_a_stream_beside_long_prompts_gets_half_of_its_share(costs: bool, prompt: int) -> None:
    """A fair share is half of the speed it has alone, so half of that is a quarter."""
    engine = SimulatedEngine(costs=costs, num_blocks=40_000)
    top_up = flood(engine, "b", 4000, 1)
    top_up()
    for _ in range(10):
        engine.step()
    engine.time = 0.0
    name = engine.send("a", prompt, 80)
    while name not in engine.order:
        top_up()
        engine.step()
    assert engine.time < 4 * alone(prompt, 80)
    assert engine.rows["b"] > 1000, "the other tenant makes no progress"


@pytest.mark.parametrize("per_row", [FLAT, STEEP])
def test_a_stream_beside_many_streams_gets_half_of_its_share(per_row: float) -> None:
    """The many take turns to decode, more of them in a pass if rows cost little."""
    engine = SimulatedEngine(per_row=per_row)
    others = [engine.send("b", 10, 1000) for _ in range(40)]
    for _ in range(20):
        engine.step()
    engine.time = 0.0
    engine.rows.clear()
    name = engine.send("a", 20, 80)
    assert engine.run(engine.done(name)) == 80
    assert engine.time < 4 * alone(20, 80, per_row=per_row)
    lengths = [len(engine.outputs[other]) for other in others if other in engine.outputs]
    assert len(lengths) >= 31
    assert engine.rows["b"] > (1200 if per_row == FLAT else 60), (
        "the other tenant makes no progress"
    )
    running = [seq.num_output for seq in engine.scheduler.running]
    assert max(running) - min(running) < 25, "some sequences of the other tenant make no progress"


@pytest.mark.parametrize("draw", [5.0, 1000.0])
def test_a_stream_beside_expensive_sampling_gets_half_of_its_share(draw: float) -> None:
    """The time to draw a token, which depends on the sampling parameters, counts too."""
    engine = SimulatedEngine(draw={"b": draw})
    others = [engine.send("b", 10, 1000) for _ in range(40)]
    for _ in range(20):
        engine.step()
    engine.time = 0.0
    before = {other: len(engine.outputs.get(other, ())) for other in others}
    name = engine.send("a", 20, 1000)
    engine.run(engine.done(name))
    # The first passes of both use what was saved up, and what is not known yet.
    assert engine.time < 4 * alone(20, 1000) + 40 * draw
    progress = [len(engine.outputs.get(other, ())) - before[other] for other in others[:31]]
    assert sum(progress) * draw > 0.3 * engine.time, "the other tenant makes no progress"
    assert max(progress) - min(progress) < 25, "some sequences make no progress"


@pytest.mark.parametrize("score", [0.5, 100.0])
def test_a_stream_beside_prompts_whose_logprobs_are_computed(score: float) -> None:
    """The time to compute them counts too, and the prompts still make progress."""
    engine = SimulatedEngine(num_blocks=4000, score={"b": score})
    for _ in range(8):
        engine.send("b", 3000, 1)
    for _ in range(4):
        engine.step()
    engine.time, before = 0.0, engine.rows["b"]
    name = engine.send("a", 20, 1000)
    engine.run(engine.done(name))
    assert engine.time < 4 * alone(20, 1000) + 300 * score
    assert (engine.rows["b"] - before) * score > 0.2 * engine.time


def test_prompt_chunks_are_small_while_another_tenant_may_return() -> None:
    engine = SimulatedEngine(num_blocks=4000)
    engine.run(engine.done(engine.send("a", 10, 2)))
    engine.send("b", 3000, 1)
    for _ in range(5):
        before = engine.rows["b"]
        engine.step()
        assert engine.rows["b"] - before == 64
    engine.scheduler.tenants._num_planned += 300
    before = engine.rows["b"]
    engine.step()
    assert engine.rows["b"] - before == 256


@pytest.mark.parametrize("num_streams", [0, 12])
def test_long_contexts_make_these_chunks_smaller(num_streams: int) -> None:
    """The context that counts is that of the prompt, not that of short streams beside it."""
    engine = SimulatedEngine(num_blocks=4000)
    costs = CostModel()
    costs.measure({n: FIXED + FLAT * n for n in (1, 8, 64)}, per_row=FLAT / 1000)
    engine.scheduler.tenants._costs = costs
    engine.run(engine.done(engine.send("a", 10, 2)))
    for _ in range(num_streams):
        engine.send("b", 5, 1000)
    engine.step()
    name = engine.send("b", 4000, 1)
    chunks = []
    while name not in engine.order:
        before = engine.rows["b"]
        engine.step()
        chunks.append(engine.rows["b"] - before - num_streams)
    recent = chunks[:200]  # passes after those of tenant a
    assert 60 <= recent[0] + num_streams <= 64
    assert 8 <= min(recent[:-2]) < 20
    assert all(later <= earlier for earlier, later in pairwise(recent))


def test_a_long_prompt_beside_a_stream_gets_half_of_its_share() -> None:
    engine = SimulatedEngine(num_blocks=4000)
    engine.send("a", 10, 5000)
    engine.run(lambda: bool(engine.outputs))
    engine.time = 0.0
    name = engine.send("b", 4000, 1)
    engine.run(engine.done(name))
    assert engine.time < 4 * alone(4000, 1)


def test_a_new_tenant_gets_places_at_once() -> None:
    engine = SimulatedEngine(max_num_seqs=8)
    for _ in range(20):
        engine.send("b", 10, 300)
    for _ in range(10):
        engine.step()
    assert engine.num_running("b") == 8
    first = engine.send("a", 10, 4)
    assert engine.run(engine.done(first)) == 4, "it had to wait"
    many = [engine.send("a", 10, 300) for _ in range(6)]
    engine.run(lambda: engine.num_running("a") == 4, most=10)
    assert engine.num_running("b") == 4
    before = engine.scheduler.num_preemptions
    engine.run(engine.done(*many))
    assert engine.scheduler.num_preemptions <= before + 2, "the tenants preempt each other"


def test_tenants_take_turns_in_a_single_place() -> None:
    engine = SimulatedEngine(max_num_seqs=1)
    long, short = engine.send("b", 10, 2000), ""
    for _ in range(40):
        engine.step()
    short = engine.send("a", 10, 20)
    assert engine.run(engine.done(short)) == 20
    rounds = [engine.send("a", 10, 500), engine.send("c", 10, 500)]
    engine.run(engine.done(*rounds))
    assert long not in engine.order
    engine.run()
    assert engine.scheduler.num_preemptions < 3000 / 30


def test_priority_applies_within_a_tenant() -> None:
    engine = SimulatedEngine(max_num_seqs=4)
    low = engine.send("b", 10, 60, priority=-1)
    high = [engine.send("b", 10, 60, priority=1000) for _ in range(8)]
    for _ in range(5):
        engine.step()
    mine = engine.send("a", 10, 5, priority=-1000)
    assert engine.run(engine.done(mine)) == 5
    engine.run()
    assert [name for name in engine.order if name != mine][-1] == low
    assert set(engine.order) == {low, mine, *high}


def test_blocks_are_taken_from_the_tenant_that_runs_most() -> None:
    """The pool is full of one tenant's sequences, which do not end."""
    engine = SimulatedEngine(num_blocks=100, max_num_seqs=16, prefix_caching=True)
    for _ in range(10):
        engine.send("b", 70, 400)
    for _ in range(20):
        engine.step()
    mine = [engine.send("a", 150, 20) for _ in range(2)]
    engine.run(engine.done(*mine), most=60)
    engine.run()


def test_a_request_larger_than_its_share_does_not_block_others() -> None:
    """It waits until its tenant was served least, and is served then."""
    engine = SimulatedEngine(num_blocks=100, max_num_seqs=8)
    large = [engine.send("b", 500, 250), engine.send("b", 500, 250)]
    for _ in range(30):
        engine.step()
    for _ in range(10):
        mine = engine.send("a", 20, 10)
        engine.run(engine.done(mine), most=15)
    top_up = flood(engine, "a", 20, 30)
    for _ in range(4000):
        top_up()
        engine.step()
        if set(large) <= set(engine.order):
            break
    assert set(large) <= set(engine.order), "the large requests never end"


def test_short_requests_without_end_do_not_keep_out_one_larger_than_its_share() -> None:
    """Passes that leave out its prompt would admit others in its place."""
    engine = SimulatedEngine(num_blocks=100, max_num_seqs=8)
    for max_tokens in range(10, 90, 12):  # so that they do not end together
        engine.send("a", 20, max_tokens)
    top_up = flood(engine, "a", 20, 100)
    for _ in range(30):
        top_up()
        engine.step()
    large = engine.send("b", 700, 90)
    for _ in range(800):
        top_up()
        engine.step()
    assert engine.done(large)()
    assert engine.scheduler.num_preemptions < 50


def test_a_long_context_with_small_passes_makes_progress_beside_a_stream() -> None:
    """Then a few prompt rows can take longer than a pass of the largest size without context."""
    engine = SimulatedEngine(max_num_batched_tokens=16, max_num_seqs=2)
    costs = CostModel()
    costs.measure({n: FIXED + FLAT * n for n in (1, 8, 64)}, per_row=FLAT / 100)
    engine.scheduler.tenants._costs = costs
    engine.send("a", 10, 5000)
    engine.run(lambda: bool(engine.outputs))
    engine.run(engine.done(engine.send("b", 1000, 1)), most=1000)


requests = st.tuples(
    st.sampled_from("abc"),
    st.integers(1, 60),  # prompt
    st.integers(1, 40),  # tokens
    st.integers(-2, 2),  # priority
    st.integers(0, 20),  # steps before it arrives
)


@settings(deadline=None, max_examples=30)
@given(
    load=st.lists(requests, min_size=1, max_size=14),
    num_blocks=st.integers(16, 60),
    max_num_seqs=st.integers(1, 6),
    prefix_caching=st.booleans(),
    costs=st.booleans(),
)
def test_all_requests_end_with_the_tokens_that_they_have_alone(
    load: Sequence[tuple[str, int, int, int, int]],
    num_blocks: int,
    max_num_seqs: int,
    prefix_caching: bool,
    costs: bool,
) -> None:
    """Preemption and chunked prompts do not change the tokens."""
    engine = SimulatedEngine(
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=16,
        prefix_caching=prefix_caching,
        costs=costs,
    )
    names = []
    for tenant, num_prompt, max_tokens, priority, steps in load:
        for _ in range(steps):
            engine.step()
        names.append(engine.send(tenant, num_prompt, max_tokens, priority=priority))
    engine.run()
    assert set(engine.order) == set(names)
    assert engine.kv.pool.num_available == num_blocks
    for number, (_, num_prompt, max_tokens, _, _) in enumerate(load, start=1):
        tokens = [(number * 31 + at) % 97 for at in range(num_prompt)]
        for _ in range(max_tokens):
            tokens.append(sum(tokens) % 97)
        assert engine.outputs[names[number - 1]] == tuple(tokens[num_prompt:])


@settings(deadline=None, max_examples=30)
@given(
    load=st.lists(requests, min_size=1, max_size=12),
    max_num_seqs=st.integers(2, 6),
    name=st.sampled_from(["", "a"]),
)
def test_one_tenant_is_served_by_priority_then_arrival(
    load: Sequence[tuple[str, int, int, int, int]], max_num_seqs: int, name: str
) -> None:
    """Places are filled in this order and as early as possible, and chunks fill the pass."""
    engine = SimulatedEngine(max_num_seqs=max_num_seqs, max_num_batched_tokens=16)
    for _, num_prompt, max_tokens, priority, _ in load:
        engine.send(name, num_prompt, max_tokens, priority=priority)
    scheduler = engine.scheduler
    ranks = {seq.id: rank for rank, seq in enumerate((*scheduler.running, *scheduler.waiting))}
    while scheduler.has_work:
        before = engine.rows[name]
        engine.step()
        known = [ranks[seq.id] for seq in scheduler.running]
        assert known == sorted(known)
        assert all(rank < ranks[seq.id] for rank in known for seq in scheduler.waiting)
        prefilling = any(seq.num_pending > 1 for seq in scheduler.running)
        assert not prefilling or engine.rows[name] - before == 16
    assert scheduler.num_preemptions == 0


def test_a_short_prompt_has_a_pass_without_parts_of_a_long_one() -> None:
    engine = SimulatedEngine(num_blocks=4000)
    engine.send("b", 8000, 4)
    for _ in range(4):
        for _ in range(5):
            engine.step()
        before = engine.rows["b"]
        short = engine.send("a", 100, 1)
        engine.step()
        assert engine.done(short)()
        assert engine.rows["b"] == before


def test_short_prompts_without_end_do_not_stop_a_long_one() -> None:
    engine = SimulatedEngine(num_blocks=4000)
    long = engine.send("b", 4000, 4)
    for _ in range(400):
        engine.send("a", 100, 1)
        engine.step()
    assert engine.done(long)(), engine.rows


def test_a_short_prompt_has_a_pass_without_the_many_streams_of_another() -> None:
    engine = SimulatedEngine()
    for _ in range(32):
        engine.send("b", 10, 1000)
    for _ in range(20):
        engine.step()
    before = engine.rows["b"]
    engine.send("a", 100, 10)
    engine.step()
    assert engine.rows["b"] == before
    assert len(engine.outputs) == 33


def test_short_prompts_without_end_do_not_stop_many_streams() -> None:
    """They get at least half of a fair share, which is half of the rows if all cost the same."""
    engine = SimulatedEngine(per_row=STEEP)
    for _ in range(16):
        engine.send("b", 10, 10_000)
    for _ in range(20):
        engine.step()
    engine.rows.clear()
    for _ in range(400):
        engine.send("a", 20, 1)
        engine.step()
    assert engine.rows["b"] > engine.rows["a"] / 3, engine.rows
