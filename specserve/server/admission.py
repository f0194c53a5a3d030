"""The fair queue in front of the engine: admits sequences by API key and bounds the queue.

It knows API keys and token counts; it does not know HTTP or the engine. Invariants: no sequence
waits while it may be admitted, and every way in which a request ends releases its slot and its
queued tokens.
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
_MAX_RETRY: Final = 60.0  # seconds; upper bound of `Admission.retry_after`
_MEASURED: Final = 64  # completion times over which the completion rate is averaged


class QueueFull(Exception):
    """The queue is full. `retry_after`: estimated seconds until a new attempt can succeed."""

    def __init__(self, what: str, reason: FullReason, retry_after: float) -> None:
        super().__init__(f"{what}; try again in {retry_after:.0f} s")
        self.reason = reason
        self.retry_after = retry_after


@dataclass(order=True, slots=True)
class _Turn:
    """One waiting or running sequence; sorts by descending priority, then by age."""

    minus_priority: int
    number: int
    num_tokens: int = field(compare=False)
    granted: asyncio.Future[None] = field(compare=False)
    admitted: bool = field(compare=False, default=False)


@dataclass(slots=True)
class _Client:
    """State of one API key that has running or waiting sequences."""

    num_running: int = 0
    num_queued_tokens: int = 0
    waiting: list[_Turn] = field(default_factory=list)


class Admission:
    """Admits sequences to the engine, at most `window` at a time; the others wait, grouped by key.

    The total may exceed `window` only for a key that runs fewer than max(1, window // num_keys)
    sequences: the scheduler preempts sequences of other keys for it.

    The waiting key with the least service so far, in tokens, is next (`Turns`); within a key,
    higher priority goes first, then age. `shared`: there are several keys, so that no key may fill
    the queue.
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
        # time.monotonic() seconds: when the queue became busy, then the latest completions.
        self._completions: deque[float] = deque(maxlen=_MEASURED)

    @property
    def full(self) -> bool:
        return (
            self.num_waiting >= self.max_queued_requests
            or self.num_queued_tokens >= self.max_queued_tokens
        )

    @property
    def capacity(self) -> int:
        """Most sequences of one key that can run and wait at once; a larger request never fits."""
        return self.window + room(self.max_queued_requests, 0, 0, shared=self._shared)

    @property
    def num_keys(self) -> int:
        """Number of keys that have state here."""
        return max(len(self._clients), len(self._turns))

    @property
    def retry_after(self) -> float:
        """Estimated seconds, 1 to 60, until the sequences that wait now have run."""
        if not self._completions:
            return 1.0
        num_completed = max(1, len(self._completions) - 1)
        seconds_each = (time.monotonic() - self._completions[0]) / num_completed
        return min(_MAX_RETRY, max(1.0, self.num_waiting * seconds_each))

    @asynccontextmanager
    async def slot(self, key: str, num_tokens: int, priority: int = 0) -> AsyncIterator[None]:
        """Wait until a sequence of `key` is admitted, and hold its slot inside `async with`.

        `num_tokens` (the prompt's length) is charged to the key as service on admission. Raises
        QueueFull immediately if the sequence would have to wait and the queue has no room for it.
        """
        turn = self._join(key, num_tokens, priority)
        try:
            await turn.granted
            yield
        finally:
            self._leave(key, turn)

    def charge(self, key: str, num_tokens: int) -> None:
        """Charge the key for tokens that the engine emitted for one of its sequences."""
        self._turns.charge(key, num_tokens)

    async def drain(self) -> None:
        """Return when no sequence runs or waits."""
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
            if not turn.granted.done():  # if cancelled, its task calls `_leave` when it resumes
                turn.granted.set_result(None)

    def _next(self) -> str | None:
        """The key to admit next, or None if no waiting sequence may be admitted."""
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
        """Whether one more sequence of this key may be admitted, with `num_keys` keys present."""
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
