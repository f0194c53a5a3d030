"""One client connection: the limits and error responses that aiohttp lacks.

Bounds the size and time of a request's body and the time a client may take to read its answer;
`listener.py` bounds the number of connections. It sees bodies and answers only as bytes.
"""

import asyncio
import logging
import math
import socket
import sys
from collections.abc import Callable
from typing import Any, Final, cast

from aiohttp import EMPTY_PAYLOAD, HttpVersion11, web

from specserve.config import ServerConfig
from specserve.server.errors import APIError

logger = logging.getLogger(__name__)

SERVER_NAME: Final = "specserve"  # aiohttp's default would reveal its version
# Seconds that a body is still read after an early answer, so that the client can read that answer.
_LINGER_S: Final = 1.0
_POLL_S: Final = 0.02  # seconds between checks whether an answer has been sent entirely
_FIRST_PROBE_S: Final = 0.05  # seconds from a client's FIN to the first check that it is alive
_MAX_PROBE_S: Final = 5.0  # seconds; the interval of these checks doubles up to this
_INTERIM: Final = b"HTTP/1.1 100 Continue\r\n\r\n"  # HTTP clients must skip interim responses
_ACKNOWLEDGED: Final = slice(120, 128)  # bytes of tcpi_bytes_acked in Linux's struct tcp_info
# Options for `web.AppRunner`: a client that disconnects cancels its handler; seconds that handlers
# get to end their answers after a drain.
RUNNER_OPTIONS: Final[dict[str, Any]] = {"handler_cancellation": True, "shutdown_timeout": 2.0}
# Open connections, and whether they have an accepted request, which protects them from replacement.
# Of those that have none, the first has had none for the longest.
OpenConnections = dict[asyncio.Transport, bool]
_CHARSETS: Final = {None, "utf-8", "utf8", "us-ascii"}


async def read_body(
    request: web.Request,
    max_bytes: int,
    timeout: float,
    take: Callable[[int], None] = lambda num_bytes: None,
) -> bytes:
    """The whole body, at most `max_bytes` long and received within `timeout` seconds.

    `take` is called with the number of bytes of each part before the part is stored. Raises
    APIError: 400 (cut or malformed), 408 (`timeout`), 413 (too large), 415 (a Content-Type or
    Content-Encoding that is not plain JSON in UTF-8), and whatever `take` raises.
    """
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
        message = f"Request body timed out after {timeout:g} s"
        raise APIError(408, message, headers={"Connection": "close"}) from None
    except web.RequestPayloadError:
        raise APIError(400, "malformed HTTP: the body is cut or garbled") from None
    return bytes(body)


def _check_headers(request: web.Request, max_bytes: int) -> None:
    if request.content_length is not None and request.content_length > max_bytes:
        raise _too_large(max_bytes)
    for encoding in request.headers.getall("Content-Encoding", []):
        if encoding.strip().lower() != "identity":
            message = f"Content-Encoding: {encoding[:40]!r} is not supported; send plain JSON"
            raise APIError(415, message)
    # Browsers send a body without Content-Type to any server, without asking it first (CORS).
    if ("Content-Type" in request.headers or "Origin" in request.headers) and (
        request.content_type != "application/json"
        or (request.charset and request.charset.lower()) not in _CHARSETS
    ):
        given = request.headers.get("Content-Type", "")[:80]
        message = f"Content-Type: {given!r} is not supported; send application/json in UTF-8"
        raise APIError(415, message)


def _too_large(max_bytes: int) -> APIError:
    message = f"the body is larger than {max_bytes} bytes"
    return APIError(413, message, headers={"Connection": "close"})


class Connection(web.RequestHandler):
    """aiohttp's protocol, with three changes.

    Errors that aiohttp answers by itself have OpenAI's form and no traceback. A client that reads
    nothing of its answer for `write_timeout` seconds is dropped; aiohttp would wait forever. A
    client that has closed its sending side (FIN) still gets its answers.
    """

    __slots__ = (
        "_connections",
        "_half_closed",
        "_last_body",
        "_progress_timer",
        "_raw",
        "_write_timeout",
    )

    def __init__(
        self,
        server: web.Server,
        connections: OpenConnections,
        raw: asyncio.Transport,
        config: ServerConfig,
    ) -> None:
        """`raw` is the TCP transport, also below TLS."""
        # aiohttp's own limits on headers are kept: 8190 bytes per line, 128 lines.
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=config.keepalive_timeout,
            lingering_time=_LINGER_S,
            auto_decompress=False,  # `read_body` refuses compressed bodies
            access_log=cast(logging.Logger, None),  # None: no log
        )
        self._connections = connections
        self._raw = raw
        self._write_timeout = config.write_timeout
        self._progress_timer: asyncio.TimerHandle | None = None
        self._half_closed = False
        self._last_body = EMPTY_PAYLOAD

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Set the write limits so that `pause_writing` is called as soon as any byte is unsent."""
        super().connection_made(transport)
        # TLS transports pause at `high` buffered bytes, plain ones above `high`.
        high = 0 if transport is self._raw else 1
        cast(asyncio.Transport, transport).set_write_buffer_limits(high=high, low=0)

    def protect(self) -> None:
        """Protect the connection from replacement until the current task has sent its answer."""
        task = asyncio.current_task()
        assert task is not None
        if self._raw in self._connections:
            self._connections[self._raw] = True
        task.add_done_callback(self._unprotect)

    def _unprotect(self, _: object) -> None:
        if self._raw in self._connections:
            del self._connections[self._raw]
            self._connections[self._raw] = False  # behind the others

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._messages:
            self._last_body = self._messages[-1][1]

    def pause_writing(self) -> None:
        super().pause_writing()
        self._check_progress(-math.inf)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_checking()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_checking()
        self._connections.pop(self._raw, None)
        super().connection_lost(exc)

    def _check_progress(self, before: float) -> None:
        now = self._read_progress()
        if now <= before:
            self._raw.abort()
            return
        self._progress_timer = self._loop.call_later(self._write_timeout, self._check_progress, now)

    def _stop_checking(self) -> None:
        if self._progress_timer is not None:
            self._progress_timer.cancel()
            self._progress_timer = None

    def _read_progress(self) -> int:
        """A number that grows while the client reads.

        On Linux: bytes that the client's TCP has acknowledged. Elsewhere: minus the bytes that the
        local system has not taken yet, which changes in large steps.
        """
        if sys.platform == "linux":
            sock = self._raw.get_extra_info("socket")
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKNOWLEDGED.stop)
            if len(info) == _ACKNOWLEDGED.stop:
                return int.from_bytes(info[_ACKNOWLEDGED], sys.byteorder)
        return -self._num_unsent()

    def _num_unsent(self) -> int:
        """Bytes that the local system has not taken yet."""
        if self.transport is None:
            return 0
        encrypted = 0 if self.transport is self._raw else self._raw.get_write_buffer_size()
        return self.transport.get_write_buffer_size() + encrypted

    async def _all_sent(self) -> None:
        """Return when the local system has taken all bytes, those that TLS encrypted included."""
        if self._num_unsent():
            self._check_progress(-math.inf)
            while self._num_unsent():
                await asyncio.sleep(_POLL_S)
            self._stop_checking()

    def eof_received(self) -> bool:  # type: ignore[override]  # aiohttp's returns None
        """The client sent FIN: it may wait for its answer or be gone; TCP does not tell which.

        Returns True to keep the connection. Returns False (close) for TLS, which has no half-closed
        state, for an idle connection, and when the last body is incomplete.
        """
        if self.transport is not self._raw or self._is_idle or not self._last_body.is_eof():
            return False
        if not self._half_closed:
            self._half_closed = True
            self._loop.call_later(_FIRST_PROBE_S, self._probe_client, _FIRST_PROBE_S)
        return True

    @property
    def _is_idle(self) -> bool:
        return self._waiter is not None and not self._waiter.done()

    def _probe_client(self, waited: float) -> None:
        """Close a half-closed connection if its client is gone or everything is answered.

        As long as no answer has begun, each check writes an interim response (100): if the client
        is gone, this causes a socket error that the next check finds. HTTP/1.0 has no interim
        responses, so that an unanswered HTTP/1.0 request is dropped. The interval doubles up to
        `_MAX_PROBE_S`.
        """
        if self.transport is None or self.transport.is_closing():
            return
        if self._is_idle:  # all requests are answered, and no more can come
            self.force_close()
            return
        request = self._current_request
        unanswered = request is not None and request.writer.output_size == 0
        outdated = request is not None and request.version < HttpVersion11
        sock = self._raw.get_extra_info("socket")
        if (unanswered and outdated) or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._raw.abort()
            return
        if unanswered:
            self.transport.write(_INTERIM)
        pause = min(2 * waited, _MAX_PROBE_S)
        self._loop.call_later(pause, self._probe_client, pause)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The response to malformed HTTP, or to an exception that left the application.

        Raises ConnectionError if an answer has begun already.
        """
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun; there is no place for an error")
        if status < 500:
            logger.debug("malformed HTTP from %s: %s", request.remote, message)
            reason = (message or "").partition(":")[0]  # the rest quotes the input
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
        """Send an answer and wait for its last byte; `Connection: close` closes after it."""
        if isinstance(resp, web.HTTPException):  # before any middleware: unknown Expect
            resp = APIError(resp.status, f"{resp.reason}").response()
        resp.headers.setdefault("Server", SERVER_NAME)
        if resp.headers.get("Connection") == "close":
            resp.force_close()
        if self._half_closed and not self._messages:
            resp.force_close()
        finished = await super().finish_response(request, resp, start_time)
        await self._all_sent()
        return finished
