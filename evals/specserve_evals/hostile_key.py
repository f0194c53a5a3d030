"""Attacks a server with the API key of a hostile client, until standard input ends.

python -m specserve_evals.hostile_key URL KEY SEED ATTACK...

It runs in a process of its own, so that generating the requests does not delay the client that is
measured. At the end it prints, as JSON, how often each attack received each status. The server may
refuse any of these requests, so the statuses are counted and not judged.
"""

import asyncio
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
from msgspec import Struct

from specserve_evals.soak_requests import words

# Seconds to wait after an answer other than 200; without it the client's own work dominates.
_REFUSED_PAUSE_S: Final = 0.05
_LEAVE_AFTER_S: Final = 0.2  # seconds until "clients that leave" close their connections
_NUM_SILENT: Final = 64  # connections that send only the first line of a request
_SILENT_S: Final = 5.0  # seconds for which those connections stay open
_ANSWERS = dict[str, Counter[str]]  # attack -> status -> number


class Attack(Struct, frozen=True):
    """Requests to one path, sent repeatedly by `num_tasks` concurrent tasks."""

    path: str
    num_tasks: int
    make_body: Callable[[Random], dict[str, Any] | bytes]
    fresh: bool = True  # a new body for every request; False (large bodies): one body per task
    leave_after: float | None = None  # seconds until the client closes the connection


def _ids(rng: Random, count: int) -> list[int]:
    """Random token ids, so that no two prompts share a prefix."""
    return [rng.randrange(256, 512) for _ in range(count)]


ATTACKS: Final[dict[str, Attack]] = {
    "many sequences": Attack(
        path="/v1/completions",
        num_tasks=3,
        make_body=lambda rng: {
            "prompt": words(rng, 40),
            "n": rng.choice((36, 128)),
            "max_tokens": 300,
            "ignore_eos": True,
        },
    ),
    "long prompts": Attack(
        path="/v1/completions",
        num_tasks=4,
        make_body=lambda rng: {"prompt": _ids(rng, 4000), "max_tokens": 4},
    ),
    "high priority": Attack(
        path="/v1/completions",
        num_tasks=8,
        make_body=lambda rng: {
            "prompt": words(rng, 200),
            "max_tokens": 200,
            "ignore_eos": True,
            "priority": 1000,
        },
    ),
    "many stop strings": Attack(
        path="/v1/completions",
        num_tasks=1,
        make_body=lambda rng: {
            "prompt": words(rng, 40),
            "n": 128,
            "max_tokens": 40,
            "stop": [words(rng, 1000) for _ in range(16)],
        },
    ),
    "large texts": Attack(
        path="/tokenize",
        num_tasks=4,
        make_body=lambda rng: {"prompt": words(rng, 100) * 70_000},
        fresh=False,
    ),
    "nested JSON": Attack(
        path="/v1/completions",
        num_tasks=2,
        make_body=lambda rng: b'{"x": [' + b"[]," * 2_000_000 + b"[]]}",
        fresh=False,
    ),
    "many ids": Attack(
        path="/detokenize",
        num_tasks=2,
        make_body=lambda rng: {"tokens": _ids(rng, 1_000_000)},
        fresh=False,
    ),
    "clients that leave": Attack(
        path="/v1/chat/completions",
        num_tasks=8,
        make_body=lambda rng: {
            "messages": [{"role": "user", "content": words(rng, 2000)}],
            "max_tokens": 300,
            "stream": True,
        },
        leave_after=_LEAVE_AFTER_S,
    ),
}


async def attack(url: str, key: str, seed: str, names: Sequence[str], answers: _ANSWERS) -> None:
    """Run the named attacks concurrently until cancelled. `answers` is filled in place."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session,
        asyncio.TaskGroup() as group,
    ):
        group.create_task(_hold_connections(url))
        for name in names:
            each = ATTACKS[name]
            for number in range(each.num_tasks):
                rng = Random(f"{seed}/{name}/{number}")
                counts = answers.setdefault(name, Counter())
                group.create_task(_repeat(session, url, each, rng, counts))


async def _repeat(
    session: aiohttp.ClientSession, url: str, each: Attack, rng: Random, counts: Counter[str]
) -> None:
    body = _encoded(each, rng)
    while True:
        status = await _send(session, url + each.path, body, each.leave_after)
        counts[status] += 1
        if status != "200":
            await asyncio.sleep(_REFUSED_PAUSE_S)
        if each.fresh:
            body = _encoded(each, rng)


def _encoded(each: Attack, rng: Random) -> bytes:
    body = each.make_body(rng)
    return body if isinstance(body, bytes) else json.dumps(body).encode()


async def _send(
    session: aiohttp.ClientSession, url: str, body: bytes, leave_after: float | None
) -> str:
    """The status code, "left" if `leave_after` seconds passed first, or the exception's name."""
    try:
        async with (
            asyncio.timeout(leave_after),
            session.post(url, data=io.BytesIO(body)) as response,
        ):
            await response.read()
            return str(response.status)
    except TimeoutError:
        return "left"
    except (aiohttp.ClientError, ConnectionError) as error:
        return type(error).__name__


async def _hold_connections(url: str) -> None:
    """Open connections, send only the first line of a request on each, close them, and repeat."""
    address = urlsplit(url)
    while True:
        writers: list[asyncio.StreamWriter] = []
        try:
            for _ in range(_NUM_SILENT):
                _, writer = await asyncio.open_connection(address.hostname, address.port)
                writers.append(writer)
                writer.write(b"POST /v1/completions HTTP/1.1\r\n")
            await asyncio.sleep(_SILENT_S)
        except OSError:
            await asyncio.sleep(_REFUSED_PAUSE_S)
        finally:
            for writer in writers:
                writer.close()


_NICE: Final = 19  # a real attacker would not use the server's processors


async def _main(url: str, key: str, seed: str, *names: str) -> None:
    os.nice(_NICE)
    answers: _ANSWERS = {}
    attacking = asyncio.create_task(attack(url, key, seed, names, answers))
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    await asyncio.wait([attacking, ended], return_when=asyncio.FIRST_COMPLETED)
    if attacking.done():
        await attacking
    attacking.cancel()
    await asyncio.wait([attacking])
    print(json.dumps(answers))


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
