"""Bounds the bytes of all request bodies that the HTTP process holds at one time."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from aiohttp import web

from specserve.fair_share import room
from specserve.server.errors import APIError

_NUM_LARGEST_BODIES: Final = 8  # bodies of `max_body_bytes` that fit at one time
_MIN_LIMIT: Final = 2**26  # bytes; lower bound of the limit for a small `max_body_bytes`
_RETRY_S: Final = 1.0  # seconds, for Retry-After

# Counts bytes of the request's body before they are stored. Raises APIError (429).
TAKE_BYTES: Final = web.RequestKey[Callable[[int], None]]("take_bytes")


class HeldBodies:
    """Counts the bytes of a body from their arrival until its request is over.

    `shared`: there are several API keys, so that no key may use the whole limit.
    """

    def __init__(self, max_body_bytes: int, *, shared: bool) -> None:
        self.limit = max(_NUM_LARGEST_BODIES * max_body_bytes, _MIN_LIMIT)
        self._shared = shared
        self._by_key: Counter[str] = Counter()

    @property
    def num_bytes(self) -> int:
        return self._by_key.total()

    @contextmanager
    def hold(self, key: str) -> Iterator[Callable[[int], None]]:
        """Yields the function that counts bytes of a request of `key` (`TAKE_BYTES`).

        When the `with` block ends, they are no longer counted.
        """
        held = 0

        def take(num_bytes: int) -> None:
            nonlocal held
            if num_bytes > room(self.limit, self.num_bytes, self._by_key[key], shared=self._shared):
                raise self._too_many()
            self._by_key[key] += num_bytes
            held += num_bytes

        try:
            yield take
        finally:
            self._by_key[key] -= held
            self._by_key += Counter()  # drops zeros

    def _too_many(self) -> APIError:
        whose = "of this key" if self._shared else "on this server"
        error = APIError.unavailable(
            f"open requests {whose} hold too many bytes (limit {self.limit} for all keys); "
            f"try again in {_RETRY_S:.0f} s",
            _RETRY_S,
            status=429,
        )
        error.headers["Connection"] = "close"  # the rest of the body is not read
        return error
