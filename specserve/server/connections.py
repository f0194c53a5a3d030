"""What aiohttp leaves open: how many connections, how long a body may take, errors as JSON.

Every connection is bounded in number, in time and in size before a handler is asked. Knows the
routes and their bodies only as bytes.
"""

import asyncio
import logging
import math
import ssl
from collections.abc import Callable
from typing import Any, Final, cast

from aiohttp import web

from specserve.config import ServerConfig
from specserve.server.errors import APIError

logger = logging.getLogger(__name__)

_LINGER_S: Final = 1.0  # a client that still sends is heard this long, so that it reads its answer
_SHUTDOWN_S: Final = 2.0  # for handlers to write their last words, once draining is over
_CLOSE: Final = {"Connection": "close"}
_CHARSETS: Final = {None, "utf-8", "utf8", "us-ascii"}


def runner_options(config: ServerConfig) -> dict[str, Any]:
    """For `web.AppRunner`: a client that is gone cancels its handler, nothing waits for ever."""
    return {
        "handler_cancellation": True,
        "shutdown_timeout": _SHUTDOWN_S,
        **_connection_options(config),
    }


async def listen(
    runner: web.AppRunner, config: ServerConfig, tls: ssl.SSLContext | None = None
) -> asyncio.Server:
    """Open the server's port: a site of `runner`, but with at most `max_connections`.

    The runner has to be set up. Close what comes back before `runner.cleanup()`.
    """
    assert runner.server is not None
    door = _Door(runner.server, config)
    return await asyncio.get_running_loop().create_server(
        lambda: _Arrival(door.admit),
        config.host,
        config.port,
        ssl=tls,
        ssl_handshake_timeout=None if tls is None else config.keepalive_timeout,
    )


async def read_body(
    request: web.Request,
    max_bytes: int,
    timeout: float,
    take: Callable[[int], None] = lambda num_bytes: None,
) -> bytes:
    """The whole body, of JSON to be. Raises APIError: 400, 408, 413 or 415, or what `take` raises
    when it is told the size of a piece."""
    _check_headers(request, max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout):
            async for piece in request.content.iter_any():
                if len(body) + len(piece) > max_bytes:
                    raise _too_large(max_bytes)
                take(len(piece))
                body += piece
    except TimeoutError:
        raise APIError(
            408, f"Request body timed out after {timeout:g} s", headers=dict(_CLOSE)
        ) from None
    except web.RequestPayloadError:
        raise APIError(400, "malformed HTTP: the body is cut or garbled") from None
    return bytes(body)


def _check_headers(request: web.Request, max_bytes: int) -> None:
    if request.content_length is not None and request.content_length > max_bytes:
        raise _too_large(max_bytes)
    for encoding in request.headers.getall("Content-Encoding", []):
        if encoding.strip().lower() != "identity":
            raise APIError(
                415, f"Content-Encoding: {encoding[:40]!r} is not supported; send plain JSON"
            )
    if "Content-Type" in request.headers and (
        request.content_type != "application/json"
        or (request.charset and request.charset.lower()) not in _CHARSETS
    ):
        given = request.headers["Content-Type"][:80]
        raise APIError(
            415, f"Content-Type: {given!r} is not supported; send application/json in UTF-8"
        )


def _too_large(max_bytes: int) -> APIError:
    return APIError(413, f"the body is larger than {max_bytes} bytes", headers=dict(_CLOSE))


def _connection_options(config: ServerConfig) -> dict[str, Any]:
    """aiohttp's own bounds on headers are right: 8190 bytes a line, 128 lines."""
    return {
        "keepalive_timeout": config.keepalive_timeout,
        "lingering_time": _LINGER_S,
        "auto_decompress": False,  # `read_body` takes no compressed ones
        "access_log": None,
    }


class _Connection(web.RequestHandler):
    """aiohttp's protocol; but what it answers by itself has OpenAI's form and no traceback.

    A client that takes nothing of its answer for `write_timeout` seconds is dropped: aiohttp would
    wait for it for ever.
    """

    __slots__ = ("_check", "_write_timeout")

    def __init__(self, server: web.Server, write_timeout: float, **options: Any) -> None:
        super().__init__(server, **options)
        self._write_timeout = write_timeout
        self._check: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """From here on, whatever the system does not take at once counts as unsent."""
        super().connection_made(transport)
        cast(asyncio.Transport, transport).set_write_buffer_limits(high=0)

    def pause_writing(self) -> None:
        """The connection holds no more."""
        super().pause_writing()
        self._expect_less_than(math.inf)

    def resume_writing(self) -> None:
        """The client has read enough of it."""
        super().resume_writing()
        self._stop_checking()

    def connection_lost(self, exc: BaseException | None) -> None:
        """The client is gone, or was dropped."""
        self._stop_checking()
        super().connection_lost(exc)

    def _expect_less_than(self, num_unsent: float) -> None:
        assert self.transport is not None
        left = self.transport.get_write_buffer_size()
        if left >= num_unsent:
            self.transport.abort()
            return
        loop = asyncio.get_running_loop()
        self._check = loop.call_later(self._write_timeout, self._expect_less_than, left)

    def _stop_checking(self) -> None:
        if self._check is not None:
            self._check.cancel()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answers bytes that are no HTTP, and what escaped the application."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun; there is no place for an error")
        if status < 500:
            logger.debug("malformed HTTP from %s: %s", request.remote, message)
            reason = (message or "").partition(":")[0]  # what follows repeats the input
            error = APIError(status, f"malformed HTTP: {reason}")
        else:
            logger.error("a request failed", exc_info=exc)
            error = APIError(500, "internal error; the server's log has more")
        response = error.response()
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Sends an answer; one that says so is the connection's last."""
        if isinstance(resp, web.HTTPException):  # raised before any middleware: a strange Expect
            resp = APIError(resp.status, f"{resp.reason}").response()
        if resp.headers.get("Connection") == "close":
            resp.force_close()
        return await super().finish_response(request, resp, start_time)


class _Door:
    """Decides what becomes of a new connection."""

    def __init__(self, server: web.Server, config: ServerConfig) -> None:
        self._server = server
        self._limit = config.max_connections
        self._options = {"write_timeout": config.write_timeout, **_connection_options(config)}
        self._refused: set[_Refusal] = set()

    def admit(self, transport: asyncio.Transport) -> None:
        protocol: asyncio.Protocol
        if len(self._server.connections) < self._limit:
            loop = asyncio.get_running_loop()
            protocol = _Connection(self._server, loop=loop, **self._options)
        elif len(self._refused) < self._limit:
            protocol = _Refusal(self._refused)
        else:
            transport.abort()
            return
        transport.set_protocol(protocol)
        protocol.connection_made(transport)


class _Arrival(asyncio.Protocol):
    """A connection in the moment between being accepted and being counted."""

    def __init__(self, admit: Callable[[asyncio.Transport], None]) -> None:
        self._admit = admit

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._admit(cast(asyncio.Transport, transport))


class _Refusal(asyncio.Protocol):
    """Answers whatever is asked with a 503, and is gone within `_LINGER_S`.

    It waits for the question: closing on a client that still sends would destroy the answer.
    """

    def __init__(self, refused: "set[_Refusal]") -> None:
        self._refused = refused
        self._answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._refused.add(self)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_LINGER_S, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        if self._answered:
            return
        self._answered = True
        self._transport.write(_too_many_connections())
        if self._transport.can_write_eof():
            self._transport.write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._refused.discard(self)


def _too_many_connections() -> bytes:
    body = APIError(503, "too many connections are open; try again in 1 s").body()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
