"""How long a step takes, by the rows and the context of its forward pass: measured, then learned.

`engine/measure.py` measures single forward passes before the first request. While the engine runs,
the model learns what a step takes besides its forward pass, and corrects the measured seconds.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np

_HOST_MEMORY: Final = 32.0  # steps over which the host time is averaged
_PASSES_PER_UPDATE: Final = 32  # forward passes whose durations are averaged before an update
_MAX_RATIO: Final = 2.0  # measured to expected seconds; above it the process was interrupted


class CostModel:
    """Seconds of a step: host time plus the forward pass.

    Between measured numbers of rows the seconds are interpolated, above them extrapolated. Without
    `samples` nothing is known until `measure` is called.
    """

    def __init__(self, samples: Mapping[int, float] | None = None) -> None:
        self._rows = self._samples = np.empty(0)
        self._context, self._fixed, self._per_row = 0, 0.0, 0.0
        self._seconds: list[float] = []  # of forward passes by rows, as far as asked for
        self._host = 0.0
        self._ratios: list[float] = []  # of passes: measured to expected seconds
        if samples is not None:
            self.measure(samples)

    def measure(
        self,
        samples: Mapping[int, float],
        context: int = 0,
        fixed: float = 0.0,
        per_row: float = 0.0,
    ) -> None:
        """Set the measured seconds of forward passes, by number of rows, at `context` tokens.

        Every further token of context adds `fixed` seconds, and `per_row` seconds for each row.
        """
        assert samples, "nothing was measured"
        rows = sorted(samples)
        self._rows = np.array(rows, np.float64)
        self._samples = np.array([samples[count] for count in rows])
        self._context, self._fixed, self._per_row = context, fixed, per_row
        self._seconds = []

    @property
    def is_measured(self) -> bool:
        return len(self._rows) > 0

    def seconds(self, first: int, last: int, context: float | None = None) -> list[float]:
        """Seconds of steps with `first`, `first` + 1, .., `last` rows.

        `context` is the mean number of tokens before the rows; without it, or below that of the
        measurement, it makes no difference.
        """
        if len(self._seconds) <= last:
            self._seconds = self._computed(2 * last)
        more = 0.0 if context is None else max(context - self._context, 0.0)
        fixed, per_row = self._host + more * self._fixed, more * self._per_row
        return [
            fixed + per_row * rows + seconds
            for rows, seconds in enumerate(self._seconds[first : last + 1], start=first)
        ]

    def step_seconds(self) -> tuple[float, float] | None:
        """Seconds of a step without drafted nodes, and of one more node; None: not measured."""
        if not self.is_measured:
            return None
        seconds = self.seconds(1, 8)
        return seconds[0], (seconds[7] - seconds[3]) / 4

    def record_host(self, seconds: float) -> None:
        """Learn from the seconds of a step besides its forward pass."""
        self._host += (seconds - self._host) / (_HOST_MEMORY if self._host else 1.0)

    def record_pass(self, rows: int, context: float, seconds: float) -> None:
        """Learn from the seconds of a forward pass, for all numbers of rows alike.

        It finds less in the caches than a measured one, and the speed of a machine changes.
        """
        expected = self.seconds(rows, rows, context)[0] - self._host
        self._ratios.append(min(seconds / expected, _MAX_RATIO))
        if len(self._ratios) == _PASSES_PER_UPDATE:
            self._samples *= np.mean(self._ratios)
            self._ratios.clear()
            self._seconds = []

    def _computed(self, last: int) -> list[float]:
        """Seconds of forward passes of 0 .. `last` rows."""
        rows = np.arange(last + 1)
        samples = np.maximum.accumulate(self._samples)  # more rows never cost less: that is noise
        known = np.interp(rows, self._rows, samples)
        if len(self._rows) == 1:
            per_row = samples[0] / self._rows[0]
        else:
            half = (len(self._rows) - 1) // 2  # from the middle on: less noise than one interval
            per_row = (samples[-1] - samples[half]) / (self._rows[-1] - self._rows[half])
        seconds: list[float] = (known + per_row * np.maximum(rows - self._rows[-1], 0)).tolist()
        return seconds
