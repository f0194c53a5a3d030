"""Streams and calls that are given up, and the clients in loops, threads and processes."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from scripted_peer import (
    DONE,
    OK,
    answers,
    chunk,
    client_of,
    endless,
    fails,
    never,
    scripted_peer,
    streams,
)

from specserve import AsyncClient, Client
from specserve.client import (
    APIStatusError,
    BadRequest,
    ConnectionFailed,
    GenerationFailed,
    SpecserveError,
    StreamBroken,
    TimedOut,
)


def _leave_the_context(client: Client) -> None:
    with client.stream("x") as stream:
        next(stream)


def _break_out_of_the_loop(client: Client) -> None:
    for _ in client.stream("x"):
        break


def _close_twice(client: Client) -> None:
    stream = client.stream("x")
    next(stream)
    stream.close()
    stream.close()
    assert list(stream) == []
    with pytest.raises(StreamBroken, match="closed before its end"):
        stream.result()


def _raise_within(client: Client) -> None:
    def fail() -> None:
        with client.stream("x") as stream:
            next(stream)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


def _close_the_client(client: Client) -> None:
    stream = client.stream("x")
    next(stream)
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(stream)


@pytest.mark.parametrize(
    "leave",
    [
        _leave_the_context,
        _break_out_of_the_loop,
        _close_twice,
        _raise_within,
        _close_the_client,
    ],
)
def test_a_stream_that_is_left_hangs_up(leave: Callable[[Client], None]) -> None:
    with client_of(endless(chunk("a"))) as (client, peer):
        leave(client)
        assert peer.gone.wait(5)


def test_a_client_that_is_dropped_takes_its_thread_along() -> None:
    with scripted_peer(endless(chunk("a"))) as peer:
        before = threading.active_count()
        stream = Client(peer.url).stream("x")
        gc.collect()
        assert next(stream).text == "a"  # the stream keeps what it needs
        assert threading.active_count() == before + 1
        del stream
        gc.collect()
        assert peer.gone.wait(5)
        wait_until(lambda: threading.active_count() == before)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("streamed", [False, True])
def test_an_interrupt_cancels_what_is_waited_for(streamed: bool) -> None:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with client_of(never(), answers(OK)) as (client, peer):
            timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                next(client.stream("x")) if streamed else client.complete("x")
            assert peer.gone.wait(5)
            assert client.complete("x").text == "fine"
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("streamed", [False, True])
def test_closing_ends_the_calls_of_other_threads(streamed: bool) -> None:
    with client_of(never()) as (client, peer), ThreadPoolExecutor() as pool:
        calls = [
            pool.submit(lambda: next(client.stream("x")) if streamed else client.complete("x"))
            for _ in range(4)
        ]
        wait_until(lambda: len(peer.paths) == 4)
        closers = [pool.submit(client.close) for _ in range(2)]
        for call in calls:
            with pytest.raises(ConnectionFailed, match="closed during the call"):
                call.result(5)
        for closer in closers:
            closer.result(5)
        with pytest.raises(RuntimeError, match="the client is closed"):
            client.complete("x")


def test_the_asynchronous_client_does_the_same() -> None:
    async def use(url: str) -> None:
        async with AsyncClient(url) as client:
            assert (await client.complete("x")).text == "fine"
            async with client.stream("x") as stream:
                texts = [delta.text async for delta in stream]
            assert (texts, (await stream.result()).text) == (["a", "b"], "ab")
            assert (await client.stream("x").result()).text == "ab"
            with pytest.raises(BadRequest):
                async with client.stream("x"):
                    pass
        with pytest.raises(RuntimeError, match="closed"):
            await client.complete("x")

    stream = streams(chunk("a"), chunk("b"), DONE)
    with scripted_peer(answers(OK), stream, stream, fails(400)) as peer:
        asyncio.run(use(peer.url))


async def _cancel_the_task(client: AsyncClient) -> None:
    async def read() -> None:
        async for _ in client.stream("x"):
            pass

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(read(), 0.3)


async def _leave_the_async_context(client: AsyncClient) -> None:
    async with client.stream("x") as stream:
        await anext(stream)


async def _drop(client: AsyncClient) -> None:
    await anext(client.stream("x"))


@pytest.mark.parametrize("leave", [_cancel_the_task, _leave_the_async_context, _drop])
def test_an_asynchronous_stream_that_is_left_hangs_up(leave: Callable[..., Any]) -> None:
    async def use(url: str) -> None:
        async with AsyncClient(url) as client:
            await leave(client)
            assert await asyncio.to_thread(peer.gone.wait, 5)

    with scripted_peer(endless(chunk("a"))) as peer:
        asyncio.run(use(peer.url))


def test_a_cancelled_call_hangs_up() -> None:
    async def use(url: str) -> None:
        async with AsyncClient(url) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.complete("x"), 0.2)
            assert await asyncio.to_thread(peer.gone.wait, 5)

    with scripted_peer(never()) as peer:
        asyncio.run(use(peer.url))


def test_one_asynchronous_client_is_for_one_loop() -> None:
    with scripted_peer(answers(OK)) as peer, asyncio.Runner() as first, asyncio.Runner() as second:
        client = AsyncClient(peer.url)
        first.run(client.complete("x"))
        with pytest.raises(RuntimeError, match="another event loop; make one per loop"):
            second.run(client.complete("x"))
        first.run(client.close())


def test_the_synchronous_client_works_within_a_running_loop() -> None:
    async def cell(client: Client) -> str:
        return client.complete("x").text + "".join(delta.text for delta in client.stream("x"))

    with client_of(answers(OK), streams(chunk("a"), DONE)) as (client, _):
        assert asyncio.run(cell(client)) == "finea"


def test_one_synchronous_client_is_for_many_threads() -> None:
    async def echo(request: Any) -> Any:
        text = (await request.json())["prompt"]
        return await streams(chunk(text), chunk("!"), DONE, pause=0.005)(request)

    with client_of(echo) as (client, _), ThreadPoolExecutor(16) as pool:
        texts = [f"prompt {i}" for i in range(64)]
        results = pool.map(lambda text: client.stream(text).result().text, texts)
        assert list(results) == [f"{text}!" for text in texts]


def test_use_after_a_fork_is_an_error() -> None:
    program = """
import os, sys
from specserve import Client
client = Client()
if os.fork() == 0:
    try:
        client.complete("x")
    except RuntimeError as error:
        os._exit(7 if "fork" in str(error) else 1)
    os._exit(1)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=30, check=False).returncode == 7


def test_a_client_that_is_not_closed_ends_with_the_program() -> None:
    program = """
import sys
import specserve
assert "aiohttp" not in sys.modules
stream = specserve.Client(sys.argv[1]).stream("x")
print(next(stream).text)
assert "torch" not in sys.modules
"""
    line = [sys.executable, "-W", "error", "-X", "dev", "-c", program]
    with scripted_peer(endless(chunk("a"))) as peer:
        done = subprocess.run(
            [*line, peer.url], capture_output=True, text=True, timeout=30, check=False
        )
        # On a busy machine a loop in debug mode tells of callbacks that took long.
        said = [line for line in done.stderr.splitlines() if not line.startswith("Executing <")]
        assert (done.returncode, done.stdout, said) == (0, "a\n", [])
        assert peer.gone.wait(5)


def test_every_error_is_of_one_kind() -> None:
    for kind in (APIStatusError, ConnectionFailed, TimedOut, StreamBroken, GenerationFailed):
        assert issubclass(kind, SpecserveError)
