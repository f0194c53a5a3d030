"""Whether a drafter, beside the others, earns the time it takes. Host only.

What a drafter adds is seen afterwards: how many more tokens were emitted than the tree of the
others would have had accepted, which the emitted ones tell. That has to be worth more than what
would have been emitted in the time its drafting took; where it is not, the drafter is left out,
and tried again after a pause that doubles. Where: by what the others' tree promises, as a sure
tree has little to gain. Sampled requests are judged apart from greedy ones.
"""

from bisect import bisect
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Final

_TRIAL: Final = 32  # drafts that are looked at before anything is decided
_GLANCE: Final = 8  # that are enough for a drafter which is nowhere near
_NOWHERE: Final = 0.4  # of what it has to bring
_MEMORY: Final = 96.0  # drafts that a mean is of: what each brings is a small whole number
_PAUSES: Final = (128, 4096)  # passes without it: the first time, and at most
_MARGIN: Final = 1.1  # who brings just what it takes need not be asked
_CHEAP: Final = 0.02  # of a pass: who takes less is not worth judging
_LEVELS: Final = (1.5, 2.2, 3.0)  # tokens that the others' tree promises: a record for each range


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
    """Of a drafter, where the others promise so much."""

    gain: Mean = field(default_factory=Mean)  # tokens
    pause: int = 0  # passes until it is tried again
    next_pause: int = _PAUSES[0]


@dataclass(slots=True)
class _Known:
    """Of a drafter, in requests of one kind."""

    seconds: Mean = field(default_factory=Mean)  # for one sequence
    following: Mean = field(default_factory=Mean)  # seconds of taking in a pass, for one sequence
    levels: list[_Record] = field(
        default_factory=lambda: [_Record() for _ in range(len(_LEVELS) + 1)]
    )

    def at(self, promised: float) -> _Record:
        return self.levels[bisect(_LEVELS, promised)]


class Worth:
    def __init__(self) -> None:
        self._known: defaultdict[tuple[str, bool], _Known] = defaultdict(_Known)
        self._step = Mean()  # seconds of a pass with all that belongs to it
        self._tokens = Mean()  # emitted by it

    def begin_step(self) -> None:
        for known in self._known.values():
            for record in known.levels:
                if record.pause:
                    record.pause -= 1

    def is_dear(self, name: str, sampled: bool) -> bool:
        """Whether what it takes matters. Not before it was asked once."""
        return self._known[name, sampled].seconds.value > _CHEAP * self._step.value

    def asks(self, name: str, sampled: bool, promised: float) -> bool:
        """Whether a drafter is asked. `promised`: tokens of a pass over the others' tree."""
        return not self._known[name, sampled].at(promised).pause

    def follows(self, name: str, sampled: bool) -> bool:
        """Whether it is asked at all, for some trees of the others."""
        return not all(record.pause for record in self._known[name, sampled].levels)

    def end_step(self, seconds: float, num_tokens: int) -> None:
        self._step.add(seconds)
        self._tokens.add(num_tokens)

    def took(self, name: str, sampled: bool, seconds: float) -> None:
        """Drafting for one sequence."""
        self._known[name, sampled].seconds.add(seconds)

    def followed(self, name: str, sampled: bool, seconds: float) -> None:
        """Taking in what a pass brought for one sequence."""
        self._known[name, sampled].following.add(seconds)

    def judge(self, name: str, sampled: bool, promised: float, gain: float) -> None:
        """It was asked, and so many more tokens were emitted for what it proposed."""
        known = self._known[name, sampled]
        record = known.at(promised)
        record.gain.add(gain)
        if record.gain.count < _GLANCE or not self._step.value:
            return
        earned = record.gain.value * self._step.value
        seconds = known.seconds.value + known.following.value
        needed = _MARGIN * seconds * self._tokens.value
        on_trial = record.gain.count < _TRIAL
        if earned >= (_NOWHERE if on_trial else 1.0) * needed:
            if not on_trial:
                record.next_pause = _PAUSES[0]
            return
        record.pause = record.next_pause
        record.next_pause = min(2 * record.next_pause, _PAUSES[1])
        record.gain = Mean()
