"""The queue of the tokenizer pool: the order of jobs, and the processes each kind may occupy."""

import asyncio
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Final

from specserve.fair_share import ServiceCounters, room
from specserve.process.tokenizer_messages import LONG_JOB, TokenizerJob

_MIN_CHARGE: Final = 2**10  # bytes; the least that a job is charged


@dataclass(eq=False, slots=True)
class PendingJob:
    """A job, and the future for its answer, which may be cancelled."""

    job: TokenizerJob
    tenant: str
    answer: "asyncio.Future[tuple[int, ...] | bytes]"
    num_attempts: int = 0  # that ended their process
    num_bytes: int = field(init=False)
    long: bool = field(init=False)

    def __post_init__(self) -> None:
        self.num_bytes = self.job.num_bytes
        self.long = self.num_bytes >= LONG_JOB

    def succeed(self, answer: tuple[int, ...] | bytes) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class TokenizerQueue:
    """Selects the next job: the tenant with the fewest bytes served so far, short jobs first.

    With several processes, long jobs never occupy all of them, and if the queue is `shared` by
    several tenants, neither do the jobs of one tenant. At most `max_jobs` jobs wait or run; if
    `shared`, one tenant may have only as many as it leaves free.
    """

    def __init__(self, max_jobs: int, num_workers: int, *, shared: bool) -> None:
        self._max_jobs = max_jobs
        self._max_workers = max(1, num_workers - 1)  # processes for long jobs, or for one tenant
        self._shared = shared
        self._num_long = 0  # running long jobs
        self._running: Counter[str] = Counter()  # running jobs by tenant
        self._num_waiting = 0
        # Of every tenant with waiting jobs: the short and the long ones, in order of arrival.
        self._tenants: dict[str, tuple[deque[PendingJob], deque[PendingJob]]] = {}
        self._service = ServiceCounters()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return self._num_waiting

    def has_room(self, tenant: str) -> bool:
        held = self._num_waiting + self._running.total()
        own = sum(map(len, self._tenants.get(tenant, ()))) + self._running[tenant]
        return room(self._max_jobs, held, own, shared=self._shared) > 0

    def put(self, pending: PendingJob) -> None:
        if pending.tenant not in self._tenants:
            self._service.join(pending.tenant, self._tenants)
            self._tenants[pending.tenant] = (deque(), deque())
        self._tenants[pending.tenant][pending.long].append(pending)
        self._num_waiting += 1
        self._changed.set()

    async def get(self) -> PendingJob:
        """Wait for a job that may start and remove it. Call `done` when the job is over."""
        while (pending := self._next()) is None:
            self._changed.clear()
            await self._changed.wait()
        self._remove(pending)
        self._service.take(
            pending.tenant, max(pending.num_bytes, _MIN_CHARGE), waiting=self._num_waiting > 0
        )
        self._service.forget(self._tenants)
        self._num_long += pending.long
        self._running[pending.tenant] += 1
        return pending

    def done(self, pending: PendingJob) -> None:
        """A job that `get` returned is over."""
        self._num_long -= pending.long
        self._running[pending.tenant] -= 1
        self._running += Counter()  # drops zeros
        self._changed.set()

    def discard(self, pending: PendingJob) -> None:
        """Remove a job if it still waits."""
        waiting = self._tenants.get(pending.tenant)
        if waiting is not None and pending in waiting[pending.long]:
            self._remove(pending)

    def _next(self) -> PendingJob | None:
        first_jobs = {}
        for tenant, (short, long) in self._tenants.items():
            if self._shared and self._running[tenant] >= self._max_workers:
                continue
            if short:
                first_jobs[tenant] = short[0]
            elif self._num_long < self._max_workers:
                first_jobs[tenant] = long[0]
        return first_jobs[min(first_jobs, key=self._service.served)] if first_jobs else None

    def _remove(self, pending: PendingJob) -> None:
        waiting = self._tenants[pending.tenant]
        waiting[pending.long].remove(pending)
        self._num_waiting -= 1
        if not any(waiting):
            del self._tenants[pending.tenant]
