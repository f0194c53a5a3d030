"""What a pass costs by its number of rows, as it was measured. Host only."""

from collections.abc import Mapping

import numpy as np


class PassCosts:
    """Seconds of a pass. Between two measured sizes a straight line; past the last, its slope."""

    def __init__(self, samples: Mapping[int, float]) -> None:
        assert samples, "nothing was measured"
        rows = sorted(samples)
        self._rows = np.array(rows, np.float64)
        # More rows never cost less: what says so is noise.
        self._seconds = np.maximum.accumulate([samples[count] for count in rows])
        self._known: list[float] = []  # by number of rows, as far as anyone has asked

    def seconds(self, first: int, last: int) -> list[float]:
        """Of passes of `first` .. `last` rows."""
        if len(self._known) <= last:
            self._known = self._computed(2 * last)
        return self._known[first : last + 1]

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
