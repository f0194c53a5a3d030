"""The deadline of a request: it counts from the arrival, reading and tokenizing included."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

from specserve.server.errors import APIError
from specserve.server.service import ARRIVED, SERVICE
from specserve.types import RequestError


@dataclass(frozen=True, slots=True)
class Deadline:
    at: float  # time.monotonic() seconds
    by_client: bool  # set by the client, otherwise by the server

    @asynccontextmanager
    async def enforced(self) -> AsyncIterator[None]:
        """Raises APIError when the deadline passes inside the `with` block: 408 or 504.

        A TimeoutError of the block, which may know the deadline too, is replaced by the APIError.
        """
        try:
            async with asyncio.timeout(self.at - time.monotonic()):
                yield
        except TimeoutError:
            status = 408 if self.by_client else 504
            message = "the request ran out of time"
            raise APIError(status, message, code="deadline_exceeded") from None


def deadline(request: web.Request, timeout: float | None) -> Deadline:
    """The deadline; `timeout` is the client's `request_timeout` in seconds.

    Raises RequestError if `timeout` exceeds the server's limit.
    """
    limit = request.app[SERVICE].config.server.request_timeout
    if timeout is None:
        return Deadline(request[ARRIVED] + limit, by_client=False)
    if timeout > limit:
        raise RequestError(
            "request_timeout", f"{timeout} s exceeds this server's limit of {limit} s"
        )
    return Deadline(request[ARRIVED] + timeout, by_client=True)
