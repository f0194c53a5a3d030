"""The deadline of a request: it counts from the arrival, reading and tokenizing included."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from specserve.server.generation import DeadlineExceeded
from specserve.server.service import ARRIVED, SERVICE
from specserve.types import RequestError


def deadline(request: web.Request, timeout: float | None) -> float:
    """The deadline in time.monotonic() seconds; `timeout` is the client's `request_timeout`.

    Raises RequestError if `timeout` exceeds the server's limit.
    """
    limit = request.app[SERVICE].config.server.request_timeout
    if timeout is not None and timeout > limit:
        raise RequestError(
            "request_timeout", f"{timeout} s exceeds this server's limit of {limit} s"
        )
    return request[ARRIVED] + (limit if timeout is None else timeout)


@asynccontextmanager
async def within_deadline(request: web.Request, timeout: float | None) -> AsyncIterator[None]:
    """Enforce the deadline on the `with` block, before there is a `GenerationRun`.

    Raises DeadlineExceeded, and RequestError as `deadline` does.
    """
    remaining = deadline(request, timeout) - time.monotonic()
    try:
        async with asyncio.timeout(remaining):
            yield
    except TimeoutError:
        raise DeadlineExceeded("the request ran out of time", timeout is not None) from None
