"""Sends one request of the soak test, cuts it off if it is to be cut off, and checks the answer.

It parses event streams with code of its own, not with `specserve.client`.
"""

import asyncio
import json
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
from msgspec import Struct

from specserve_evals.soak_requests import Cut, Shot

_LONGEST_S: Final = 300.0  # seconds; an answer that takes longer is an error
_FINISHED: Final = {"stop", "length"}  # finish reasons of a complete answer


class Answer(Struct, frozen=True):
    """The result of a request: it finished, this client cut it off, or there was an error."""

    ids: tuple[tuple[int, ...], ...] = ()  # per choice
    cut: Cut | None = None
    error: str | None = None


def open_session() -> aiohttp.ClientSession:
    """A session without a limit on the number of connections."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


async def fire(session: aiohttp.ClientSession, url: str, shot: Shot) -> Answer:
    """Send the request, and close the connection at the point that `shot.cut` names.

    A request that is answered before that point is not cut off.
    """
    if shot.cut == "sending":
        await _hang_up_while_sending(url, shot)
        return Answer(cut=shot.cut)
    by_time = shot.cut == "waiting" or (shot.cut is not None and not shot.is_stream)
    seconds = shot.seconds if by_time else _LONGEST_S
    try:
        async with asyncio.timeout(seconds):
            async with session.post(url + shot.path, json=shot.body) as response:
                if response.status != 200:
                    return Answer(error=f"{response.status}: {(await response.text())[:300]}")
                if shot.is_stream:
                    return await _read_stream(response, shot)
                return _checked(_Reading(await response.json()), shot)
    except TimeoutError:
        if by_time:
            return Answer(cut=shot.cut)
        return Answer(error=f"no complete answer within {seconds:g} s")
    except (aiohttp.ClientError, ConnectionError) as error:
        return Answer(error=f"{type(error).__name__}: {error}")


class _Reading:
    """The content of an answer so far."""

    def __init__(self, whole: dict[str, Any] | None = None) -> None:
        self.ids: dict[int, list[int]] = {}
        self.finished: dict[int, str] = {}
        self.num_tokens: int | None = None
        self.error: str | None = None
        self.done = whole is not None
        if whole is not None:
            self.take(whole)

    def take(self, message: dict[str, Any]) -> None:
        if "error" in message:
            self.error = message["error"]["message"]
        if message.get("usage"):
            self.num_tokens = message["usage"]["completion_tokens"]
        for choice in message.get("choices", ()):
            self.ids.setdefault(choice["index"], []).extend(choice.get("token_ids", ()))
            if choice["finish_reason"] is not None:
                self.finished[choice["index"]] = choice["finish_reason"]


async def _read_stream(response: aiohttp.ClientResponse, shot: Shot) -> Answer:
    reading = _Reading()
    wanted = {"first event": 1, "middle": shot.num_events}.get(shot.cut or "")
    num_events = 0
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        data = line.removeprefix(b"data: ").strip()
        reading.done = data == b"[DONE]"
        if not reading.done:
            reading.take(json.loads(data))
        num_events += 1
        if num_events == wanted and not reading.done:
            response.close()
            return Answer(cut=shot.cut)
    return _checked(reading, shot)


def _checked(reading: _Reading, shot: Shot) -> Answer:
    """The answer, with an error if it is incomplete or contradicts itself."""
    ids = tuple(tuple(reading.ids[choice]) for choice in sorted(reading.ids))
    error = reading.error
    if error is None and not reading.done:
        error = "the stream ended without [DONE]"
    elif error is None and len(reading.finished) != shot.num_choices:
        error = f"{len(reading.finished)} of {shot.num_choices} choices finished"
    elif error is None and not set(reading.finished.values()) <= _FINISHED:
        error = f"finish_reason {sorted(set(reading.finished.values()))}"
    elif error is None and reading.num_tokens not in (None, sum(map(len, ids))):
        error = f"{sum(map(len, ids))} tokens arrived, the usage says {reading.num_tokens}"
    return Answer(ids, error=error)


async def _hang_up_while_sending(url: str, shot: Shot) -> None:
    """Send the headers and half of the body, wait `shot.seconds`, close the connection."""
    address = urlsplit(url)
    body = json.dumps(shot.body).encode()
    head = (
        f"POST {shot.path} HTTP/1.1\r\nHost: {address.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    _, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(head.encode() + body[: len(body) // 2])
    await asyncio.sleep(shot.seconds)
    writer.close()
