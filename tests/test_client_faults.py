"""Errors, retries and timeouts of the clients, against a peer that misbehaves as told."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from aiohttp import web
from scripted_peer import (
    DONE,
    OK,
    answers,
    chunk,
    client_of,
    endless,
    fails,
    hangs_up,
    never,
    scripted_peer,
    streams,
)

from specserve import Client
from specserve.client import (
    APIStatusError,
    AuthenticationError,
    BadRequest,
    ConnectionFailed,
    GenerationFailed,
    NotFound,
    PermissionDenied,
    RateLimited,
    ServerError,
    StreamBroken,
    TimedOut,
    Unavailable,
    UnexpectedAnswer,
)
from specserve.client.retry import parse_retry_after


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BadRequest),
        (401, AuthenticationError),
        (403, PermissionDenied),
        (404, NotFound),
        (405, APIStatusError),
        (408, APIStatusError),
        (413, BadRequest),
        (415, BadRequest),
        (429, RateLimited),
        (500, ServerError),
        (503, Unavailable),
        (504, Unavailable),
    ],
)
def test_a_status_is_an_exception(status: int, kind: type[APIStatusError]) -> None:
    script = fails(status, "so", param="p", code="c", X_Request_Id="r", Retry_After="7")
    with client_of(script, max_retries=0) as (client, peer):
        for call in (client.complete, client.chat, lambda x: client.stream(x).result()):
            with pytest.raises(APIStatusError) as caught:
                call("x")
            error = caught.value
            assert type(error) is kind
            assert (error.status, error.message) == (status, "so")
            assert (error.param, error.code) == ("p", "c")
            assert (error.request_id, error.retry_after) == ("r", 7.0)
            assert str(error) == f"{status}: so"
    assert len(peer.paths) == 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<h1>Bad\n Gateway\x1b[0m</h1>", "<h1>Bad Gateway\ufffd[0m</h1>"),
        (b"", "no reason given"),
        (b'{"error": "Unauthorized"}', '{"error": "Unauthorized"}'),
        (b'{"error": {"message": "", "code": 3}}', "no reason given"),
        (b"\xff" * 10**6, "\ufffd" * 200),
    ],
)
def test_an_error_of_something_else(body: bytes, message: str) -> None:
    with client_of(answers(body, 500)) as (client, _), pytest.raises(ServerError) as caught:
        client.complete("x")
    assert caught.value.message == message


def test_a_failure_within_a_stream_comes_after_the_text_before_it() -> None:
    failure = {"error": {"message": "engine lost", "type": "api_error", "param": None, "code": "e"}}
    with client_of(streams(chunk("a"), failure, DONE)) as (client, peer):
        stream = client.stream("x")
        assert next(stream).text == "a"
        for use in (lambda: next(stream), stream.result):
            with pytest.raises(GenerationFailed, match=r"^engine lost$") as caught:
                use()
            assert caught.value.code == "e"
    assert len(peer.paths) == 1


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("first", [[], [chunk("a")]])
def test_a_stream_that_was_cut_is_not_retried(first: list[Any], end: bool) -> None:
    with client_of(streams(*first, b'data: {"ch', end=end)) as (client, peer):
        stream = client.stream("x")
        assert [next(stream).text for _ in first] == ["a"] * len(first)
        with pytest.raises(StreamBroken):
            next(stream)
    assert len(peer.paths) == 1


def test_a_chunk_that_is_no_json_ends_the_stream() -> None:
    with client_of(streams(chunk("a"), b"data: {\n\n", chunk("b"), DONE)) as (client, _):
        stream = client.stream("x")
        assert next(stream).text == "a"
        with pytest.raises(UnexpectedAnswer):
            next(stream)
        with pytest.raises(UnexpectedAnswer):
            stream.result()


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_what_may_pass_is_tried_again(status: int) -> None:
    again = fails(status, Retry_After="0")
    with client_of(again, again, answers(OK)) as (client, peer):
        assert client.complete("x").text == "fine"
    assert len(peer.paths) == 3
    with client_of(again, again, streams(chunk("a"), DONE)) as (client, peer):
        assert client.stream("x").result().text == "a"
    assert len(peer.paths) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 413, 500, 501])
def test_what_will_not_pass_is_not_tried_again(status: int) -> None:
    with client_of(fails(status, Retry_After="0")) as (client, peer):
        with pytest.raises(APIStatusError):
            client.complete("x")
        assert len(peer.paths) == 1


def test_attempts_are_counted() -> None:
    with client_of(fails(429, Retry_After="0"), max_retries=3) as (client, peer):
        with pytest.raises(RateLimited):
            client.complete("x")
        assert len(peer.paths) == 4


def test_the_servers_wait_is_obeyed() -> None:
    with client_of(fails(503, Retry_After="1"), answers(OK)) as (client, peer):
        client.complete("x")
    first, second = peer.times
    assert 1.0 <= second - first < 2.5


def test_a_wait_of_the_clients_own_doubles() -> None:
    with client_of(fails(503), fails(503), answers(OK)) as (client, peer):
        client.complete("x")
    first, second, third = peer.times
    assert 0.25 <= second - first < 0.5 + 0.5
    assert 0.5 <= third - second < 1.0 + 0.5


def test_a_wait_beyond_the_timeout_is_not_waited_for() -> None:
    with client_of(fails(503, Retry_After="30"), timeout=20.0) as (client, peer):
        started = time.monotonic()
        with pytest.raises(Unavailable) as caught:
            client.complete("x")
        assert time.monotonic() - started < 5
        assert caught.value.retry_after == 30.0
        assert len(peer.paths) == 1


def test_a_lost_connection_is_tried_again_before_an_answer_only() -> None:
    with client_of(hangs_up(), answers(OK)) as (client, peer):
        assert client.complete("x").text == "fine"
        assert len(peer.paths) == 2

    async def half(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "2000"})
        await response.prepare(request)
        await response.write(b"x" * 1000)
        assert request.transport is not None
        request.transport.close()
        return response

    with client_of(half) as (client, peer):
        with pytest.raises(ConnectionFailed, match="hung up within its answer"):
            client.complete("x", timeout=5.0)
        assert len(peer.paths) == 1


def test_no_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}", max_retries=1) as client:
        with pytest.raises(ConnectionFailed, match=rf"127.0.0.1:{port}: Connection refused"):
            client.complete("x")
        assert not client.ready()
        assert not client.health()


def test_a_server_that_comes_up_late_is_found() -> None:
    with scripted_peer(answers(OK)) as peer, socket.create_server(("127.0.0.1", 0)) as server:
        late = server.getsockname()[1]
        server.close()
        with ThreadPoolExecutor() as pool, Client(f"http://127.0.0.1:{late}") as client:
            answer = pool.submit(client.complete, "x", timeout=20.0)
            time.sleep(0.1)
            with socket.create_server(("127.0.0.1", late)) as proxy:
                pool.submit(_forward_once, proxy, int(peer.url.rpartition(":")[2]))
                assert answer.result(20).text == "fine"


def _forward_once(proxy: socket.socket, port: int) -> None:
    near, _ = proxy.accept()
    with near, socket.create_connection(("127.0.0.1", port)) as far:
        far.sendall(near.recv(65536))
        near.sendall(far.recv(65536))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("3", 3.0),
        ("1.5", 1.5),
        ("0", 0.0),
        ("-1", None),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 21 Oct 2015 07:28:00 -0000", 0.0),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value) == seconds


def test_retry_after_a_date() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    seconds = parse_retry_after(date)
    assert seconds is not None
    assert 97 < seconds <= 100


def test_the_timeout_holds_for_an_answer_that_does_not_begin() -> None:
    with client_of(never(), timeout=0.3) as (client, peer):
        for use in (lambda: client.complete("x"), lambda: next(client.stream("x"))):
            started = time.monotonic()
            with pytest.raises(TimedOut, match=r"0\.3 s"):
                use()
            assert 0.25 < time.monotonic() - started < 3
        assert peer.gone.wait(5)
        assert len(peer.paths) == 2


def test_the_timeout_is_for_the_whole_stream() -> None:
    with client_of(endless(chunk("a"))) as (client, peer):
        stream = client.stream("x", timeout=0.5)
        assert [next(stream).text for _ in range(5)] == ["a"] * 5
        with pytest.raises(TimedOut):
            list(stream)
        assert peer.gone.wait(5)


def test_the_timeout_is_for_all_attempts() -> None:
    with client_of(fails(503, Retry_After="0.2"), max_retries=100, timeout=1.0) as (client, peer):
        with pytest.raises((Unavailable, TimedOut)):
            client.complete("x")
        assert 3 <= len(peer.paths) <= 6


def test_a_body_that_trickles_in() -> None:
    async def trickle(request: Any) -> Any:
        response = streams(*[b"x"] * 1000, pause=0.02)
        return await response(request)

    with client_of(trickle) as (client, _), pytest.raises(TimedOut):
        client.complete("x", timeout=0.4)


def test_a_connection_that_is_not_accepted() -> None:
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):  # what does not fit in the backlog is not answered
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with Client(url, connect_timeout=0.3, max_retries=0) as client:
            started = time.monotonic()
            with pytest.raises(ConnectionFailed, match=r"no connection within 0\.3 s"):
                client.complete("x")
            assert time.monotonic() - started < 3
