"""The fair queue in front of the engine: who waits, whose turn it is, when it is too much.

Knows keys and numbers of tokens, no HTTP and no engine. Nobody waits while a place is free.
Whatever ends a request, its place, its tokens and its turn come back.
"""

import asyncio
import time
from bisect import insort
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Literal

from specserve.fair_share import Turns, room

FullReason = Literal["max_queued_requests", "max_queued_tokens"]
_MAX_RETRY: Final = 60.0  # seconds
_MEASURED: Final = 64  # completions that the rate is measured over


class QueueFull(Exception):
    """Too many wait. `retry_after` seconds from now is a good time to ask again."""

    def __init__(self, what: str, reason: FullReason, retry_after: float) -> None:
        super().__init__(f"{what}; try again in {retry_after:.0f} s")
        self.reason = reason
        self.retry_after = retry_after


@dataclass(order=True, slots=True)
class _Turn:
    """One that waits or runs; sorts by priority, then age."""

    minus_priority: int
    number: int
    num_tokens: int = field(compare=False)
    granted: asyncio.Future[None] = field(compare=False)
    admitted: bool = field(compare=False, default=False)


@dataclass(slots=True)
class _Client:
    """One key that has something running or waiting."""

    num_running: int = 0
    num_queued_tokens: int = 0
    waiting: list[_Turn] = field(default_factory=list)


class Admission:
    """At most `window` sequences of one key are with the engine, and of all keys together unless a
    key has less than its share of the window: the engine makes room for that one. The others wait
    here, by key.

    The waiting key that got the fewest tokens is next (`Turns`); within a key a higher priority
    goes first, then age. `shared`: there are several keys, so none may fill the queue.
    """

    def __init__(
        self, window: int, max_queued_requests: int, max_queued_tokens: int, *, shared: bool = False
    ) -> None:
        self.window = window
        self.max_queued_requests = max_queued_requests
        self.max_queued_tokens = max_queued_tokens
        self.num_running = 0
        self.num_waiting = 0
        self.num_queued_tokens = 0
        self._shared = shared
        self._clients: dict[str, _Client] = {}
        self._turns = Turns()
        self._num_turns = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._completions: deque[float] = deque(maxlen=_MEASURED)  # the first: busy since

    @property
    def full(self) -> bool:
        return (
            self.num_waiting >= self.max_queued_requests
            or self.num_queued_tokens >= self.max_queued_tokens
        )

    @property
    def capacity(self) -> int:
        """Sequences of a key that can run and wait together; a request of more never fits."""
        return self.window + room(self.max_queued_requests, 0, 0, shared=self._shared)

    @property
    def num_keys(self) -> int:
        """Keys that are remembered."""
        return max(len(self._clients), len(self._turns))

    @property
    def retry_after(self) -> float:
        """Seconds until those that wait now will have run, 1 to 60, at the rate of the moment."""
        if not self._completions:
            return 1.0
        num_completed = max(1, len(self._completions) - 1)
        seconds_each = (time.monotonic() - self._completions[0]) / num_completed
        return min(_MAX_RETRY, max(1.0, self.num_waiting * seconds_each))

    @asynccontextmanager
    async def slot(self, key: str, num_tokens: int, priority: int = 0) -> AsyncIterator[None]:
        """A place with the engine, once it is this one's turn.

        `num_tokens` count as service when it is admitted. Raises QueueFull at once if it would
        have to wait and too many do.
        """
        turn = self._join(key, num_tokens, priority)
        try:
            await turn.granted
            yield
        finally:
            self._leave(key, turn)

    def charge(self, key: str, num_tokens: int) -> None:
        """Count tokens that the engine emitted for one of the key's running sequences."""
        self._turns.charge(key, num_tokens)

    async def drain(self) -> None:
        """Return when nothing runs or waits."""
        while self.num_running or self.num_waiting:
            await self._idle.wait()

    def _join(self, key: str, num_tokens: int, priority: int) -> _Turn:
        client = self._clients.get(key, _Client())
        new = key not in self._clients
        if not self._may_run(client, num_keys=len(self._clients) + new):
            self._check_room(client, num_tokens)
        self._clients[key] = client
        if not client.waiting:
            self._turns.join(key, [other for other, its in self._clients.items() if its.waiting])
        self._num_turns += 1
        granted = asyncio.get_running_loop().create_future()
        turn = _Turn(-priority, self._num_turns, num_tokens, granted)
        insort(client.waiting, turn)
        self._count_waiting(client, 1, num_tokens)
        self._idle.clear()
        self._admit()
        return turn

    def _leave(self, key: str, turn: _Turn) -> None:
        client = self._clients[key]
        if turn.admitted:
            client.num_running -= 1
            self.num_running -= 1
            self._completions.append(time.monotonic())
        else:
            client.waiting.remove(turn)
            self._count_waiting(client, -1, -turn.num_tokens)
        if not client.num_running and not client.waiting:
            del self._clients[key]
        self._admit()
        self._turns.forget(self._clients)
        if not self._clients:
            self._completions.clear()
            self._idle.set()

    def _admit(self) -> None:
        while (key := self._next()) is not None:
            client = self._clients[key]
            turn = client.waiting.pop(0)
            self._count_waiting(client, -1, -turn.num_tokens)
            self._turns.take(key, turn.num_tokens, waiting=self.num_waiting > 0)
            client.num_running += 1
            self.num_running += 1
            turn.admitted = True
            if not self._completions:
                self._completions.append(time.monotonic())
            if not turn.granted.done():  # else cancelled; it leaves when it gets to run
                turn.granted.set_result(None)

    def _next(self) -> str | None:
        """The key whose turn it is, if one of those that wait may run."""
        num_keys = len(self._clients)
        return min(
            (
                key
                for key, client in self._clients.items()
                if client.waiting and self._may_run(client, num_keys)
            ),
            key=lambda key: (self._turns.served(key), self._clients[key].waiting[0].number),
            default=None,
        )

    def _may_run(self, client: _Client, num_keys: int) -> bool:
        """Whether one more of this key may go to the engine, with so many keys present."""
        return self.num_running < self.window or client.num_running < max(
            1, self.window // num_keys
        )

    def _count_waiting(self, client: _Client, num_requests: int, num_tokens: int) -> None:
        self.num_waiting += num_requests
        self.num_queued_tokens += num_tokens
        client.num_queued_tokens += num_tokens

    def _check_room(self, client: _Client, num_tokens: int) -> None:
        requests = (self.max_queued_requests, self.num_waiting, len(client.waiting))
        tokens = (self.max_queued_tokens, self.num_queued_tokens, client.num_queued_tokens)
        if not room(*requests, shared=self._shared):
            raise self._full_queue("max_queued_requests")
        if num_tokens > room(*tokens, shared=self._shared):
            raise self._full_queue("max_queued_tokens")

    def _full_queue(self, reason: FullReason) -> QueueFull:
        whose = "this key's part of the queue" if self._shared else "the queue"
        return QueueFull(
            f"{whose} is full ({reason} {getattr(self, reason)})", reason, self.retry_after
        )
