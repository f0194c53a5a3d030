"""The messages between the HTTP process and the engine process. Imports no torch.

To the engine: `Configure` once, then `Request` and `Abort`. From the engine: `Loading` while it
starts, then `Ready` once (or `Failed`, after which it ends), then a `Stepped` after every step and,
while it has no work, every `HEARTBEAT_S`.
"""

from typing import Final

from msgspec import Struct

from specserve.config import EngineConfig
from specserve.engine.metrics import EngineInfo, EngineStats
from specserve.types import Abort, Request, StepOutput

HEARTBEAT_S: Final = 0.5  # seconds


class Configure(Struct, frozen=True, tag=True):
    config: EngineConfig
    target: str  # the model directory


class Loading(Struct, frozen=True, tag=True):
    """The start of the engine has made progress."""


class Ready(Struct, frozen=True, tag=True):
    info: EngineInfo
    stats: EngineStats
    slowest_step: float  # seconds, of the warm-up steps


class Failed(Struct, frozen=True, tag=True):
    """The settings cannot be used; another start would fail as well."""

    error: str


class Refused(Struct, frozen=True, tag=True):
    """A request that can never be served as it is (`RequestError`)."""

    id: str
    param: str
    message: str


class Stepped(Struct, frozen=True, tag=True):
    """The outputs of a step; a heartbeat has none."""

    outputs: tuple[StepOutput, ...]
    stats: EngineStats


ToEngine = Configure | Request | Abort
FromEngine = Loading | Ready | Failed | Refused | Stepped
