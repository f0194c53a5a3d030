"""The fair queues without a server: admission order, admission limits and queue limits by key."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from specserve.fair_share import ServiceCounters, room
from specserve.process.tokenizer_messages import Encode
from specserve.process.tokenizer_queue import PendingJob, TokenizerQueue
from specserve.server.admission import Admission, QueueFull

keys = st.sampled_from("abc")
events = st.lists(
    st.tuples(st.booleans(), keys, st.integers(1, 50), st.integers(-2, 2)), max_size=60
)


class Caller:
    """One sequence that asks for a slot, until `leave` is called."""

    def __init__(self, admission: Admission, key: str, num_tokens: int, priority: int) -> None:
        self.key = key
        self._slot = admission.slot(key, num_tokens, priority)
        self.full: QueueFull | None = None
        self.runs = False
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            async with self._slot:
                self.runs = True
                await asyncio.Event().wait()
        except QueueFull as full:
            self.full = full

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def pause() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


@settings(deadline=None, max_examples=100)
@given(
    events=events,
    window=st.integers(1, 9),
    max_requests=st.integers(1, 12),
    max_tokens=st.integers(20, 300),
    shared=st.booleans(),
)
def test_invariants_under_random_arrivals_and_departures(
    events: Sequence[tuple[bool, str, int, int]],
    window: int,
    max_requests: int,
    max_tokens: int,
    shared: bool,
) -> None:
    async def run() -> None:
        admission = Admission(window, max_requests, max_tokens, shared=shared)
        callers: list[Caller] = []
        for comes, key, num_tokens, priority in events:
            if comes:
                callers.append(Caller(admission, key, num_tokens, priority))
            elif callers:
                await callers.pop(num_tokens % len(callers)).leave()
            await pause()
            callers = [caller for caller in callers if caller.full is None]
            running = Counter(caller.key for caller in callers if caller.runs)
            waiting = Counter(caller.key for caller in callers if not caller.runs)
            assert admission.num_running == running.total()
            assert admission.num_waiting == waiting.total() <= max_requests
            assert admission.num_queued_tokens <= max_tokens
            if waiting:
                assert running.total() >= window, "somebody waits while a place is free"
            for key in waiting:
                num_keys = len(running | waiting)
                assert running[key] >= max(1, window // num_keys), "it has less than its share"
        for caller in callers:
            await caller.leave()
        assert (admission.num_running, admission.num_waiting, admission.num_keys) == (0, 0, 0)
        assert admission.num_queued_tokens == 0

    asyncio.run(run())


def test_one_key_leaves_queue_room_for_others() -> None:
    async def run() -> None:
        admission = Admission(4, 10, 1000, shared=True)
        async with AsyncExitStack() as stack:

            async def callers(key: str, count: int) -> int:
                """How many of them were not refused."""
                some = [Caller(admission, key, 1, 0) for _ in range(count)]
                for caller in some:
                    stack.push_async_callback(caller.leave)
                await pause()
                return sum(caller.full is None for caller in some)

            assert await callers("a", 30) == 4 + 5
            assert await callers("b", 30) == 2 + 3
            assert await callers("c", 30) == 1 + 1
            assert await callers("d", 1) == 1  # runs, as one of four keys

    asyncio.run(run())


def test_a_single_key_may_fill_the_queue() -> None:
    async def run() -> None:
        admission = Admission(4, 10, 1000)
        some = [Caller(admission, "a", 1, 0) for _ in range(30)]
        await pause()
        full = [caller.full for caller in some if caller.full is not None]
        assert len(full) == 30 - 14
        assert "max_queued_requests 10" in str(full[0])
        for caller in some:
            await caller.leave()

    asyncio.run(run())


@given(limit=st.integers(1, 100), steps=st.lists(st.tuples(keys, st.integers(1, 30)), max_size=40))
def test_room_never_exceeds_the_limit(limit: int, steps: list[tuple[str, int]]) -> None:
    held: Counter[str] = Counter()
    for key, wanted in steps:
        if wanted <= room(limit, held.total(), held[key], shared=True):
            held[key] += wanted
            assert held[key] <= limit - held.total() + 1, "it leaves less than it has"
        assert held.total() <= limit
    for key in held:
        assert room(limit, 0, 0, shared=False) == limit
        assert room(limit, held.total(), held[key], shared=True) >= 0


def test_an_idle_tenant_accumulates_no_credit() -> None:
    counters = ServiceCounters()
    counters.join("a", [])
    for _ in range(100):
        counters.take("a", 10, waiting=True)
    counters.join("b", ["a"])
    assert counters.served("b") == counters.served("a")
    counters.forget([])
    assert len(counters) == 0


def test_tokenizer_queue_is_fair_in_bytes_and_keeps_a_worker_free() -> None:
    async def run() -> None:
        queue = TokenizerQueue(100, 2, shared=True)
        loop = asyncio.get_running_loop()

        def put(tenant: str, num_bytes: int) -> PendingJob:
            job = Encode("a" * num_bytes, False, "prompt")
            pending = PendingJob(job, tenant, loop.create_future())
            queue.put(pending)
            return pending

        async def get() -> Any:
            async with asyncio.timeout(0.02):
                return await queue.get()

        long = [put("a", 1_000_000) for _ in range(5)]
        assert await get() is long[0]
        with pytest.raises(TimeoutError):
            await get()  # one worker stays free
        short = put("b", 10)
        assert await get() is short
        queue.done(short)
        other = put("c", 500_000)
        own = put("a", 10)
        with pytest.raises(TimeoutError):
            await get()  # a long one, and one of who has a worker
        queue.done(long[0])
        assert await get() is own  # short, of one that had no more than the other
        assert await get() is other
        queue.discard(long[1])
        queue.done(other)
        queue.done(own)
        assert await get() is long[2]
        assert len(queue) == 2

    asyncio.run(run())


@pytest.mark.parametrize("shared", [False, True])
def test_a_request_that_can_never_wait_is_known(shared: bool) -> None:
    """`can_hold` tells whether an idle queue takes all sequences of a request."""

    async def scenario(lengths: Sequence[int]) -> bool:
        admission = Admission(2, 10, 100, shared=shared)
        callers = [Caller(admission, "a", length, 0) for length in lengths]
        await pause()
        held = not any(caller.full for caller in callers)
        assert admission.can_hold(lengths) == held
        for caller in callers:
            await caller.leave()
        return held

    limit = 50 if shared else 100
    assert asyncio.run(scenario([1000, 1000]))
    assert asyncio.run(scenario([1000, 1000, limit - 1, 1]))
    assert not asyncio.run(scenario([1000, 1000, limit, 1]))
