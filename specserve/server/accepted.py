"""Accepted requests: from authorisation to the last byte of the answer.

What is accepted is answered before the server stops, and no connection of it is closed for others.
So there is a bound.
"""

import asyncio
from collections import Counter

from specserve.fair_share import room
from specserve.server.errors import APIError


class AcceptedRequests:
    """At most `limit` at a time. `shared`: there are several keys, so none may have all places."""

    def __init__(self, limit: int, *, shared: bool) -> None:
        self._limit = limit
        self._shared = shared
        self._by_key: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[object]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, key: str) -> None:
        """Accept the request of this task, which ends with the answer's last byte.

        Raises APIError if there are too many, of this key or of all.
        """
        if not room(self._limit, len(self._tasks), self._by_key[key], shared=self._shared):
            raise APIError.unavailable("too many requests are open; try again in 1 s", 1.0)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._by_key[key] += 1
        task.add_done_callback(lambda task: self._remove(task, key))

    async def all_answered(self) -> None:
        """Return when there are none."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _remove(self, task: "asyncio.Task[object]", key: str) -> None:
        self._tasks.discard(task)
        self._by_key[key] -= 1
