"""Pauses in a source: told of, and whatever moment somebody stops listening, nothing is left."""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from specserve.server.stream import with_pauses


def test_a_silent_source_is_told_of() -> None:
    async def source() -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(0.05)
        yield 2

    async def listen() -> list[int | None]:
        async with aclosing(with_pauses(source(), 0.01)) as items:
            return [item async for item in items]

    heard = asyncio.run(listen())
    assert [item for item in heard if item is not None] == [1, 2]
    assert heard[1] is None


@pytest.mark.parametrize("ends", [StopAsyncIteration, ValueError])
@pytest.mark.parametrize("num_turns", range(6))
def test_whoever_leaves_at_the_end_leaves_nothing(num_turns: int, ends: type[Exception]) -> None:
    """The source ends, and so many turns of the loop later its listener is cancelled."""
    complaints: list[dict[str, Any]] = []

    async def source(end: asyncio.Event) -> AsyncIterator[int]:
        await end.wait()
        if ends is ValueError:
            raise ValueError
        return
        yield 0

    async def listen(end: asyncio.Event) -> None:
        async with aclosing(with_pauses(source(end), 60)) as items:
            async for _ in items:
                pass

    async def leave() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
        end = asyncio.Event()
        listener = asyncio.create_task(listen(end))
        await asyncio.sleep(0.01)
        end.set()
        for _ in range(num_turns):
            await asyncio.sleep(0)
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)
        del listener
        gc.collect()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(leave())
    assert not complaints
