"""The fair queue in front of the engine: admits sequences by API key and bounds the queue.

It knows API keys and token counts; it does not know HTTP or the engine. Invariants: no sequence
waits while it may be admitted, and every way in which a request ends releases its slot and its
queued tokens.
"""

import asyncio
import time
from bisect import insort
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Literal

from specserve.fair_share import ServiceCounters, room

FullReason = Literal["max_queued_requests", "max_queued_tokens"]
_MAX_RETRY_AFTER: Final = 60.0  # seconds; upper bound of `Admission.retry_after`
_NUM_COMPLETIONS: Final = 64  # completion times over which the completion rate is averaged


class QueueFull(Exception):
    """The queue is full. `retry_after`: estimated seconds until a new attempt can succeed."""

    def __init__(self, what: str, reason: FullReason, retry_after: float) -> None:
        super().__init__(f"{what}; try again in {retry_after:.0f} s")
        self.reason = reason
        self.retry_after = retry_after


@dataclass(order=True, slots=True)
class _QueuedSequence:
    """One waiting or running sequence; sorts by descending priority, then by age."""

    minus_priority: int
    number: int
    num_tokens: int = field(compare=False)
    granted: asyncio.Future[None] = field(compare=False)
    admitted: bool = field(compare=False, default=False)


@dataclass(slots=True)
class _KeyState:
    """State of one API key that has running or waiting sequences."""

    num_running: int = 0
    num_queued_tokens: int = 0
    waiting: list[_QueuedSequence] = field(default_factory=list)


class Admission:
    """Admits sequences to the engine, at most `window` at a time; the others wait, grouped by key.

    The total may exceed `window` only for a key that runs fewer than max(1, window // num_keys)
    sequences: the scheduler preempts sequences of other keys for it.

    The waiting key with the least service so far, in tokens, is next (`ServiceCounters`); within a
    key, higher priority goes first, then age. `shared`: there are several keys, so that no key may
    fill the queue.
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
        self._keys: dict[str, _KeyState] = {}
        self._service = ServiceCounters()
        self._num_sequences = 0
        # time.monotonic() seconds: when the queue became busy, then the latest completions.
        self._completions: deque[float] = deque(maxlen=_NUM_COMPLETIONS)

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

    def can_hold(self, num_tokens: Sequence[int]) -> bool:
        """Whether a request of sequences with prompts of these lengths fits if nothing else runs.

        If not, it would get QueueFull however often it is sent again.
        """
        waiting = num_tokens[self.window :]
        return sum(waiting) <= room(self.max_queued_tokens, 0, 0, shared=self._shared)

    @property
    def num_keys(self) -> int:
        """Number of keys that have state here."""
        return max(len(self._keys), len(self._service))

    @property
    def retry_after(self) -> float:
        """Estimated seconds, 1 to 60, until the sequences that wait now have run."""
        if not self._completions:
            return 1.0
        num_completed = max(1, len(self._completions) - 1)
        seconds_each = (time.monotonic() - self._completions[0]) / num_completed
        return min(_MAX_RETRY_AFTER, max(1.0, self.num_waiting * seconds_each))

    @asynccontextmanager
    async def slot(self, key: str, num_tokens: int, priority: int = 0) -> AsyncIterator[None]:
        """Wait until a sequence of `key` is admitted, and hold its slot inside `async with`.

        `num_tokens` (the prompt's length) is charged to the key as service on admission. Raises
        QueueFull immediately if the sequence would have to wait and the queue has no room for it.
        """
        sequence = self._enqueue(key, num_tokens, priority)
        try:
            await sequence.granted
            yield
        finally:
            self._release(key, sequence)

    def charge(self, key: str, num_tokens: int) -> None:
        """Charge the key for tokens that the engine emitted for one of its sequences."""
        self._service.charge(key, num_tokens)

    def _enqueue(self, key: str, num_tokens: int, priority: int) -> _QueuedSequence:
        state = self._keys.get(key, _KeyState())
        new = key not in self._keys
        if not self._may_admit(state, num_keys=len(self._keys) + new):
            self._check_queue_room(state, num_tokens)
        self._keys[key] = state
        if not state.waiting:
            self._service.join(key, [other for other, its in self._keys.items() if its.waiting])
        self._num_sequences += 1
        granted = asyncio.get_running_loop().create_future()
        sequence = _QueuedSequence(-priority, self._num_sequences, num_tokens, granted)
        insort(state.waiting, sequence)
        self._count_waiting(state, 1, num_tokens)
        self._admit()
        return sequence

    def _release(self, key: str, sequence: _QueuedSequence) -> None:
        state = self._keys[key]
        if sequence.admitted:
            state.num_running -= 1
            self.num_running -= 1
            self._completions.append(time.monotonic())
        else:
            state.waiting.remove(sequence)
            self._count_waiting(state, -1, -sequence.num_tokens)
        if not state.num_running and not state.waiting:
            del self._keys[key]
        self._admit()
        self._service.forget(self._keys)
        if not self._keys:
            self._completions.clear()

    def _admit(self) -> None:
        while (key := self._next()) is not None:
            state = self._keys[key]
            sequence = state.waiting.pop(0)
            self._count_waiting(state, -1, -sequence.num_tokens)
            self._service.take(key, sequence.num_tokens, waiting=self.num_waiting > 0)
            state.num_running += 1
            self.num_running += 1
            sequence.admitted = True
            if not self._completions:
                self._completions.append(time.monotonic())
            if not sequence.granted.done():  # else cancelled: its task will call `_release`
                sequence.granted.set_result(None)

    def _next(self) -> str | None:
        """The key to admit next, or None if no waiting sequence may be admitted."""
        num_keys = len(self._keys)
        return min(
            (
                key
                for key, state in self._keys.items()
                if state.waiting and self._may_admit(state, num_keys)
            ),
            key=lambda key: (self._service.served(key), self._keys[key].waiting[0].number),
            default=None,
        )

    def _may_admit(self, state: _KeyState, num_keys: int) -> bool:
        """Whether one more sequence of this key may be admitted, with `num_keys` keys present."""
        return self.num_running < self.window or state.num_running < max(1, self.window // num_keys)

    def _count_waiting(self, state: _KeyState, num_requests: int, num_tokens: int) -> None:
        self.num_waiting += num_requests
        self.num_queued_tokens += num_tokens
        state.num_queued_tokens += num_tokens

    def _check_queue_room(self, state: _KeyState, num_tokens: int) -> None:
        requests = (self.max_queued_requests, self.num_waiting, len(state.waiting))
        tokens = (self.max_queued_tokens, self.num_queued_tokens, state.num_queued_tokens)
        if not room(*requests, shared=self._shared):
            raise self._queue_full("max_queued_requests")
        if num_tokens > room(*tokens, shared=self._shared):
            raise self._queue_full("max_queued_tokens")

    def _queue_full(self, reason: FullReason) -> QueueFull:
        whose = "this key's part of the queue" if self._shared else "the queue"
        return QueueFull(
            f"{whose} is full ({reason} {getattr(self, reason)})", reason, self.retry_after
        )
