"""What the HTTP process and the engine's process say to each other. No torch.

To the engine: `Configure` once, then `Request` and `Abort`. From it: `Loading` while it starts,
`Ready` once (or `Failed`, and it is over), then a `Stepped` after every step, and every
`HEARTBEAT_S` when there is nothing to do. `Ready` tells how long a step may take.
"""

from typing import Final

from msgspec import Struct

from specserve.config import EngineConfig
from specserve.engine.metrics import EngineInfo as EngineInfo
from specserve.engine.metrics import EngineStats
from specserve.types import Abort, Request, StepOutput

HEARTBEAT_S: Final = 0.5


class Configure(Struct, frozen=True, tag=True):
    config: EngineConfig
    target: str  # the model directory


class Loading(Struct, frozen=True, tag=True):
    stage: str  # what it is doing, in words


class Ready(Struct, frozen=True, tag=True):
    info: EngineInfo
    stats: EngineStats
    slowest_step: float  # seconds, while it warmed up


class Failed(Struct, frozen=True, tag=True):
    """Settings that cannot be used: starting again would not help."""

    error: str


class Refused(Struct, frozen=True, tag=True):
    """A request that can never be served as asked (`RequestError`)."""

    id: str
    param: str
    message: str


class Stepped(Struct, frozen=True, tag=True):
    """A step, or a heartbeat without outputs."""

    outputs: tuple[StepOutput, ...]
    stats: EngineStats


ToEngine = Configure | Request | Abort
FromEngine = Loading | Ready | Failed | Refused | Stepped
