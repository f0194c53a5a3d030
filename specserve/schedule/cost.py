"""What a step costs by the number of rows of its pass, as it was measured. Host only."""

from collections.abc import Mapping
from typing import Final

import numpy as np
from msgspec import Struct

_MEMORY: Final = 32.0  # steps that the host's share is a mean of


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
        # More rows never cost less: what says so is noise.
        self._seconds = np.maximum.accumulate([samples[count] for count in rows])
        self._context, self._per_token = context, per_token or PerToken()
        self._known: list[float] = []  # by number of rows, as far as anyone has asked
        self._host = 0.0

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
