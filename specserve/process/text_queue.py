"""The queue of the tokenizer pool: the order of jobs, and the processes each kind may occupy."""

import asyncio
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Final

from specserve.fair_share import Turns, room
from specserve.process.text_messages import Ids, Job, Result

_LONG: Final = 2**16  # bytes from which a job is long: other jobs should not wait for it
_ANY_JOB: Final = 2**10  # bytes; the least that a job is charged


@dataclass(eq=False, slots=True)
class Ticket:
    """A job, its size in bytes, and the future for its answer, which may be cancelled."""

    job: Job
    tenant: str
    num_bytes: int
    answer: "asyncio.Future[Ids | Result]"
    num_attempts: int = 0  # that ended their process

    @property
    def long(self) -> bool:
        return self.num_bytes >= _LONG

    def succeed(self, answer: Ids | Result) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


@dataclass(slots=True)
class _Waiting:
    """The waiting jobs of one tenant: short and long ones, each in order of arrival."""

    short: deque[Ticket] = field(default_factory=deque)
    long: deque[Ticket] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self.short) + len(self.long)

    def of(self, ticket: Ticket) -> deque[Ticket]:
        return self.long if ticket.long else self.short


class TextQueue:
    """Selects the next job: the tenant with the fewest bytes served so far, short jobs first.

    With several processes, long jobs never occupy all of them, and if the queue is `shared` by
    several tenants, neither do the jobs of one tenant. At most `max_open` jobs wait or run; if
    `shared`, one tenant may have only as many as it leaves free.
    """

    def __init__(self, max_open: int, num_workers: int, *, shared: bool) -> None:
        self._max_open = max_open
        self._most = max(1, num_workers - 1)  # processes for long jobs, or for one tenant
        self._shared = shared
        self._num_long = 0  # running long jobs
        self._at_work: Counter[str] = Counter()  # running jobs by tenant
        self._num_waiting = 0
        self._tenants: dict[str, _Waiting] = {}  # those with waiting jobs
        self._turns = Turns()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return self._num_waiting

    def has_room(self, tenant: str) -> bool:
        held = self._num_waiting + self._at_work.total()
        own = len(self._tenants.get(tenant, ())) + self._at_work[tenant]
        return room(self._max_open, held, own, shared=self._shared) > 0

    def put(self, ticket: Ticket) -> None:
        if ticket.tenant not in self._tenants:
            self._turns.join(ticket.tenant, self._tenants)
            self._tenants[ticket.tenant] = _Waiting()
        self._tenants[ticket.tenant].of(ticket).append(ticket)
        self._num_waiting += 1
        self._changed.set()

    async def get(self) -> Ticket:
        """Wait for a job that may start and remove it. Call `done` when the job is over."""
        while (ticket := self._next()) is None:
            self._changed.clear()
            await self._changed.wait()
        self._remove(ticket)
        self._turns.take(
            ticket.tenant, max(ticket.num_bytes, _ANY_JOB), waiting=self._num_waiting > 0
        )
        self._turns.forget(self._tenants)
        self._num_long += ticket.long
        self._at_work[ticket.tenant] += 1
        return ticket

    def done(self, ticket: Ticket) -> None:
        """A job that `get` returned is over."""
        self._num_long -= ticket.long
        self._at_work[ticket.tenant] -= 1
        self._at_work += Counter()  # drops zeros
        self._changed.set()

    def discard(self, ticket: Ticket) -> None:
        """Remove a job if it still waits."""
        waiting = self._tenants.get(ticket.tenant)
        if waiting is not None and ticket in waiting.of(ticket):
            self._remove(ticket)

    def _next(self) -> Ticket | None:
        heads = {}
        for tenant, waiting in self._tenants.items():
            if self._shared and self._at_work[tenant] >= self._most:
                continue
            if waiting.short:
                heads[tenant] = waiting.short[0]
            elif self._num_long < self._most:
                heads[tenant] = waiting.long[0]
        return heads[min(heads, key=self._turns.served)] if heads else None

    def _remove(self, ticket: Ticket) -> None:
        waiting = self._tenants[ticket.tenant]
        waiting.of(ticket).remove(ticket)
        self._num_waiting -= 1
        if not waiting:
            del self._tenants[ticket.tenant]
