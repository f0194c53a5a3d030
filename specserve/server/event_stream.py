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

    async def send(self, *messages: bytes) -> None:
        """One event per message (JSON), in one write."""
        await self._write(b"".join(b"data: %b\n\n" % message for message in messages))

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
    return secrets.token_hex(_PAD_TO)[: -len(msgspec.json.encode(message)) % _PAD_TO]


async def with_heartbeats(
    source: AsyncIterator[T], seconds: float
) -> AsyncGenerator[T | None, None]:
    """The items of `source`, and None whenever none arrives for `seconds`."""
    pending = asyncio.ensure_future(anext(source))
    try:
        while True:
            done, _ = await asyncio.wait({pending}, timeout=seconds)
            if not done:
                yield None
                continue
            try:
                item = pending.result()
            except StopAsyncIteration:
                return
            yield item
            pending = asyncio.ensure_future(anext(source))
    finally:
        pending.cancel()
        await asyncio.gather(pending, return_exceptions=True)  # also if it has ended with an error
