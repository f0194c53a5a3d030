"""A streamed answer: decodes the bytes of a connection to deltas and collects the result."""

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, Self

import aiohttp

from specserve.client.answers import Answer, Collector, read_json
from specserve.client.connection import Call, Connection, Deadline
from specserve.client.errors import (
    GenerationFailed,
    SpecserveError,
    StreamBroken,
    UnexpectedAnswer,
    quote,
)
from specserve.client.sse import SSEDecoder
from specserve.client.types import Completion, Delta

_LAST_BYTES_S: Final = 0.1  # seconds to wait for the end of the body after [DONE]


class AsyncStream:
    """`Stream` for asyncio, used in `async with` and `async for`; it is closed by `aclose`."""

    def __init__(self, connection: Connection, call: Call) -> None:
        self._connection = connection
        self._call = call
        self._deadline: Deadline | None = None
        self._response: aiohttp.ClientResponse | None = None
        self._decoder = SSEDecoder()
        self._collector = Collector()
        self._arrived: deque[Delta] = deque()
        self._failure: SpecserveError | None = None
        self._complete = False
        self._closed = False

    async def open(self) -> None:
        """Send the request now instead of on first use. Raises SpecserveError."""
        with self._closing_at_end():
            await self._connected()

    async def result(self) -> Completion:
        """Read the rest and return the whole answer. Raises SpecserveError."""
        while not self._over:
            await self._advance()
        if self._failure is not None:
            raise self._failure
        if not self._complete:
            raise StreamBroken("the stream was closed before its end, so there is no result")
        return self._collector.completion()

    async def batch(self) -> list[Delta]:
        """Wait for deltas and return all that have come, none at the end. Raises SpecserveError."""
        await self._fill()
        deltas = list(self._arrived)
        self._arrived.clear()
        return deltas

    async def aclose(self) -> None:
        """Close the connection. Further calls have no effect."""
        self.abandon()

    def abandon(self) -> None:
        """`aclose` as a plain function, to be called in the thread of the loop."""
        self._closed = True
        if self._response is not None:
            self._response.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        await self._fill()
        if not self._arrived:
            raise StopAsyncIteration
        return self._arrived.popleft()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.abandon()

    def __del__(self) -> None:
        response, loop = self._response, self._connection.loop
        if response is not None and loop is not None and not self._over:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(response.close)

    @property
    def _over(self) -> bool:
        return self._complete or self._closed or self._failure is not None

    async def _fill(self) -> None:
        """Wait for a delta or the end of the stream. Without a delta, raises the stored error."""
        while not self._arrived and not self._over:
            await self._advance()
        if not self._arrived and self._failure is not None:
            raise self._failure

    async def _advance(self) -> None:
        """Read and decode the next bytes. An error is stored, so that earlier deltas come first."""
        with suppress(SpecserveError), self._closing_at_end():
            response = await self._connected()
            chunk = await self._read(response)
            for data in self._decoder.feed(chunk):
                if not self._complete:
                    self._take(data)
            if self._complete:
                await self._let_go(response)
            elif not chunk:
                raise StreamBroken(f"{self._connection.url} ended its stream without [DONE]")

    @contextmanager
    def _closing_at_end(self) -> Iterator[None]:
        """Closes the stream on any exception, and stores a SpecserveError in `_failure`."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, SpecserveError):
                self._failure = error
            self.abandon()
            raise

    async def _connected(self) -> aiohttp.ClientResponse:
        if self._response is not None:
            return self._response
        if self._closed:
            raise StreamBroken("the stream is closed; ask for a new one")
        self._deadline = self._connection.deadline(self._call)
        self._response = await self._connection.open(self._call, self._deadline)
        if self._response.content_type != "text/event-stream":
            body = await self._read(self._response)
            raise UnexpectedAnswer(f"{self._connection.url} sent no events: {quote(body)!r}")
        return self._response

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        assert self._deadline is not None
        async with self._deadline.limit():
            try:
                return await response.content.readany()
            except (aiohttp.ClientError, OSError) as error:
                raise StreamBroken(f"{self._connection.url} hung up within its stream") from error

    def _take(self, data: bytes) -> None:
        """Process the data of one event."""
        if data == b"[DONE]":
            self._complete = True
            return
        answer = read_json(data, Answer)
        if answer.error is not None:
            detail = answer.error
            message = detail.message or "the server gave no reason"
            raise GenerationFailed(message, param=detail.param, code=detail.code)
        self._arrived.extend(self._collector.add(answer))

    async def _let_go(self, response: aiohttp.ClientResponse) -> None:
        """Read to the end of the body, if it comes soon, so that the connection can be reused."""
        with suppress(TimeoutError, aiohttp.ClientError, OSError):
            async with asyncio.timeout(_LAST_BYTES_S):
                while await response.content.readany():
                    pass
        response.release()
