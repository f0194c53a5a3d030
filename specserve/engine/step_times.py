"""How long each stage of a step takes."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(slots=True)
class StageTime:
    """Seconds spent in one stage of a step: in all, and in the latest call."""

    seconds: float = 0.0
    last: float = 0.0


@dataclass(slots=True)
class StepTimes:
    """The number of steps, and the time spent in each stage."""

    num_steps: int = 0
    draft: StageTime = field(default_factory=StageTime)
    forward: StageTime = field(default_factory=StageTime)
    sample: StageTime = field(default_factory=StageTime)
    commit: StageTime = field(default_factory=StageTime)

    @property
    def host_seconds(self) -> float:
        """Seconds spent in all stages but the forward pass."""
        return self.draft.seconds + self.sample.seconds + self.commit.seconds

    @property
    def forward_seconds(self) -> float:
        return self.forward.seconds

    @property
    def propose_seconds(self) -> float:
        """Seconds of the latest proposal, until drafters observe the step."""
        return self.draft.last


def timed(
    stage: Literal["draft", "forward", "sample", "commit"],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that adds the time of each call of a method to `self.times`, a `StepTimes`."""

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            owner: Any = args[0]
            time_of: StageTime = getattr(owner.times, stage)
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                time_of.last = time.perf_counter() - started
                time_of.seconds += time_of.last

        return call

    return decorate
