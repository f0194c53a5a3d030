"""What a step costs by the number of rows of its pass, as it was measured. Host only."""

from collections.abc import Mapping
from typing import Final

import numpy as np
from msgspec import Struct

_MEMORY: Final = 32.0  # steps that the host's share is a mean of
# Passes of a run that are looked at together, and those that a size's own sample counts for: a pass
# among others finds less in the caches than one that was measured, and machines change their pace.
_TOGETHER: Final = 32
_SAMPLE_WEIGHT: Final = 64
_OUTLIER: Final = 2.0  # times what was expected: a pass that took longer was interrupted


class PerToken(Struct, frozen=True):
    """Seconds that a pass takes longer for every token before its rows."""

    fixed: float = 0.0
    per_row: float = 0.0


class PassCosts:
    """Seconds of a step: the host's share, and the pass. Between two measured sizes of passes a
    straight line; past the last, its slope. `samples` are of rows after `context` tokens."""

    def __init__(
        self, samples: Mapping[int, float], context: int = 0, per_token: PerToken | None = None
    ) -> None:
        assert samples, "nothing was measured"
        rows = sorted(samples)
        self._rows = np.array(rows, np.float64)
        self._samples = np.array([samples[count] for count in rows])
        self._context, self._per_token = context, per_token or PerToken()
        self._known: list[float] = []  # by number of rows, as far as anyone has asked
        self._host = 0.0
        self._ratios: list[tuple[int, float]] = []  # of passes: rows, seconds by what was expected

    def seconds(self, first: int, last: int, context: float | None = None) -> list[float]:
        """Of steps with passes of `first` .. `last` rows, after `context` tokens in the mean, or
        after as many as where it was measured, if that is more or none is given."""
        if len(self._known) <= last:
            self._known = self._computed(2 * last)
        more = 0.0 if context is None else max(context - self._context, 0.0)
        fixed = self._host + more * self._per_token.fixed
        per_row = more * self._per_token.per_row
        return [
            fixed + per_row * rows + seconds
            for rows, seconds in enumerate(self._known[first : last + 1], start=first)
        ]

    def add_host(self, seconds: float) -> None:
        """A step has taken so long besides its pass: what every row of a pass shares."""
        self._host += (seconds - self._host) / (_MEMORY if self._host else 1.0)

    def add_pass(self, rows: int, context: float, seconds: float) -> None:
        """A pass of a step has taken so long."""
        expected = self.seconds(rows, rows, context)[0] - self._host
        self._ratios.append((rows, min(seconds / expected, _OUTLIER)))
        if len(self._ratios) == _TOGETHER:
            self._take_in()

    def _take_in(self) -> None:
        """The pace of all passes goes for every size; what a size differs by is its own."""
        sizes, ratios = np.array(self._ratios).T
        self._ratios.clear()
        pace = ratios.mean()
        weights = np.zeros((len(sizes), len(self._rows)))  # of samples in what was expected
        right = np.searchsorted(self._rows, sizes).clip(max=len(self._rows) - 1)
        left = (right - 1).clip(min=0)
        span = np.maximum(self._rows[right] - self._rows[left], 1.0)
        share = ((sizes - self._rows[left]) / span).clip(0.0, 1.0)
        passes = np.arange(len(sizes))
        np.add.at(weights, (passes, left), 1.0 - share)
        np.add.at(weights, (passes, right), share)
        off = (weights * (ratios / pace - 1.0)[:, None]).sum(0)
        self._samples *= pace * (1.0 + off / (weights.sum(0) + _SAMPLE_WEIGHT))
        self._known = []

    def _computed(self, last: int) -> list[float]:
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
