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

FullReason = Literal["max_queued_requests", "max_queued_tokens"]
_MAX_RETRY: Final = 60.0  # seconds
_MEASURED: Final = 64  # completions that the rate is measured over


class QueueFull(Exception):
    """Too many wait. `retry_after` seconds from now is a good time to ask again."""

    def __init__(self, reason: FullReason, retry_after: float) -> None:
        super().__init__(f"the queue is full ({reason}); try again in {retry_after:.0f} s")
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
    """One key. `service` is its virtual token counter."""

    service: int
    num_running: int = 0
    waiting: list[_Turn] = field(default_factory=list)


class Admission:
    """At most `window` sequences are with the engine; the others wait here, by key.

    The waiting key that got the fewest tokens is next; one that had nothing waiting takes up the
    least of those that have, so that nobody saves up service (VTC: Sheng et al. 2024, "Fairness in
    Serving Large Language Models"). Within a key a higher priority goes first, then age.
    """

    def __init__(self, window: int, max_queued_requests: int, max_queued_tokens: int) -> None:
        self.window = window
        self.max_queued_requests = max_queued_requests
        self.max_queued_tokens = max_queued_tokens
        self.num_running = 0
        self.num_waiting = 0
        self.num_queued_tokens = 0
        self._clients: dict[str, _Client] = {}
        self._floor = 0  # service of a key that nobody remembers
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
        """Sequences that can run and wait together; a request of more never fits."""
        return self.window + self.max_queued_requests

    @property
    def num_keys(self) -> int:
        """Keys whose service is remembered."""
        return len(self._clients)

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
        self._clients[key].service += num_tokens

    async def drain(self) -> None:
        """Return when nothing runs or waits."""
        while self.num_running or self.num_waiting:
            await self._idle.wait()

    def _join(self, key: str, num_tokens: int, priority: int) -> _Turn:
        if self.num_running >= self.window:
            self._check_room(num_tokens)
        client = self._clients.setdefault(key, _Client(self._floor))
        if not client.waiting:
            others = [other.service for other in self._clients.values() if other.waiting]
            client.service = max(client.service, min(others, default=self._floor))
        self._num_turns += 1
        granted = asyncio.get_running_loop().create_future()
        turn = _Turn(-priority, self._num_turns, num_tokens, granted)
        insort(client.waiting, turn)
        self.num_waiting += 1
        self.num_queued_tokens += num_tokens
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
            self.num_waiting -= 1
            self.num_queued_tokens -= turn.num_tokens
        self._admit()
        self._forget()

    def _admit(self) -> None:
        while self.num_waiting and self.num_running < self.window:
            client = min(
                (client for client in self._clients.values() if client.waiting),
                key=lambda client: (client.service, client.waiting[0].number),
            )
            turn = client.waiting.pop(0)
            self.num_waiting -= 1
            self.num_queued_tokens -= turn.num_tokens
            self._floor = max(self._floor, client.service)
            client.service += turn.num_tokens
            if not self.num_waiting:  # nobody has a claim from before this one
                self._floor = max(self._floor, client.service)
            client.num_running += 1
            self.num_running += 1
            turn.admitted = True
            if not self._completions:
                self._completions.append(time.monotonic())
            if not turn.granted.done():  # else cancelled; it leaves when it gets to run
                turn.granted.set_result(None)

    def _forget(self) -> None:
        """Drop idle keys that the floor has reached, and everything once nobody is there."""
        if not self.num_running and not self.num_waiting:
            self._clients.clear()
            self._completions.clear()
            self._floor = 0
            self._idle.set()
            return
        for key, client in list(self._clients.items()):
            if not client.num_running and not client.waiting and client.service <= self._floor:
                del self._clients[key]

    def _check_room(self, num_tokens: int) -> None:
        if self.num_waiting >= self.max_queued_requests:
            raise QueueFull("max_queued_requests", self.retry_after)
        if self.num_queued_tokens + num_tokens > self.max_queued_tokens:
            raise QueueFull("max_queued_tokens", self.retry_after)
