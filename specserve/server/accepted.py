"""Counts accepted requests, each from its authorisation to the last byte of its answer.

A drain waits for every accepted request, and the connection of an accepted request is never closed
to make room for a new one. The number of accepted requests is therefore bounded.
"""

import asyncio
from typing import Final

from specserve.fair_share import room
from specserve.server.errors import APIError

_RETRY_S: Final = 1.0  # seconds, for Retry-After


class AcceptedRequests:
    """At most `limit` requests at a time; with `shared` (several API keys), no key may hold all."""

    def __init__(self, limit: int, *, shared: bool) -> None:
        self._limit = limit
        self._shared = shared
        self._keys: dict[asyncio.Task[object], str] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: str) -> None:
        """Accept the request that the current task handles; it counts until that task is done.

        The task is done when the last byte of the answer is written. Raises APIError (503) if this
        key, or all keys together, have too many accepted requests.
        """
        own = list(self._keys.values()).count(key)
        if not room(self._limit, len(self), own, shared=self._shared):
            whose = "of this key" if self._shared else "on this server"
            raise APIError.unavailable(
                f"too many requests {whose} are open (max_connections {self._limit}); "
                f"try again in {_RETRY_S:.0f} s",
                _RETRY_S,
            )
        task = asyncio.current_task()
        assert task is not None
        self._keys[task] = key
        task.add_done_callback(self._keys.pop)

    async def all_answered(self) -> None:
        """Return when no accepted request is left."""
        while self._keys:
            await asyncio.wait(self._keys)
