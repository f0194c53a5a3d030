"""What a step costs by the number of rows of its pass, as it was measured. Host only."""

from collections.abc import Mapping
from typing import Final

import numpy as np

_MEMORY: Final = 32.0  # steps that the host's share is a mean of


class PassCosts:
    """Seconds of a step: the host's share, and the pass. Between two measured sizes of passes a
    straight line; past the last, its slope."""

    def __init__(self, samples: Mapping[int, float]) -> None:
        assert samples, "nothing was measured"
        rows = sorted(samples)
        self._rows = np.array(rows, np.float64)
        # More rows never cost less: what says so is noise.
        self._seconds = np.maximum.accumulate([samples[count] for count in rows])
        self._known: list[float] = []  # by number of rows, as far as anyone has asked
        self._host = 0.0

    def seconds(self, first: int, last: int) -> list[float]:
        """Of steps with passes of `first` .. `last` rows."""
        if len(self._known) <= last:
            self._known = self._computed(2 * last)
        return [self._host + seconds for seconds in self._known[first : last + 1]]

    def add_host(self, seconds: float) -> None:
        """A step has taken so long besides its pass: what every row of a pass shares."""
        self._host += (seconds - self._host) / (_MEMORY if self._host else 1.0)

    def _computed(self, last: int) -> list[float]:
        rows = np.arange(last + 1)
        known = np.interp(rows, self._rows, self._seconds)
        if len(self._rows) == 1:
            per_row = self._seconds[0] / self._rows[0]
        else:
            half = (len(self._rows) - 1) // 2  # from the middle on: less noise than one interval
            per_row = (self._seconds[-1] - self._seconds[half]) / (
                self._rows[-1] - self._rows[half]
            )
        seconds: list[float] = (known + per_row * np.maximum(rows - self._rows[-1], 0)).tolist()
        return seconds
