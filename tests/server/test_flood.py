"""More connections than a real server allows: 60 and 61 of BAD_INPUTS.md."""

import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from live import LiveServer, start_server
from load import SHORT, long_request, short_answer, streamed_ids, under_way, wait_until
from refusal import COMPLETION
from wire import dial, post

CONNECTIONS = 100
PLACES = 116


@contextmanager
def few_files(number: int) -> Iterator[None]:
    """Processes started inside have this soft limit on open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def server(chat_model: Path) -> Iterator[LiveServer]:
    with ExitStack() as stack:
        with few_files(150):
            flags = ("--max-connections", str(CONNECTIONS), "--kv-memory", "8MiB")
            server = stack.enter_context(start_server(chat_model, *flags))
        yield server
        assert "Traceback" not in server.log.read_text()


@contextmanager
def flood(server: LiveServer, count: int, data: bytes) -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(count):
            wire = dial(server)
            stack.callback(wire.close)
            wire.send(data)
        yield


@pytest.mark.parametrize(
    "data", [b"", b"POST /v1/comp", post(b"{}", path="/health")], ids=["silent", "head", "used"]
)
def test_others_are_served_during_a_flood(server: LiveServer, data: bytes) -> None:
    """Running requests continue, and an engine that dies is replaced."""
    expected = short_answer(server)
    bodies = [long_request(300, stream=True)] * 2
    with under_way(server, bodies) as replies, flood(server, 3 * PLACES, data):
        for path in ("/health", "/ready", "/v1/models"):
            started = time.monotonic()
            assert server.ask(path).status == 200
            assert time.monotonic() - started < 2
        assert short_answer(server) == expected
        assert server.metric("specserve:connections") <= PLACES
        for reply in replies:
            assert len(streamed_ids(reply.result().body)) == 300
        os.kill(server.engine_pid(), signal.SIGKILL)
        wait_until(lambda: server.ask("/ready").status == 503)
        server.wait_for("/ready", 200)
        assert short_answer(server) == expected
    wait_until(lambda: server.metric("specserve:connections") == 1)


def test_bodies_that_never_end(server: LiveServer) -> None:
    """They are accepted up to the limit. Requests to public routes are still answered."""
    with flood(server, 2 * PLACES, post(b"{}")[:-1]):
        wait_until(lambda: server.ask("/health").status == 200)
        reply = server.ask(COMPLETION, SHORT)
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert "too many requests on this server are open" in reply.json()["error"]["message"]
    wait_until(lambda: server.ask(COMPLETION, SHORT).status == 200)


def test_too_few_files_are_an_error_at_the_start(chat_model: Path) -> None:
    serve = [sys.executable, "-m", "specserve.cli", "serve", str(chat_model), "--port", "0"]
    done = subprocess.run(
        ["sh", "-c", f"ulimit -n 600; exec {shlex.join(serve)}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "max_connections: 1024 needs 1408 open files" in done.stderr
    assert "the system allows 600" in done.stderr
    assert "Traceback" not in done.stderr
