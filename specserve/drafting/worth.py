"""Whether a drafter, beside the others, earns the time it takes. Host only.

What a drafter adds to a tree is how many more tokens are to be expected of it than of the tree
that the others make alone. That has to be worth more than what would have been emitted in the time
its drafting took; if it is not, the drafter is left out, and tried again after a pause that
doubles. Sampled requests are judged apart from greedy ones.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Final

_TRIAL: Final = 12  # drafts that are looked at before anything is decided
_GLANCE: Final = 4  # that are enough for a drafter which is nowhere near
_NOWHERE: Final = 0.4  # of what it has to bring
_MEMORY: Final = 48.0  # drafts that a mean is of
_PAUSES: Final = (128, 4096)  # passes without it: the first time, and at most
_EVERY: Final = 4  # passes, in one of which somebody is judged: that takes a tree without them
# What is expected of trees is too much by a few percent, the more so the more drafters, and what a
# drafter adds by a third of it (drafts/LOG.md).
_DOUBT: Final = 1.5
_CHEAP: Final = 0.02  # of a pass: who takes less is not worth judging


class Mean:
    """Of the latest values; of all while they are few."""

    __slots__ = ("count", "value")

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) / min(self.count, _MEMORY)


@dataclass(slots=True)
class _Record:
    """Of a drafter, in requests of one kind."""

    seconds: Mean  # for one sequence
    gain: Mean  # tokens
    pause: int = 0  # passes until it is tried again
    next_pause: int = _PAUSES[0]


class Worth:
    def __init__(self) -> None:
        self._records: defaultdict[tuple[str, bool], _Record] = defaultdict(
            lambda: _Record(Mean(), Mean())
        )
        self._step = Mean()  # seconds of a pass with all that belongs to it
        self._tokens = Mean()  # emitted by it
        self._num_steps = 0

    def begin_step(self) -> None:
        self._num_steps += 1
        for record in self._records.values():
            if record.pause:
                record.pause -= 1

    def asks(self, name: str, noisy: bool) -> bool:
        return not self._records[name, noisy].pause

    def end_step(self, seconds: float, num_tokens: int) -> None:
        self._step.add(seconds)
        self._tokens.add(num_tokens)

    def took(self, name: str, noisy: bool, seconds: float) -> None:
        """Drafting for one sequence."""
        self._records[name, noisy].seconds.add(seconds)

    def whom_to_judge(self, noisy: bool) -> str | None:
        """A drafter that is asked, if it is time: at every pass of a trial, else now and then."""
        dear = [
            (name, record)
            for (name, kind), record in self._records.items()
            if kind == noisy
            and not record.pause
            and record.seconds.value > _CHEAP * self._step.value
        ]
        on_trial = [name for name, record in dear if record.gain.count < _TRIAL]
        if on_trial:
            return on_trial[0]
        if not dear or self._num_steps % _EVERY:
            return None
        return dear[self._num_steps // _EVERY % len(dear)][0]

    def judge(self, name: str, noisy: bool, gain: float) -> None:
        """A tree had so many more tokens to be expected of it for what the drafter proposed."""
        record = self._records[name, noisy]
        record.gain.add(gain)
        if record.gain.count < _GLANCE or not self._step.value:
            return
        earned = record.gain.value * self._step.value
        needed = _DOUBT * record.seconds.value * self._tokens.value
        on_trial = record.gain.count < _TRIAL
        if earned >= (_NOWHERE if on_trial else 1.0) * needed:
            if not on_trial:
                record.next_pause = _PAUSES[0]
            return
        record.pause = record.next_pause
        record.next_pause = min(2 * record.next_pause, _PAUSES[1])
        record.gain = Mean()
