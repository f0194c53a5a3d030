"""What aiohttp leaves open of a connection: how long a body and an answer may take, errors as JSON.

Every connection is bounded in time and in size before a handler is asked; `door.py` bounds their
number. Knows the routes and their bodies only as bytes.
"""

import asyncio
import logging
import math
import socket
import sys
from collections.abc import Callable
from typing import Any, Final, Protocol, cast

from aiohttp import EMPTY_PAYLOAD, HttpVersion11, web

from specserve.config import ServerConfig
from specserve.server.errors import APIError

logger = logging.getLogger(__name__)

SERVER_NAME: Final = "specserve"  # aiohttp would tell its version
_LINGER_S: Final = 1.0  # a client that still sends is heard this long, so that it reads its answer
_SHUTDOWN_S: Final = 2.0  # for handlers to write their last words, once draining is over
_POLL_S: Final = 0.02  # between looks at what TLS has handed on
_FIRST_LOOK_S: Final = 0.05  # after a client sent its last byte, whether it is there at all
_LONGEST_LOOK_S: Final = 5.0
_INTERIM: Final = b"HTTP/1.1 100 Continue\r\n\r\n"  # which a client has to skip
_ACKNOWLEDGED: Final = slice(120, 128)  # tcpi_bytes_acked of Linux's struct tcp_info
_CLOSE: Final = {"Connection": "close"}
_CHARSETS: Final = {None, "utf-8", "utf8", "us-ascii"}


def runner_options(config: ServerConfig) -> dict[str, Any]:
    """For `web.AppRunner`: a client that is gone cancels its handler, nothing waits for ever."""
    return {
        "handler_cancellation": True,
        "shutdown_timeout": _SHUTDOWN_S,
        **_connection_options(config),
    }


def keep_place(request: web.Request) -> None:
    """From here to the last byte of its answer, nobody else gets the place of its connection."""
    if isinstance(request.protocol, Connection):
        request.protocol.keep_place()


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


class Places(Protocol):
    """Of connections: a newcomer gets one that is offered when there are no others."""

    def keep(self, raw: asyncio.Transport) -> None: ...

    def offer(self, raw: asyncio.Transport) -> None: ...

    def leave(self, raw: asyncio.Transport) -> None: ...


class Connection(web.RequestHandler):
    """aiohttp's protocol; but what it answers by itself has OpenAI's form and no traceback.

    A client that takes nothing of its answer for `write_timeout` seconds is dropped: aiohttp would
    wait for it for ever. One that has sent its last byte still gets its answers.
    """

    __slots__ = ("_check", "_half_closed", "_last_body", "_places", "_raw", "_write_timeout")

    def __init__(
        self, server: web.Server, places: "Places", raw: asyncio.Transport, config: ServerConfig
    ) -> None:
        """`raw` carries the bytes, in clear or not."""
        super().__init__(server, loop=asyncio.get_running_loop(), **_connection_options(config))
        self._places = places
        self._raw = raw
        self._write_timeout = config.write_timeout
        self._check: asyncio.TimerHandle | None = None
        self._half_closed = False
        self._last_body = EMPTY_PAYLOAD

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """From here on, whatever the system does not take at once counts as unsent."""
        super().connection_made(transport)
        # TLS pauses at `high` bytes, plain transports above.
        high = 0 if transport is self._raw else 1
        cast(asyncio.Transport, transport).set_write_buffer_limits(high=high, low=0)

    def keep_place(self) -> None:
        """Until its answer is out, the request of this task keeps the connection's place."""
        task = asyncio.current_task()
        assert task is not None
        self._places.keep(self._raw)
        task.add_done_callback(lambda _: self._places.offer(self._raw))

    def data_received(self, data: bytes) -> None:
        """More of requests."""
        super().data_received(data)
        if self._messages:
            self._last_body = self._messages[-1][1]

    def pause_writing(self) -> None:
        """The connection holds no more."""
        super().pause_writing()
        self._expect_more_than(-math.inf)

    def resume_writing(self) -> None:
        """The client has read enough of it."""
        super().resume_writing()
        self._stop_checking()

    def connection_lost(self, exc: BaseException | None) -> None:
        """The client is gone, or was dropped."""
        self._stop_checking()
        self._places.leave(self._raw)
        super().connection_lost(exc)

    def _expect_more_than(self, taken: float) -> None:
        now = self._num_taken()
        if now <= taken:
            self._raw.abort()
            return
        self._check = self._loop.call_later(self._write_timeout, self._expect_more_than, now)

    def _stop_checking(self) -> None:
        if self._check is not None:
            self._check.cancel()
            self._check = None

    def _num_taken(self) -> int:
        """A number that grows while the client takes something.

        That is what its system has acknowledged; where ours does not tell, what ours has taken, in
        large steps.
        """
        if sys.platform == "linux":
            sock = self._raw.get_extra_info("socket")
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKNOWLEDGED.stop)
            if len(info) == _ACKNOWLEDGED.stop:
                return int.from_bytes(info[_ACKNOWLEDGED], sys.byteorder)
        return -self._num_unsent()

    def _num_unsent(self) -> int:
        """Bytes that the system has not taken yet."""
        if self.transport is None:
            return 0
        encrypted = 0 if self.transport is self._raw else self._raw.get_write_buffer_size()
        return self.transport.get_write_buffer_size() + encrypted

    async def _all_sent(self) -> None:
        """Return when the system has everything. TLS says so when it has encrypted everything."""
        if self._num_unsent():
            self._expect_more_than(-math.inf)
            while self._num_unsent():
                await asyncio.sleep(_POLL_S)
            self._stop_checking()

    def eof_received(self) -> bool:  # type: ignore[override]  # aiohttp's never keeps it
        """The client sends no more: it waits for its answer, or is gone, which looks alike.

        True keeps the connection. TLS has no such state, and a body that is cut has no answer.
        """
        if self.transport is not self._raw or self._is_idle or not self._last_body.is_eof():
            return False
        if not self._half_closed:
            self._half_closed = True
            self._loop.call_later(_FIRST_LOOK_S, self._look_for_client, _FIRST_LOOK_S)
        return True

    @property
    def _is_idle(self) -> bool:
        return self._waiter is not None and not self._waiter.done()

    def _look_for_client(self, waited: float) -> None:
        """Only who is still there takes what is written: an interim answer, so often that nothing
        is computed for long for nobody. HTTP/1.0 has none, so its clients have to listen."""
        if self.transport is None or self.transport.is_closing():
            return
        if self._is_idle:  # everything is answered, and no more will come
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
        pause = min(2 * waited, _LONGEST_LOOK_S)
        self._loop.call_later(pause, self._look_for_client, pause)

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
        """Sends an answer, to its last byte; one that says so is the connection's last."""
        if isinstance(resp, web.HTTPException):  # raised before any middleware: a strange Expect
            resp = APIError(resp.status, f"{resp.reason}").response()
        resp.headers.setdefault("Server", SERVER_NAME)
        if resp.headers.get("Connection") == "close":
            resp.force_close()
        if self._half_closed and not self._messages:
            resp.force_close()
        finished = await super().finish_response(request, resp, start_time)
        await self._all_sent()
        return finished
