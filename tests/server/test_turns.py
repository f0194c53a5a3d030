"""Turns in the event loop: a key with many requests does not delay those of another key."""

import asyncio

from specserve.server.turns import Turns


def test_another_key_waits_for_one_request_only() -> None:
    handled: list[str] = []

    async def handle(turns: Turns, key: str) -> None:
        await turns.wait(key)
        handled.append(key)

    async def scenario() -> None:
        turns = Turns(shared=True)
        async with asyncio.TaskGroup() as group:
            for _ in range(50):
                group.create_task(handle(turns, "b"))
            await asyncio.sleep(0)
            group.create_task(handle(turns, "a"))

    asyncio.run(scenario())
    assert len(handled) == 51
    assert handled.index("a") <= 2


def test_a_cancelled_request_passes_its_turn_on() -> None:
    async def scenario() -> None:
        turns = Turns(shared=True)
        tasks = [asyncio.create_task(turns.wait("a")) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[1].cancel()
        await asyncio.wait_for(tasks[2], 5)

    asyncio.run(scenario())
