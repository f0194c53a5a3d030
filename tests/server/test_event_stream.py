"""Heartbeats during pauses of a source, and consumers that are cancelled at any moment."""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from specserve.server.event_stream import with_heartbeats


def test_a_pause_gives_none() -> None:
    async def source() -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(0.05)
        yield 2

    async def consume() -> list[int | None]:
        async with aclosing(with_heartbeats(source(), 0.01)) as items:
            return [item async for item in items]

    items = asyncio.run(consume())
    assert [item for item in items if item is not None] == [1, 2]
    assert items[1] is None


@pytest.mark.parametrize("ends", [StopAsyncIteration, ValueError])
@pytest.mark.parametrize("num_turns", range(6))
def test_a_consumer_cancelled_at_the_end_leaves_no_task_and_no_error(
    num_turns: int, ends: type[Exception]
) -> None:
    """The consumer is cancelled `num_turns` turns of the loop after the source ends."""
    errors: list[dict[str, Any]] = []

    async def source(end: asyncio.Event) -> AsyncIterator[int]:
        await end.wait()
        if ends is ValueError:
            raise ValueError
        return
        yield 0

    async def consume(end: asyncio.Event) -> None:
        async with aclosing(with_heartbeats(source(end), 60)) as items:
            async for _ in items:
                pass

    async def cancel_at_end() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: errors.append(what))
        end = asyncio.Event()
        consumer = asyncio.create_task(consume(end))
        await asyncio.sleep(0.01)
        end.set()
        for _ in range(num_turns):
            await asyncio.sleep(0)
        consumer.cancel()
        await asyncio.gather(consumer, return_exceptions=True)
        del consumer
        gc.collect()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(cancel_at_end())
    assert not errors
