"""Batch coalescing: delays a step for a short time so that more requests can join it.

Related requests arrive at almost the same time: a burst one by one through the HTTP process, and
the successor of a finished request as soon as its client has read the end. Without the delay, each
of them waits for a whole forward pass.
"""

import time
from typing import Final

from specserve.process.frames import FrameSocket
from specserve.process.messages import ToEngine
from specserve.types import Request

# One delay is min(_DELAY_FRACTION * duration of the last step, _MAX_DELAY_S) seconds. This is the
# time that running sequences may lose to let others join.
_DELAY_FRACTION: Final = 0.1
_MAX_DELAY_S: Final = 0.005
_MAX_BURST_DELAYS: Final = 10  # most delays in a row for a burst while no sequence is running


class BatchCoalescer:
    """Receives the messages to the engine between two steps."""

    def __init__(self, frames: FrameSocket[ToEngine], idle_s: float) -> None:
        self._frames = frames
        self._idle_s = idle_s
        self._delay_s = 0.0

    def record_step(self, seconds: float) -> None:
        """Set the duration of the last step, which determines the delay."""
        self._delay_s = min(_DELAY_FRACTION * seconds, _MAX_DELAY_S)

    def receive(self, *, running: bool, num_free_slots: int) -> list[ToEngine] | None:
        """The messages that have arrived; None if the peer has closed the connection.

        With `running` (the engine has work): waits until `num_free_slots` requests have arrived,
        but at most one delay; finished requests left that many slots. Otherwise: waits up to
        `idle_s` seconds for the first message. If that is a request, further messages are received
        as long as each arrives within one delay, for `_MAX_BURST_DELAYS` delays at most.
        """
        messages = self._frames.receive(0 if running else self._idle_s)
        now = time.perf_counter()
        end = now + self._delay_s * (1 if running else _MAX_BURST_DELAYS)
        while messages is not None and now < end:
            num_requests = sum(isinstance(message, Request) for message in messages)
            if num_requests >= num_free_slots if running else num_requests == 0:
                break
            more = self._frames.receive(end - now if running else self._delay_s)
            if more is None:
                return None
            if not more and not running:
                break
            messages += more
            now = time.perf_counter()
        return messages
