"""What a pass costs by its number of rows, as it was measured. Host only."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt


class PassCosts:
    """Seconds of a pass. Between two measured sizes a straight line; past the last, its slope."""

    def __init__(self, samples: Mapping[int, float]) -> None:
        assert samples, "nothing was measured"
        rows = sorted(samples)
        self._rows = np.array(rows, np.float64)
        # More rows never cost less: what says so is noise.
        self._seconds = np.maximum.accumulate([samples[count] for count in rows])

    def seconds(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        known = np.interp(rows, self._rows, self._seconds)
        if len(self._rows) == 1:
            per_row = self._seconds[0] / self._rows[0]
        else:
            half = (len(self._rows) - 1) // 2  # from the middle on: less noise than one interval
            per_row = (self._seconds[-1] - self._seconds[half]) / (
                self._rows[-1] - self._rows[half]
            )
        result: npt.NDArray[np.float64] = known + per_row * np.maximum(rows - self._rows[-1], 0)
        return result
