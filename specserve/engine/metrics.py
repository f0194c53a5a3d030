"""What the engine counts about itself."""

from dataclasses import dataclass

from msgspec import Struct


class EngineStats(Struct, frozen=True):
    """A snapshot; seconds are totals since the start."""

    num_steps: int
    num_running: int
    num_waiting: int
    num_preemptions: int
    kv_slots_total: int
    kv_slots_allocated: int  # in blocks held by running sequences
    kv_slots_used: int  # of those, with valid KV; a slot shared by several counts once
    kv_blocks_idle: int  # cached prefixes nobody uses now
    draft_seconds: float
    forward_seconds: float
    verify_seconds: float

    @property
    def kv_utilisation(self) -> float:
        """Slots in use / slots allocated."""
        return self.kv_slots_used / self.kv_slots_allocated if self.kv_slots_allocated else 1.0


@dataclass(slots=True)
class StepTimes:
    """Seconds per stage, added up."""

    num_steps: int = 0
    draft: float = 0.0
    forward: float = 0.0
    verify: float = 0.0
