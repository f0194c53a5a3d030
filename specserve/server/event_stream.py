"""Server-sent events: a `data:` line per message, keep-alive comments, and a final [DONE]."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Final, TypeVar

import msgspec
from aiohttp import web

KEEP_ALIVE_S: Final = 15.0  # seconds without an event before a comment is sent
_PAD_TO: Final = 512  # bytes; the JSON of obfuscated events is padded to a multiple of this

T = TypeVar("T")
_encoder = msgspec.json.Encoder()


class EventStream:
    """Writes events to the client.

    The status is sent with the first event, so that an error before it can still be a 4xx or 5xx.
    Writing waits for a client that reads slowly, and raises ConnectionError if it disconnected.
    """

    def __init__(self, request: web.Request, headers: dict[str, str]) -> None:
        self._request = request
        self.response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                **headers,
            }
        )

    async def send(self, *messages: msgspec.Struct) -> None:
        """One event per message, in one write."""
        await self._write(b"".join(b"data: %b\n\n" % _encoder.encode(m) for m in messages))

    async def send_json(self, body: bytes) -> None:
        await self._write(b"data: %b\n\n" % body)

    async def comment(self, text: str) -> None:
        await self._write(f": {text}\n\n".encode())

    async def end(self) -> None:
        await self._write(b"data: [DONE]\n\n")
        await self.response.write_eof()

    async def _write(self, data: bytes) -> None:
        if not self.response.prepared:
            await self.response.prepare(self._request)
        await self.response.write(data)


def padding(message: msgspec.Struct) -> str:
    """The value of `obfuscation` that makes the message's JSON a multiple of `_PAD_TO` bytes.

    This hides the length of the text. `message` must hold an empty `obfuscation`.
    """
    return secrets.token_hex(_PAD_TO)[: -len(_encoder.encode(message)) % _PAD_TO]


async def with_heartbeats(
    source: AsyncIterator[T], seconds: float
) -> AsyncGenerator[T | None, None]:
    """The items of `source`, and None whenever none arrives for `seconds`."""
    pending: asyncio.Task[T] | None = None
    try:
        while True:
            if pending is None:
                pending = asyncio.ensure_future(_next(source))
            done, _ = await asyncio.wait({pending}, timeout=seconds)
            if not done:
                yield None
                continue
            try:
                item = pending.result()
            except StopAsyncIteration:
                return
            pending = None
            yield item
    finally:
        if pending is not None:  # if done, `gather` retrieves its exception
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)


async def _next(source: AsyncIterator[T]) -> T:
    return await anext(source)
