"""Turns in the event loop: one request body per API key is handled in each iteration of the loop.

Decoding a small body takes up to 10 ms in the event loop. If a key sends 100 such bodies at a time,
the requests of the other keys wait for one of them, not for all.
"""

import asyncio
from collections import defaultdict


class Turns:
    """The turns of all keys, if there are several (`shared`); otherwise nobody waits."""

    def __init__(self, *, shared: bool) -> None:
        self._shared = shared
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def wait(self, key: str) -> None:
        """Return in an iteration of the event loop in which no other request of `key` does."""
        if not self._shared:
            return
        async with self._locks[key]:
            await asyncio.sleep(0)
