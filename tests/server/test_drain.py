"""Signals: accepted requests are finished within a time limit, and no child is left."""

import http.client
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from live import LiveServer, Reply, start_early, start_server
from load import SHORT, long_request, stream_error, streamed_ids, under_way, wait_until
from tiny_chat import write_byte_chat
from wire import post, wire

SOON = 6.0  # seconds


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_chat(tmp_path_factory.mktemp("long") / "tiny-chat", context=8192)


class Connection:
    """A connection that is kept alive."""

    def __init__(self, server: LiveServer) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self, path: str, body: Any = None) -> Reply:
        method = "GET" if body is None else "POST"
        data = None if body is None else json.dumps(body)
        self._connection.request(method, path, data, {"Content-Type": "application/json"})
        reply = self._connection.getresponse()
        headers = {name.lower(): value for name, value in reply.getheaders()}
        return Reply(reply.status, headers, reply.read())


def assert_ended(server: LiveServer, seconds: float, children: list[int], num_cut: int = 0) -> None:
    """Assert that the server ends soon and reports the number of requests that were cut off."""
    code = server.process.wait(seconds)
    said = server.log.read_text()
    assert code == (1 if num_cut else 0), said
    assert_gone(children, 0.0)
    assert (f"{num_cut} accepted requests are cut off" in said) == (num_cut > 0), said
    assert "Traceback" not in said, said
    assert "never" not in said, said  # how Python begins to complain about forgotten tasks


def assert_gone(pids: list[int], seconds: float) -> None:
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), seconds)


def pids(server: LiveServer) -> list[int]:
    return [pid for pid, _ in server.children()]


def test_every_accepted_request_is_finished(long_model: Path) -> None:
    """At the signal two run, four wait in the engine and two in the server."""
    with start_server(long_model, "--batch", "2") as server, Connection(server) as connection:
        children = pids(server)
        assert connection.ask("/v1/completions", SHORT).status == 200
        bodies = [long_request(400, stream=index % 2 == 0) for index in range(8)]
        with under_way(server, bodies) as replies:
            server.process.send_signal(signal.SIGTERM)
            server.process.send_signal(signal.SIGTERM)  # so soon it is the same one
            ready = server.wait_for("/ready", 503, 1.0)
            assert int(ready.headers["retry-after"]) >= 1
            assert server.ask("/health").status == 200
            refused = connection.ask("/v1/completions", SHORT)
            assert refused.status == 503
            assert "shutting down" in refused.json()["error"]["message"]
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.headers["connection"] == "close"
            assert not any(reply.done() for reply in replies[2:]), "it was no load"
        for index, reply in enumerate(reply.result() for reply in replies):
            assert reply.status == 200
            if index % 2 == 0:
                ids = streamed_ids(reply.body)
            else:
                ids = reply.json()["choices"][0]["token_ids"]
            assert len(ids) == 400
        assert_ended(server, SOON, children)


def test_a_client_that_reads_slowly_gets_everything(long_model: Path) -> None:
    """Most of its answer is still in the server when the engine has finished it."""
    body = json.dumps(long_request(260, stream=True, logprobs=20, n=16))
    with start_server(long_model) as server, socket.socket() as slow:
        children, address = pids(server), urlsplit(server.url)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(30)
        slow.connect((address.hostname, address.port))
        head = f"POST /v1/completions HTTP/1.0\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        slow.sendall((head + body).encode())
        wait_until(lambda: server.metric("specserve:open_streams") == 16)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.metric("specserve:open_streams") == 0)
        time.sleep(5)
        answer = b"".join(iter(lambda: slow.recv(2**16), b""))
        assert len(streamed_ids(answer.partition(b"\r\n\r\n")[2])) == 16 * 260
        assert_ended(server, SOON, children)


def test_an_answer_that_is_being_read_is_not_cut(long_model: Path) -> None:
    """An answer larger than the system's buffers, when only its connection is still busy."""
    num_tokens = 900_000
    body = json.dumps({"prompt": "a" * num_tokens, "return_token_strs": True}).encode()
    with (
        start_server(long_model, "--template-timeout", "30") as server,
        socket.socket() as slow,
    ):
        children, address = pids(server), urlsplit(server.url)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(30)
        slow.connect((address.hostname, address.port))
        slow.sendall(post(body, "Connection: close", path="/tokenize"))
        answer = slow.recv(2**12)
        server.process.send_signal(signal.SIGTERM)
        for _ in range(22):
            time.sleep(0.3)
            answer += slow.recv(2**12)
        assert server.process.poll() is None
        answer += b"".join(iter(lambda: slow.recv(2**18), b""))
        assert len(json.loads(answer.partition(b"\r\n\r\n")[2])["tokens"]) == num_tokens
        assert_ended(server, SOON, children)


def test_a_drain_finishes_requests_that_wait_for_the_tokenizer(long_model: Path) -> None:
    """Also requests whose body has not been read completely."""
    chat = json.dumps({"messages": [{"role": "user", "content": "a"}], "max_tokens": 4}).encode()
    data = post(chat, path="/v1/chat/completions")
    with start_server(long_model) as server, wire(server) as reading, wire(server) as waiting:
        children = pids(server)
        workers = [pid for pid, command in server.children() if "tokenizer_worker" in command]
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        reading.send(data[:-5])
        waiting.send(data)
        wait_until(lambda: server.metric("specserve:connections") == 3)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("/ready", 503, 1.0)
        reading.send(data[-5:])
        time.sleep(0.3)
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        for connection in (reading, waiting):
            reply = connection.reply()
            assert reply.status == 200, reply
            assert reply.json()["usage"]["completion_tokens"] == 4
        assert_ended(server, SOON, children)


def test_a_drain_ends_after_drain_timeout(long_model: Path) -> None:
    with start_server(long_model, "--drain-timeout", "0.5") as server:
        children = pids(server)
        bodies = [long_request(7000, stream=True), long_request(7000)]
        with under_way(server, bodies) as replies:
            server.process.send_signal(signal.SIGTERM)
            assert_ended(server, SOON, children, num_cut=2)
        assert "drain_timeout (0.5 s) has passed" in server.log.read_text()
        stream, whole = (reply.result() for reply in replies)
        assert stream.status == 200
        assert "engine" in stream_error(stream.body)
        assert whole.status == 503


def test_a_second_signal_ends_at_once(long_model: Path) -> None:
    with start_server(long_model) as server:
        children = pids(server)
        with under_way(server, [long_request(7000, stream=True)] * 2) as replies:
            server.process.send_signal(signal.SIGINT)
            server.wait_for("/ready", 503, 1.0)
            server.process.send_signal(signal.SIGTERM)
            assert_ended(server, SOON, children, num_cut=2)
        for reply in replies:
            assert "engine" in stream_error(reply.result().body)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_idle(long_model: Path, number: signal.Signals) -> None:
    with start_server(long_model) as server, Connection(server) as connection:
        children = pids(server)
        assert connection.ask("/version").status == 200  # and it stays open
        server.process.send_signal(number)
        assert_ended(server, SOON, children)


def test_a_signal_during_the_start(long_model: Path) -> None:
    with start_early(long_model) as server:
        children = pids(server)
        assert server.ask("/ready").status == 503
        server.process.send_signal(signal.SIGTERM)
        assert_ended(server, SOON, children)


def test_no_child_outlives_a_killed_server(long_model: Path) -> None:
    with start_server(long_model) as server:
        children = pids(server)
        with under_way(server, [long_request(7000, stream=True)]) as (reply,):
            server.process.kill()
            assert_gone(children, SOON)
            with pytest.raises((OSError, http.client.HTTPException)):
                reply.result()
