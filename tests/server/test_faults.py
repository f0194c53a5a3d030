"""The engine or a tokenizer process is killed or hangs: clear errors and a quick recovery."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from live import LiveServer, Reply, start_early, start_server
from load import SHORT, long_request, short_answer, stream_error, under_way, wait_until
from tiny_chat import write_byte_chat

RESTARTS = "specserve:engine_restarts_total"
HEARTBEAT_S = 2


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_chat(tmp_path_factory.mktemp("long") / "tiny-chat", context=8192)


@pytest.fixture(scope="module")
def server(long_model: Path) -> Iterator[LiveServer]:
    flags = ("--heartbeat-timeout", str(HEARTBEAT_S), "--kv-memory", "16MiB")
    with start_server(long_model, *flags) as server:
        yield server


def assert_unavailable(reply: Reply) -> None:
    assert reply.status == 503, reply
    assert int(reply.headers["retry-after"]) >= 1
    if "error" in reply.json():
        assert "engine" in reply.json()["error"]["message"]


def engine_pids(server: LiveServer) -> set[int]:
    return {pid for pid, command in server.children() if "engine_main" in command}


def wait_for_engine(server: LiveServer, *others: int) -> int:
    """The engine process, ready or not, that is not one of `others`."""
    wait_until(lambda: len(engine_pids(server) - set(others)) == 1)
    (pid,) = engine_pids(server) - set(others)
    return pid


@pytest.mark.parametrize(("fault", "seconds"), [(signal.SIGKILL, 1.0), (signal.SIGSTOP, 20.0)])
def test_the_engine_dies_or_hangs_under_load(
    server: LiveServer, fault: signal.Signals, seconds: float
) -> None:
    expected = short_answer(server)
    restarts = server.metric(RESTARTS)
    bodies = [long_request(6000, stream=index < 4) for index in range(6)]
    with under_way(server, bodies) as replies:
        os.kill(server.engine_pid(), fault)
        assert_unavailable(server.wait_for("/ready", 503, seconds))
        assert_unavailable(server.ask("/v1/completions", SHORT))
        assert_unavailable(server.ask("/v1/completions", SHORT | {"stream": True}))
        assert server.ask("/health").status == 200
    for reply in replies[:4]:
        assert reply.result().status == 200
        assert "engine" in stream_error(reply.result().body)
    for reply in replies[4:]:
        assert_unavailable(reply.result())
    server.wait_for("/ready", 200)
    assert short_answer(server) == expected
    assert server.metric(RESTARTS) == restarts + 1
    server.wait_until_idle()


def test_a_killed_tokenizer_process_is_replaced(server: LiveServer) -> None:
    expected = short_answer(server)
    workers = [pid for pid, command in server.children() if "tokenizer_worker" in command]
    assert workers
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    assert short_answer(server) == expected
    engine = server.engine_pid()
    wait_until(
        lambda: (
            {pid for pid, _ in server.children()}.isdisjoint(workers)
            and len(server.children()) == len(workers) + 1
        )
    )
    assert server.engine_pid() == engine


def test_engines_killed_repeatedly_and_during_the_start(long_model: Path) -> None:
    with start_early(long_model) as server:
        first = wait_for_engine(server)
        assert server.ask("/health").json() == {"status": "ok", "engine": "starting"}
        assert_unavailable(server.ask("/ready"))
        assert_unavailable(server.ask("/v1/completions", SHORT))
        os.kill(first, signal.SIGKILL)
        second = wait_for_engine(server, first)
        server.wait_for("/ready", 200)
        expected = short_answer(server)
        os.kill(second, signal.SIGKILL)
        third = wait_for_engine(server, first, second)
        os.kill(third, signal.SIGKILL)
        wait_for_engine(server, first, second, third)
        server.wait_for("/ready", 200)
        assert short_answer(server) == expected
        assert server.metric(RESTARTS) == 3
        server.wait_until_idle()
