"""Requests and aborts on their way to the scheduler, which takes them between two steps."""

import time
from collections import deque
from collections.abc import Sequence

from specserve.engine.limits import Limits
from specserve.schedule.scheduler import Scheduler
from specserve.step import FinishInfo
from specserve.types import Abort, Request, RequestError, StepOutput


class Inbox:
    """Knows the ids of all requests that were submitted and have not finished."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._messages: deque[Request | Abort] = deque()
        self._ids: set[str] = set()

    def __len__(self) -> int:
        return len(self._messages)

    def submit(self, request: Request) -> None:
        """Raises RequestError if the request can never be served, or its id is in use."""
        self._limits.check(request)
        if request.id in self._ids:
            raise RequestError("id", f"{request.id!r} is already running; use a fresh one")
        self._ids.add(request.id)
        self._messages.append(request)

    def abort(self, request_id: str) -> None:
        """Unknown ids are ignored: the request may just have finished."""
        self._messages.append(Abort(request_id))

    def deliver(self, scheduler: Scheduler) -> list[StepOutput]:
        """Add requests; end those aborted or past their deadline, and return their last outputs."""
        outputs: list[StepOutput] = []
        while self._messages:
            message = self._messages.popleft()
            if isinstance(message, Request):
                scheduler.add(message)
            elif message.id in scheduler:
                outputs.append(scheduler.finish(message.id, FinishInfo("abort"), message.reason))
        return outputs + scheduler.expire(time.monotonic())

    def forget(self, outputs: Sequence[StepOutput]) -> list[str]:
        """Free the ids of the requests that finished with these outputs, and return them."""
        finished = [output.id for output in outputs if output.finish is not None]
        self._ids.difference_update(finished)
        return finished
