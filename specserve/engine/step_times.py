"""How long each stage of a step takes."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, ParamSpec, TypeVar, get_args

P = ParamSpec("P")
R = TypeVar("R")
Stage = Literal["draft", "forward", "sample", "commit"]


@dataclass(slots=True)
class StepTimes:
    """The number of steps, and the seconds spent in each stage."""

    num_steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(get_args(Stage), 0.0))
    latest: dict[str, float] = field(default_factory=dict)  # of the latest call of each stage


def timed(stage: Stage) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that adds the time of each call of a method to `self.times`, a `StepTimes`."""

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            owner: Any = args[0]
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                owner.times.latest[stage] = time.perf_counter() - started
                owner.times.seconds[stage] += owner.times.latest[stage]

        return call

    return decorate
