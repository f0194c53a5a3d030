"""Clients that leave, stall or never read, and too much at once: 45, 46, 51 to 59 of
BAD_INPUTS.md. What it is that ends a request, nothing of it stays."""

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import pytest
from live import LiveServer, events, start_server
from load import SHORT, long_request, short_answer, wait_until
from refusal import COMPLETION, assert_error, assert_refused, scrape, vital_signs
from tiny_chat import write_byte_chat
from wire import Wire, dial, get, post

from specserve.server.deadline import Deadline
from specserve.server.errors import APIError

RUNNING: Final = "vllm:num_requests_running"
WAITING: Final = "vllm:num_requests_waiting"
CONNECTIONS: Final = "specserve:connections"
TASKS: Final = "specserve:tasks"
ABORTED: Final = {"finished_reason": "abort"}
JUMPING_CLOCK: Final = """
import itertools, time
_offsets, _time = itertools.cycle((0, 3e8, -1e9, 86400, -3600)), time.time
time.time = lambda: _time() + next(_offsets)
"""


def encoded(max_tokens: int, **more: Any) -> bytes:
    return post(json.dumps(long_request(max_tokens, **more)).encode())


@contextmanager
def callers(server: LiveServer, count: int, data: bytes) -> Iterator[list[Wire]]:
    """`count` connections that have sent `data` and are reset at the end."""
    with ExitStack() as stack:
        wires = []
        for _ in range(count):
            wires.append(dial(server))
            stack.callback(wires[-1].reset)
            wires[-1].send(data)
        yield wires


def num_files(server: LiveServer) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


@contextmanager
def nothing_stays(server: LiveServer) -> Iterator[None]:
    """Assert that no task, open file, connection or KV slot is left over."""

    def held() -> tuple[float, float, int]:
        gauges = scrape(server)
        return gauges[TASKS], gauges[CONNECTIONS], num_files(server)

    server.wait_until_idle()
    wait_until(lambda: held()[1] == 1)  # the one that asks
    before = held()
    yield
    server.wait_until_idle()
    wait_until(lambda: all(now <= then for now, then in zip(held(), before, strict=True)))


def wait_for_running(server: LiveServer) -> None:
    wait_until(lambda: server.metric(RUNNING) > 0)


def read_something(wires: list[Wire]) -> None:
    for wire in wires:
        assert wire.read(1) == b"H"


STREAM: Final = encoded(400, stream=True)
WHOLE: Final = encoded(400)
# How much of the request is sent, and what happens before they leave.
STAGES: dict[str, tuple[bytes, Callable[[LiveServer, list[Wire]], None] | None]] = {
    "before anything": (b"", None),
    "in the first line": (STREAM[:9], None),
    "in the headers": (STREAM[:40], None),
    "before the body": (STREAM[: STREAM.index(b"{")], None),
    "in the body": (STREAM[:-9], None),
    "at once": (STREAM, None),
    "at once, from a whole answer": (WHOLE, None),
    "while it runs": (WHOLE, lambda server, wires: wait_for_running(server)),
    "at the first event": (STREAM, lambda server, wires: read_something(wires)),
    "after the last, unread": (
        encoded(6, stream=True),
        lambda server, wires: server.wait_until_idle(),
    ),
    "with more behind it": (STREAM * 3, lambda server, wires: read_something(wires)),
}


def test_clients_that_disconnect(survivor: LiveServer) -> None:
    """51: with FIN or RST."""
    with nothing_stays(survivor):
        for data, happens in STAGES.values():
            for leave in (Wire.close, Wire.reset):
                with callers(survivor, 8, data) as wires:
                    if happens is not None:
                        happens(survivor, wires)
                    for wire in wires:
                        leave(wire)


def test_two_hundred_clients_disconnect_at_once(survivor: LiveServer) -> None:
    """51: while running, in the engine's queue and in the server's queue."""
    num_generated = survivor.metric("vllm:generation_tokens_total")
    with nothing_stays(survivor), callers(survivor, 200, STREAM) as wires:
        wait_until(lambda: survivor.metric(RUNNING) > 0 and survivor.metric(WAITING) > 30)
        assert len(wires) == 200
    assert survivor.metric("vllm:generation_tokens_total") - num_generated < 200 * 400 / 2


def test_disconnecting_after_one_of_two_choices_counts_as_abort(survivor: LiveServer) -> None:
    """51: also if the other choice had finished."""
    stops = list(range(0, 250, 50))
    body = {"prompt": "ab", "n": 2, "max_tokens": 400, "stop_token_ids": stops}
    ended = (ABORTED, {"finished_reason": "stop"}, {"finished_reason": "length"})

    def lengths(seed: int) -> list[int]:
        answer = survivor.ask(COMPLETION, body | {"seed": seed, "return_token_ids": True})
        return sorted(len(choice["token_ids"]) for choice in answer.json()["choices"])

    def differ(seed: int) -> bool:
        shorter, longer = lengths(seed)
        return longer > shorter + 100

    seed = next(filter(differ, range(100)))
    before = [survivor.metric("vllm:request_success_total", **reason) for reason in ended]
    request = post(json.dumps(body | {"seed": seed, "stream": True}).encode())
    with nothing_stays(survivor), callers(survivor, 1, request) as (leaving,):
        seen = b""
        while b'"finish_reason":"stop"' not in seen:
            seen += leaving.read(2**16)
    survivor.wait_until_idle()
    after = [survivor.metric("vllm:request_success_total", **reason) for reason in ended]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 0, 0]


def test_a_thousand_aborts(survivor: LiveServer) -> None:
    """59."""
    num_aborted = survivor.metric("vllm:request_success_total", **ABORTED)
    with nothing_stays(survivor):
        for _ in range(20):
            with callers(survivor, 25, STREAM) as patient, callers(survivor, 25, STREAM):
                read_something(patient)
        survivor.wait_until_idle()
        assert survivor.metric("vllm:request_success_total", **ABORTED) - num_aborted >= 500


@pytest.fixture(scope="module")
def pressed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with short timeouts and small limits, whose wall clock jumps in all processes."""
    directory = tmp_path_factory.mktemp("pressed")
    model = write_byte_chat(directory / "tiny-chat", context=8192)
    (directory / "sitecustomize.py").write_text(JUMPING_CLOCK)
    path = os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])
    times = ("--body-timeout", "0.5", "--keepalive-timeout", "1", "--write-timeout", "1")
    queue = ("--batch", "2", "--max-queued-requests", "2", "--max-queued-tokens", "600")
    with start_server(model, *times, *queue, "--kv-memory", "1MiB", PYTHONPATH=path) as server:
        before = vital_signs(server)
        with nothing_stays(server):
            yield server
        assert vital_signs(server) == before
        assert "Traceback" not in server.log.read_text()


SLOTS: Final = 4096  # of the pool
IN_ENGINE: Final = 6  # running and next
QUEUE_REASON: Final = "max_num_queued_reqs"


def test_the_clock_jumps(pressed: LiveServer) -> None:
    """58: the clock jumps during all following tests, too."""
    stamps = [pressed.ask(COMPLETION, SHORT).json()["created"] for _ in range(10)]
    assert max(stamps) - min(stamps) > 3000


def test_stalled_bodies(pressed: LiveServer) -> None:
    """45."""
    head = f"POST {COMPLETION} HTTP/1.1\r\nHost: a\r\n".encode()
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"
    large = head + b"Content-Length: 8000000\r\n\r\nabc"
    with ExitStack() as stack:
        stalled = [
            stack.enter_context(callers(pressed, 2, sent)) for sent in (WHOLE[:-5], chunked, large)
        ]
        for wire in (wire for wires in stalled for wire in wires):
            assert_refused(wire.reply(), 408)
            assert wire.closed()


def test_stalled_headers(pressed: LiveServer) -> None:
    """46: on new and on used connections."""
    with callers(pressed, 3, b"") as fresh, callers(pressed, 3, get("/version")) as used:
        for wire in used:
            assert wire.reply().status == 200
        beginnings = (b"", b"P", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-")
        for wires in (fresh, used):
            for wire, beginning in zip(wires, beginnings, strict=True):
                wire.send(beginning)
        assert all(wire.closed() for wire in (*fresh, *used))


def test_a_stream_that_is_not_read(pressed: LiveServer) -> None:
    """52: it is dropped once the connection's buffers are full."""
    num_aborted = pressed.metric("vllm:request_success_total", **ABORTED)
    with nothing_stays(pressed):
        deaf = dial(pressed, narrow=True)
        deaf.send(encoded(3900, stream=True, logprobs=20))
        wait_for_running(pressed)
        wait_until(lambda: pressed.metric(CONNECTIONS) == 1)
        pressed.wait_until_idle()
        deaf.close()
    assert pressed.metric("vllm:request_success_total", **ABORTED) == num_aborted + 1


def test_answers_that_are_not_read(pressed: LiveServer) -> None:
    """52: of sizes around that of the connection's buffers."""
    with nothing_stays(pressed), ExitStack() as stack:
        for num_tokens in (*range(2_000, 60_000, 4_000), 200_000):
            body = json.dumps({"prompt": "a" * num_tokens, "return_token_strs": True}).encode()
            deaf = dial(pressed, narrow=True)
            stack.callback(deaf.close)
            deaf.send(post(body, path="/tokenize"))
            assert deaf.read(1) == b"H"
        wait_until(lambda: pressed.metric(CONNECTIONS) == 1, seconds=10)


def test_more_sequences_than_the_kv_pool_holds(pressed: LiveServer) -> None:
    """54: a request that can never run is refused, the others run in turns."""
    for fields, param in (
        ({"prompt": "a" * SLOTS}, "prompt"),
        ({"prompt": "a" * (SLOTS - 100), "max_tokens": 101}, "max_tokens"),
        ({"prompt": "a", "max_tokens": SLOTS}, "max_tokens"),
    ):
        for more in ({}, {"stream": True}, {"n": 2}):
            assert_refused(pressed.ask(COMPLETION, fields | more), 400, param)
    prompts = [f"{index} " * 1000 for index in range(3)]
    bodies = [long_request(200, prompt=prompt, speculation={}) for prompt in prompts]
    expected = [pressed.ask(COMPLETION, body).json()["choices"] for body in bodies]
    before = pressed.metric("vllm:num_preemptions_total")
    with ThreadPoolExecutor(len(bodies)) as pool:
        replies = list(pool.map(lambda body: pressed.ask(COMPLETION, body), bodies))
    assert [reply.json()["choices"] for reply in replies] == expected
    assert pressed.metric("vllm:num_preemptions_total") > before, "there was room for all"


@contextmanager
def busy(server: LiveServer, num_queued: int) -> Iterator[None]:
    """All slots are taken for a while, and `num_queued` requests wait for one."""
    count = IN_ENGINE + num_queued
    with callers(server, count, encoded(3900, stream=True)):
        wait_until(lambda: server.metric(RUNNING) + server.metric(WAITING) == count)
        yield
        assert server.metric(RUNNING) == 2, "it was not busy for long enough"


def test_a_full_queue(pressed: LiveServer) -> None:
    """55: 429 with Retry-After, and /ready is 503."""
    expected = short_answer(pressed)
    rejected = pressed.metric("vllm:admission_rejections_total", reason=QUEUE_REASON)
    with busy(pressed, 2):
        for more in ({}, {"stream": True}, {"n": 3}):
            reply = pressed.ask(COMPLETION, SHORT | more)
            error = assert_refused(reply, 429)
            assert error["type"] == "rate_limit_error"
            assert 1 <= int(reply.headers["retry-after"]) <= 60
        ready = pressed.ask("/ready")
        assert (ready.status, ready.json()["ready"]) == (503, False)
        assert pressed.ask("/health").status == 200
        assert_refused(pressed.ask(COMPLETION, SHORT | {"top_p": 2}), 400, "top_p")
    assert short_answer(pressed) == expected
    now = pressed.metric("vllm:admission_rejections_total", reason=QUEUE_REASON)
    assert now == rejected + 3


def test_a_queue_full_of_tokens(pressed: LiveServer) -> None:
    """55: when one choice is refused, the queued ones of its request are removed, too."""
    with busy(pressed, 0):
        reply = pressed.ask(COMPLETION, SHORT | {"prompt": "a" * 601})
        assert "max_queued_tokens" in assert_refused(reply, 429)["message"]
        assert_refused(pressed.ask(COMPLETION, SHORT | {"n": 3}), 429)
        assert_refused(pressed.ask(COMPLETION, SHORT | {"prompt": ["a"] * 3}), 429)
        wait_until(lambda: pressed.metric(WAITING) == IN_ENGINE - 2)


@pytest.mark.parametrize("num_busy", [None, -4, 0])
def test_deadlines(pressed: LiveServer, num_busy: int | None) -> None:
    """56: while running, while waiting in the engine, and while waiting in the server."""
    late = long_request(4000, request_timeout=0.4)
    with ExitStack() as stack:
        if num_busy is not None:
            stack.enter_context(busy(pressed, num_busy))
        for body in (late, late | {"n": 2}):
            error = assert_refused(pressed.ask(COMPLETION, body), 408)
            assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
        reply = pressed.ask(COMPLETION, late | {"stream": True})
        if num_busy is not None:
            assert_refused(reply, 408)
        else:
            *parts, last = events(reply.body)
            assert parts
            assert_error(last["error"])
            assert last["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize(("by_client", "status"), [(True, 408), (False, 504)])
def test_the_status_tells_whose_deadline_passed(by_client: bool, status: int) -> None:
    """56: 408 if the client set it, else 504."""

    async def wait() -> None:
        async with Deadline(0.0, by_client).enforced():
            await asyncio.sleep(60)

    with pytest.raises(APIError) as caught:
        asyncio.run(wait())
    assert caught.value.status == status
