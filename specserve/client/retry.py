"""Decides whether a failed request is retried, and after how long. It sends nothing itself."""

import math
import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

import aiohttp

from specserve.client.errors import APIStatusError, ConnectionFailed, SpecserveError

_STATUSES: Final = frozenset({408, 429, 502, 503, 504})
_FIRST_WAIT_S: Final = 0.5
_LONGEST_WAIT_S: Final = 8.0
# Errors of TLS, which another attempt does not solve.
_HOPELESS: Final = (aiohttp.ClientSSLError, aiohttp.ClientConnectorCertificateError)


def wait_before_retry(error: SpecserveError, attempt: int) -> float | None:
    """Seconds to wait after attempt number `attempt` (from 0) failed; None: do not retry.

    The server's Retry-After, or a wait that doubles with each attempt up to a limit, times a random
    factor of 0.5 to 1, so that clients that failed together do not retry together.
    """
    if isinstance(error, APIStatusError):
        if error.status not in _STATUSES:
            return None
        if error.retry_after is not None:
            return error.retry_after
    elif not isinstance(error, ConnectionFailed) or isinstance(error.__cause__, _HOPELESS):
        return None
    longest = min(_FIRST_WAIT_S * 2.0 ** min(attempt, 10), _LONGEST_WAIT_S)
    return longest * random.uniform(0.5, 1.0)


def parse_retry_after(value: str | None) -> float | None:
    """The seconds from now that a Retry-After header gives; None if it is missing or invalid."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return None
        if date.tzinfo is None:
            date = date.replace(tzinfo=UTC)
        return max(0.0, (date - datetime.now(UTC)).total_seconds())
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
