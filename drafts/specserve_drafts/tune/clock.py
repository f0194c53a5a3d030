"""The time of a run: how long it has lasted, when it has to end, and how far it is."""

import math
import threading
import time
from typing import Final, Self

from specserve_drafts.tune.settings import RunSettings
from specserve_evals.progress import Advance

SAVE_EVERY_S: Final = 30.0
SHOW_EVERY_S: Final = 0.5  # with LINE_EVERY_S, so that lines are less than 5 s apart
# The end of a run, in which the finished draft is measured: a share of its time, and a limit.
_MEASURE_SHARE: Final = 0.12
_MEASURE_S: Final = 60.0
_EXIT_S: Final = 1.0  # for the model card and the end of the process


class Clock:
    """The time of the whole command, and of earlier commands of the same run.

    A run whose limit is a number of tokens has no end. Points in time are `time.monotonic()`.
    """

    def __init__(self, settings: RunSettings, started: float | None) -> None:
        """started: when the command began; None: now."""
        self._began = time.monotonic() if started is None else started
        self.limit = math.inf if settings.tokens else float(settings.seconds)

    def resume(self, seconds: float) -> None:
        """Count the seconds of earlier commands too."""
        self._began -= seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def end(self) -> float:
        """When the finished draft has been measured."""
        return self._began + self.limit - _EXIT_S

    @property
    def end_of_learning(self) -> float:
        return self.end - min(_MEASURE_SHARE * self.limit, _MEASURE_S)

    def within(self, share: float) -> float:
        """When this share of the limit will have passed from now on."""
        return time.monotonic() + share * self.limit


class Progress:
    """Shows how far a run is, in the unit of its limit: seconds or tokens.

    A thread shows it, so that it moves during long computations too.
    """

    def __init__(self, settings: RunSettings, clock: Clock, advance: Advance) -> None:
        self._tokens, self._clock, self._advance = settings.tokens, clock, advance
        self._shown, self._now = 0, (0, "loading")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def __call__(self, num_tokens: int, label: str) -> None:
        """num_tokens: those that count for the limit, so far."""
        self._now = num_tokens, label

    def _run(self) -> None:
        while not self._over.wait(SHOW_EVERY_S):
            (done, label), seconds = self._now, int(self._clock.seconds)
            if self._tokens:
                done, label = min(done, self._tokens), f"{label}, {seconds} s"
            else:
                done = min(seconds, int(self._clock.limit))
            self._advance(done - self._shown, label)
            self._shown = done
