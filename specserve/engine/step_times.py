"""How long each stage of a step takes."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Concatenate, Literal, ParamSpec, Protocol, TypeVar


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


class HasTimes(Protocol):
    times: StepTimes


Self = TypeVar("Self", bound=HasTimes)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Method = Callable[Concatenate[Self, Arguments], Result]


def timed(
    stage: Literal["draft", "forward", "sample", "commit"],
) -> Callable[[Method[Self, Arguments, Result]], Method[Self, Arguments, Result]]:
    """A decorator that adds the time of each call of a method to `self.times`."""

    def decorate(method: Method[Self, Arguments, Result]) -> Method[Self, Arguments, Result]:
        def call(self: Self, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            time_of: StageTime = getattr(self.times, stage)
            started = time.perf_counter()
            try:
                return method(self, *args, **kwargs)
            finally:
                time_of.last = time.perf_counter() - started
                time_of.seconds += time_of.last

        return call

    return decorate
