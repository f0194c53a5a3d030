"""Which requests make the next pass: those that come while it is held for them, a moment.

Requests come in company: a burst one by one through the HTTP process, a finished one's successor
as soon as its client has read the end. Without a moment's patience each waits for a whole pass.
"""

import time
from typing import Final, Generic, TypeVar

from specserve.process.frames import FrameSocket
from specserve.types import Request

_SHARE: Final = 0.1  # of the last pass's time: what waiting for one request may cost
_MOST_S: Final = 0.005  # and never more
_MOST_IN_BURST: Final = 10  # such moments, for a burst that nobody running waits for

T = TypeVar("T")


class Boarding(Generic[T]):
    """Receives the engine's messages between two passes."""

    def __init__(self, frames: FrameSocket[T], idle_s: float) -> None:
        self._frames = frames
        self._idle_s = idle_s
        self._moment_s = 0.0

    def passed(self, seconds: float) -> None:
        """How long the last pass took."""
        self._moment_s = min(_SHARE * seconds, _MOST_S)

    def receive(self, *, running: bool, places: int) -> list[T] | None:
        """What has arrived; None: the peer is gone.

        `running`: there is work; then at most one moment is spent on `places` requests, those that
        could take the place of what has just finished. Else: waits `idle_s` for the first message,
        and for others as long as they keep coming.
        """
        messages = self._frames.receive(0 if running else self._idle_s)
        now = time.perf_counter()
        end = now + self._moment_s * (1 if running else _MOST_IN_BURST)
        while messages is not None and now < end:
            num_requests = sum(isinstance(message, Request) for message in messages)
            if num_requests >= places if running else num_requests == 0:
                break
            more = self._frames.receive(end - now if running else self._moment_s)
            if more is None:
                return None
            if not more and not running:
                break
            messages += more
            now = time.perf_counter()
        return messages
