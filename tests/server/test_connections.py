"""Raw bytes sent to a real port: slow, large or malformed requests, and closed connections."""

import asyncio
import json
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import pytest
import uvloop
from aiohttp import web

from specserve.config import ServerConfig
from specserve.server import listener as listener_module
from specserve.server.accepted import AcceptedRequests
from specserve.server.connections import RUNNER_OPTIONS, Connection, read_body
from specserve.server.errors import APIError
from specserve.server.listener import Listener, connection_limit, listen

LIMIT = 100_000
LARGE = 32_000_000  # bytes; more than any connection holds
POST = b"POST /echo HTTP/1.1\r\nHost: here\r\n"
WAIT = b"GET /wait HTTP/1.1\r\nHost: here\r\n\r\n"
PUBLIC = b"GET /public HTTP/1.1\r\nHost: here\r\n\r\n"
LOOPS: list[Callable[[], asyncio.AbstractEventLoop]] = [
    asyncio.new_event_loop,
    uvloop.new_event_loop,
]


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def error(self) -> dict[str, Any]:
        """The error; asserts that it is JSON in OpenAI's form."""
        assert self.headers["content-type"].startswith("application/json"), self
        (error,) = json.loads(self.body).values()
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        return dict(error)


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> Answer:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        return Answer(int(head[0].split()[1]), headers, body)

    async def ask(self, data: bytes) -> Answer:
        await self.send(data)
        return await self.answer()

    async def closed(self) -> bool:
        """Wait until the server closes the connection."""
        try:
            return await self.reader.read() == b""
        except ConnectionError:
            return True


class Served:
    def __init__(self, listener: Listener, accepted: AcceptedRequests) -> None:
        self.port = listener.address[1]
        self.listener = listener
        self.accepted = accepted
        self.events: list[str] = []

    @asynccontextmanager
    async def connect(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[Client]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=tls)
        try:
            yield Client(reader, writer)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def ask(self, data: bytes) -> Answer:
        async with self.connect() as client:
            return await client.ask(data)


class SlowEnd(web.Response):
    """Its last byte is sent a while before `write_eof` returns."""

    async def write_eof(self, data: bytes = b"") -> None:
        await super().write_eof(data)
        await asyncio.sleep(0.02)


@web.middleware
async def render(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except APIError as error:
        return error.response()
    except web.HTTPException as error:
        return APIError(error.status, error.reason).response()


@asynccontextmanager
async def serving(
    *,
    tls: ssl.SSLContext | None = None,
    body_timeout: float = 5.0,
    shared: bool = False,
    **settings: Any,
) -> AsyncIterator[Served]:
    async def echo(request: web.Request) -> web.StreamResponse:
        try:
            body = await read_body(request, LIMIT, body_timeout)
        except asyncio.CancelledError:
            served.events.append("cancelled")
            raise
        return web.json_response({"num_bytes": len(body)})

    async def wait(request: web.Request) -> web.StreamResponse:
        served.events.append("waiting")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            served.events.append("cancelled")
            raise
        return web.Response()

    async def fail(request: web.Request) -> web.StreamResponse:
        raise ZeroDivisionError("secret")

    async def large(request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"x" * LARGE)

    async def late(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.5)
        return web.Response(body=b"late")

    async def slow_end(request: web.Request) -> web.StreamResponse:
        return SlowEnd(body=b"sent")

    async def public(request: web.Request) -> web.StreamResponse:
        return web.Response()

    @web.middleware
    async def accept(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.path != "/public":
            accepted.add(request.headers.get("x-key", "nobody"))
            cast(Connection, request.protocol).protect()
        return await handler(request)

    config = ServerConfig(port=0, **settings)
    accepted = AcceptedRequests(config.max_connections, shared=shared)
    app = web.Application(middlewares=[render, accept])
    app.router.add_get("/late", late)
    app.router.add_get("/slow_end", slow_end)
    app.router.add_get("/public", public)
    app.router.add_post("/echo", echo)
    app.router.add_get("/wait", wait)
    app.router.add_get("/fail", fail)
    app.router.add_get("/large", large)
    runner = web.AppRunner(app, **RUNNER_OPTIONS)
    await runner.setup()
    listener = await listen(runner, config, tls)
    served = Served(listener, accepted)
    try:
        yield served
    finally:
        listener.close()
        await runner.cleanup()


def run(
    test: Callable[[], Awaitable[None]],
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop,
) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await test()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(limited())


def with_body(body: bytes, *headers: bytes) -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return POST + lines + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize(
    ("data", "num_bytes"),
    [
        (with_body(b"{}"), 2),
        (with_body(b"{}", b"Content-Type: application/json"), 2),
        (with_body(b"{}", b'Content-Type: APPLICATION/JSON; charset="UTF-8"'), 2),
        (with_body(b"{}", b"Content-Encoding: Identity"), 2),
        (with_body(b""), 0),
        (with_body(b"x" * LIMIT), LIMIT),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 2),
    ],
)
def test_valid_bodies_are_read(data: bytes, num_bytes: int) -> None:
    async def test() -> None:
        async with serving() as served, served.connect() as client:
            for _ in range(2):  # the connection stays
                answer = await client.ask(data)
                assert (answer.status, json.loads(answer.body)) == (200, {"num_bytes": num_bytes})

    run(test)


NOT_HTTP = {
    "length and chunks": POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nab",
    "one length twice": POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nab",
    "negative length": POST + b"Content-Length: -2\r\n\r\nab",
    "endless length": POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
    "length with a sign": POST + b"Content-Length: +2\r\n\r\nab",
    "300 headers": POST + b"".join(b"a%d: b\r\n" % i for i in range(300)) + b"\r\n",
    "9 kB header": POST + b"a: " + b"b" * 9000 + b"\r\n\r\n",
    "9 kB header name": POST + b"b" * 9000 + b": a\r\n\r\n",
    "9 kB URL": b"GET /" + b"b" * 9000 + b" HTTP/1.1\r\nHost: here\r\n\r\n",
    "bad chunk": POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\nab\r\n",
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "noise": bytes(range(1, 256)),
    "NUL in a header": POST + b"a: b\0c\r\n\r\n",
    "space before the colon": POST + b"Content-Length : 2\r\n\r\nab",
}


@pytest.mark.parametrize("data", NOT_HTTP.values(), ids=NOT_HTTP.keys())
def test_malformed_http_gets_a_400_and_is_closed(data: bytes) -> None:
    async def test() -> None:
        async with serving() as served:
            async with served.connect() as client:
                answer = await client.ask(data)
                assert answer.status == 400
                error = answer.error()
                assert error["type"] == "invalid_request_error"
                assert "bbb" not in error["message"]
                assert await client.closed()
            assert (await served.ask(with_body(b"{}"))).status == 200

    run(test)


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (b"Content-Encoding: gzip", "gzip"),
        (b"Content-Encoding: identity\r\nContent-Encoding: br", "br"),
        (b"Content-Type: text/plain", "text/plain"),
        (b"Content-Type: application/x-www-form-urlencoded", "form"),
        (b"Content-Type: application/json; charset=utf-16", "utf-16"),
        (b"Content-Type: " + b"x" * 5000, "xxx"),
        (b"Content-Type:", "Content-Type"),
    ],
)
def test_a_body_that_is_not_json_gets_a_415(header: bytes, word: str) -> None:
    async def test() -> None:
        async with serving() as served, served.connect() as client:
            answer = await client.ask(with_body(b"{}", header))
            assert answer.status == 415
            assert word in answer.error()["message"]
            assert len(answer.body) < 400
            assert (await client.ask(with_body(b"{}"))).status == 200

    run(test)


def test_a_body_is_refused_by_its_declared_length_at_once() -> None:
    async def test() -> None:
        async with serving(body_timeout=10.0) as served, served.connect() as client:
            start = time.monotonic()
            answer = await client.ask(POST + b"Content-Length: 10000000000\r\n\r\nabc")
            assert answer.status == 413
            assert answer.error()["type"] == "request_too_large"
            assert answer.headers["connection"] == "close"
            assert time.monotonic() - start < 1
            assert await client.closed()
            assert time.monotonic() - start < 5

    run(test)


def test_a_chunked_body_is_refused_when_it_gets_too_long() -> None:
    async def test() -> None:
        async with serving() as served, served.connect() as client:
            await client.send(POST + b"Transfer-Encoding: chunked\r\n\r\n")
            for _ in range(LIMIT // 10_000 + 1):
                await client.send(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
            answer = await client.answer()
            assert answer.status == 413
            answer.error()

    run(test)


def test_a_client_that_keeps_sending_after_a_413_can_read_it() -> None:
    async def test() -> None:
        async with serving() as served, served.connect() as client:
            answer = await client.ask(with_body(b"x" * 4_000_000))
            assert answer.status == 413

    run(test)


@pytest.mark.parametrize("header", [b"Content-Length: 99\r\n", b"Transfer-Encoding: chunked\r\n"])
@pytest.mark.parametrize("drip", [b"", b"1\r\nx\r\n"])
def test_a_body_that_never_ends_gets_a_408(header: bytes, drip: bytes) -> None:
    async def test() -> None:
        async with serving(body_timeout=0.3) as served, served.connect() as client:
            start = time.monotonic()
            await client.send(POST + header + b"\r\n" + drip)
            await asyncio.sleep(0.2)
            await client.send(drip)  # some progress buys no time
            answer = await client.answer()
            assert 0.25 < time.monotonic() - start < 2
            assert answer.status == 408
            assert "Request body timed out" in answer.error()["message"]
            assert await client.closed()

    run(test)


def test_a_chunk_that_is_garbled_later_is_refused() -> None:
    """aiohttp does not notify the handler, which waits for the rest until `body_timeout`."""

    async def test() -> None:
        async with serving(body_timeout=0.3) as served, served.connect() as client:
            await client.send(POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
            await asyncio.sleep(0.1)
            await client.send(b"ZZ\r\n")
            answer = await client.answer()
            assert answer.status in (400, 408)
            answer.error()
            assert await client.closed()

    run(test)


@pytest.mark.parametrize("start", [b"", b"POST /ec", POST])
@pytest.mark.parametrize("kept_alive", [False, True])
def test_headers_that_never_end_are_closed(start: bytes, kept_alive: bool) -> None:
    async def test() -> None:
        async with serving(keepalive_timeout=0.4) as served, served.connect() as client:
            if kept_alive:
                await client.ask(with_body(b"{}"))
            started = time.monotonic()
            await client.send(start)
            await asyncio.sleep(0.2)
            if start:
                await client.send(b"o")
            assert await client.closed()
            assert time.monotonic() - started < 2

    run(test)


@pytest.mark.parametrize("body", [b"{}", b"x" * (LIMIT + 1)])
def test_expect_is_answered_before_the_body(body: bytes) -> None:
    async def test() -> None:
        async with serving() as served, served.connect() as client:
            head = with_body(body, b"Expect: 100-continue").removesuffix(body)
            first = await client.ask(head)
            assert first.status == 100
            await client.send(body)
            assert (await client.answer()).status == (200 if body == b"{}" else 413)

    run(test)


def test_an_unknown_expectation_gets_a_json_error() -> None:
    async def test() -> None:
        async with serving() as served:
            answer = await served.ask(with_body(b"{}", b"Expect: tea"))
            assert answer.status == 417
            answer.error()

    run(test)


def test_an_unexpected_exception_reveals_no_details(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving() as served:
            answer = await served.ask(b"GET /fail HTTP/1.1\r\nHost: here\r\n\r\n")
            assert answer.status == 500
            assert answer.error()["message"] == "internal error; the server's log has more"
            assert b"secret" not in answer.body

    run(test)
    assert "ZeroDivisionError" in caplog.text


def test_pipelined_requests_are_answered_in_order() -> None:
    async def test() -> None:
        async with serving() as served, served.connect() as client:
            await client.send(b"".join(with_body(b"x" * size) for size in range(50)))
            for size in range(50):
                assert json.loads((await client.answer()).body) == {"num_bytes": size}

    run(test)


@pytest.mark.parametrize(
    ("data", "event"),
    [
        (b"GET /wait HTTP/1.1\r\nHost: here\r\n\r\n", "waiting"),
        (POST + b"Content-Length: 9\r\n\r\nabc", None),
    ],
)
def test_a_disconnect_cancels_the_handler(data: bytes, event: str | None) -> None:
    async def test() -> None:
        async with serving() as served:
            async with served.connect() as client:
                await client.send(data)
                await asyncio.sleep(0.1)
            while "cancelled" not in served.events:
                await asyncio.sleep(0.01)
            assert served.events == ([event] if event else []) + ["cancelled"]

    run(test)


@pytest.mark.parametrize("loop_factory", LOOPS)
@pytest.mark.parametrize("reads", [False, True])
def test_an_answer_waits_for_a_client_that_reads(
    reads: bool, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """There is no limit on the total time as long as the client reads now and then."""

    async def test() -> None:
        async with serving(write_timeout=0.4) as served, served.connect() as client:
            start = time.monotonic()
            await client.send(b"GET /large HTTP/1.1\r\nHost: here\r\n\r\n")
            await client.reader.readuntil(b"\r\n\r\n")
            left = LARGE
            while reads and time.monotonic() - start < 1.5:
                left -= len(await client.reader.readexactly(1_500_000))
                await asyncio.sleep(0.1)
            if reads:
                await client.reader.readexactly(left)
                return
            while len(served.listener):
                await asyncio.sleep(0.01)

    run(test, loop_factory)


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_a_slow_reader_is_not_dropped(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """It reads far less within `write_timeout` than the system buffers."""

    async def test() -> None:
        loop = asyncio.get_running_loop()
        async with serving(write_timeout=0.5) as served:
            with socket.socket() as slow:
                slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
                slow.setblocking(False)
                await loop.sock_connect(slow, ("127.0.0.1", served.port))
                await loop.sock_sendall(slow, b"GET /large HTTP/1.1\r\nHost: here\r\n\r\n")
                left, start = LARGE, time.monotonic()
                while time.monotonic() - start < 3:
                    left -= len(await loop.sock_recv(slow, 10_000))
                    await asyncio.sleep(0.1)
                assert left > LARGE - 1_000_000
                assert len(served.listener) == 1
                while data := await loop.sock_recv(slow, 2**18):
                    left -= len(data)
                    if left < 0:  # the head is more
                        break
                assert left < 0

    run(test, loop_factory)


Certificate = tuple[ssl.SSLContext, ssl.SSLContext]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """TLS contexts of the server and of its clients."""
    directory = tmp_path_factory.mktemp("tls")
    cert, key = directory / "cert.pem", directory / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1"
    command += f" -subj /CN=here -addext subjectAltName=IP:127.0.0.1 -out {cert} -keyout {key}"
    subprocess.run(command.split(), check=True, capture_output=True)
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_side.load_cert_chain(cert, key)
    return server_side, ssl.create_default_context(cafile=cert)


@pytest.mark.parametrize("loop_factory", LOOPS)
@pytest.mark.parametrize("encrypted", [False, True])
def test_a_request_counts_as_accepted_until_its_last_byte_is_sent(
    encrypted: bool,
    certificate: Certificate,
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    server_side, client_side = certificate if encrypted else (None, None)

    async def test() -> None:
        async with serving(tls=server_side) as served, served.connect(client_side) as client:
            await client.send(b"GET /large HTTP/1.1\r\nHost: here\r\n\r\n")
            await client.reader.readuntil(b"\r\n\r\n")
            await client.reader.readexactly(LARGE // 2)
            await asyncio.sleep(0.3)
            assert len(served.accepted) == 1
            await client.reader.readexactly(LARGE - LARGE // 2)
            async with asyncio.timeout(2):
                await served.accepted.all_answered()
            assert (await client.ask(with_body(b"{}"))).status == 200

    run(test, loop_factory)


LATE = b"GET /late HTTP/1.1\r\nHost: here\r\n\r\n"


@pytest.mark.parametrize("loop_factory", LOOPS)
@pytest.mark.parametrize(
    ("data", "num_answers"), [(LATE, 1), (LATE * 2, 2), (with_body(b"{}"), 1), (b"?\r\n\r\n", 1)]
)
def test_a_half_closed_client_gets_its_answers(
    data: bytes, num_answers: int, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Before a late answer it gets interim responses, which show whether it is still there."""

    async def test() -> None:
        async with serving() as served, served.connect() as client:
            await client.send(data)
            client.writer.write_eof()
            statuses = []
            for _ in range(num_answers):
                while (answer := await client.answer()).status == 100:
                    statuses.append(100)
                statuses.append(answer.status)
            assert statuses.count(100 if b"late" in data else 400 if b"?" in data else 200) > 0
            assert len([status for status in statuses if status != 100]) == num_answers
            assert await client.closed()

    run(test, loop_factory)


@pytest.mark.parametrize("loop_factory", LOOPS)
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_half_closed_client_that_disconnects_is_noticed(
    version: bytes, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Also after a while. An HTTP/1.0 client counts as disconnected at once."""

    async def test() -> None:
        async with serving() as served, served.connect() as client:
            await client.send(WAIT.replace(b"1.1", version))
            client.writer.write_eof()
            await asyncio.sleep(0.3)
            client.writer.transport.abort()
            while "cancelled" not in served.events:
                await asyncio.sleep(0.01)

    run(test, loop_factory)


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_a_client_that_closes_after_the_last_byte_is_noticed(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """FIN arrives after the last byte of the answer, but before the handler is done."""

    async def test() -> None:
        async with serving() as served:
            async with served.connect() as client:
                await client.ask(b"GET /slow_end HTTP/1.1\r\nHost: here\r\n\r\n")
            while len(served.listener):
                await asyncio.sleep(0.01)

    run(test, loop_factory)


def test_the_server_header_names_no_library() -> None:
    async def test() -> None:
        async with serving() as served:
            for data in (with_body(b"{}"), b"?\r\n\r\n", PUBLIC, POST + b"Expect: tea\r\n\r\n"):
                assert (await served.ask(data)).headers["server"] == "specserve"

    run(test)


@asynccontextmanager
async def silent(served: Served, count: int, data: bytes = b"") -> AsyncIterator[list[Client]]:
    """`count` connections that send `data` and nothing else."""
    async with AsyncExitStack() as stack:
        clients = []
        for _ in range(count):
            clients.append(await stack.enter_async_context(served.connect()))
            await clients[-1].send(data)
        yield clients


@pytest.mark.parametrize("loop_factory", LOOPS)
@pytest.mark.parametrize("data", [b"", b"POST /ec", with_body(b"{}")], ids=["none", "head", "used"])
def test_the_oldest_idle_connection_is_replaced(
    data: bytes, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Idle connections block no new one, and the one that has been idle longest is closed first."""

    async def test() -> None:
        places = connection_limit(ServerConfig(max_connections=3))
        async with serving(max_connections=3) as served, silent(served, places, data) as clients:
            while len(served.listener) < places:
                await asyncio.sleep(0.01)
            for _ in range(5):
                assert (await served.ask(with_body(b"{}"))).status == 200
                assert len(served.listener) <= places
            with suppress(ConnectionError):
                await clients[0].reader.read()  # to its end

    run(test, loop_factory)


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_connections_with_accepted_requests_are_kept(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """Further requests are refused; no number of new connections ends the accepted ones."""

    async def test() -> None:
        async with serving(max_connections=3) as served, silent(served, 3, WAIT) as waiting:
            while served.events != ["waiting"] * 3:
                await asyncio.sleep(0.01)
            async with silent(served, 60), silent(served, 60, b"POST /ec"):
                answer = await served.ask(with_body(b"{}"))
                assert answer.status == 503
                assert answer.headers["retry-after"] == "1"
                assert answer.error()["type"] == "overloaded_error"
                assert (await served.ask(PUBLIC)).status == 200
                assert len(served.listener) <= connection_limit(ServerConfig(max_connections=3))
            assert served.events == ["waiting"] * 3
            waiting[0].writer.close()
            while "cancelled" not in served.events:  # and its place came back
                await asyncio.sleep(0.01)
            assert (await served.ask(with_body(b"{}"))).status == 200

    run(test, loop_factory)


def test_no_key_may_hold_all_accepted_requests() -> None:
    async def test() -> None:
        hostile = WAIT.replace(b"\r\n\r\n", b"\r\nx-key: b\r\n\r\n")
        async with serving(max_connections=8, shared=True) as served, silent(served, 20, hostile):
            while len(served.events) < 4:
                await asyncio.sleep(0.01)
            refused = await served.ask(hostile)
            assert refused.status == 503
            assert b"too many requests of this key are open (max_connections 8)" in refused.body
            async with silent(served, 2, WAIT):
                while len(served.events) < 6:
                    await asyncio.sleep(0.01)
                assert (await served.ask(WAIT)).status == 503
            assert (await served.ask(PUBLIC)).status == 200

    run(test)


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_many_simultaneous_connections_are_counted(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def test() -> None:
        async with serving(max_connections=5) as served:

            async def status() -> int:
                try:
                    async with asyncio.timeout(1.5):
                        return (await served.ask(WAIT)).status
                except (ConnectionError, asyncio.IncompleteReadError):
                    return 0  # it gave way to one of those that came at the same time
                except TimeoutError:
                    return 200  # it was accepted, and waits

            statuses = [*await asyncio.gather(*(status() for _ in range(80)))]
            assert statuses.count(200) == 5
            assert statuses.count(503) >= 5
            assert set(statuses) <= {200, 503, 0}

    run(test, loop_factory)


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_tls(
    certificate: Certificate, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    server_side, client_side = certificate

    async def test() -> None:
        async with (
            serving(tls=server_side, max_connections=1) as served,
            served.connect(),  # no handshake, and never one
            served.connect(client_side) as first,
            served.connect(client_side) as second,
        ):
            for _ in range(2):  # the connection stays
                assert (await first.ask(with_body(b"{}"))).status == 200
            await first.send(WAIT)
            while not served.events:
                await asyncio.sleep(0.01)
            assert (await second.ask(with_body(b"{}"))).status == 503

    run(test, loop_factory)


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_connections_without_a_handshake_are_counted(
    certificate: Certificate,
    monkeypatch: pytest.MonkeyPatch,
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """They are replaced like others, and the handshake has a time limit."""
    server_side, client_side = certificate
    monkeypatch.setattr(listener_module, "_HANDSHAKE_S", 1.0)

    async def test() -> None:
        async with (
            serving(tls=server_side, max_connections=3) as served,
            silent(served, 60),
            silent(served, 60, b"\x16\x03\x01\x02"),
        ):
            assert 0 < len(served.listener) <= connection_limit(ServerConfig(max_connections=3))
            async with served.connect(client_side) as client:
                assert (await client.ask(with_body(b"{}"))).status == 200
            while len(served.listener):
                await asyncio.sleep(0.01)

    run(test, loop_factory)


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_a_large_answer_over_tls_waits_for_a_client_that_reads(
    certificate: Certificate, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    server_side, client_side = certificate

    async def test() -> None:
        async with (
            serving(tls=server_side, write_timeout=0.4) as served,
            served.connect(client_side) as reads,
            served.connect(client_side) as deaf,
        ):
            for client in (reads, deaf):
                await client.send(b"GET /large HTTP/1.1\r\nHost: here\r\n\r\n")
                await client.reader.readuntil(b"\r\n\r\n")
            left, start = LARGE, time.monotonic()
            while time.monotonic() - start < 1.5:
                left -= len(await reads.reader.readexactly(500_000))
                await asyncio.sleep(0.1)
            await reads.reader.readexactly(left)
            assert (await reads.ask(with_body(b"{}"))).status == 200
            while len(served.listener) > 1:
                await asyncio.sleep(0.01)

    run(test, loop_factory)
