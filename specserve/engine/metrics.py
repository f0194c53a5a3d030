"""What the engine says about itself: what it is, and what it counts. No torch."""

import time
from dataclasses import dataclass, field

from msgspec import Struct

from specserve.engine.limits import Limits
from specserve.types import SpecStats


class EngineInfo(Struct, frozen=True):
    """What an engine is, once it runs."""

    limits: Limits
    block_size: int
    max_num_seqs: int
    max_nodes: int
    device: str
    dtype: str
    exact: bool


class DrafterStats(Struct, frozen=True):
    """The nodes of one source. Index d of a tuple is depth d + 1."""

    name: str
    active: bool  # False: it kept failing and was switched off
    num_proposed: int  # nodes, before the trees of several drafters are merged
    verified_by_depth: tuple[int, ...]  # nodes of merged trees, by the source they count for
    accepted_by_depth: tuple[int, ...]
    num_failures: int = 0  # calls; a request for which it failed is decoded without it

    @property
    def num_verified(self) -> int:
        return sum(self.verified_by_depth)

    @property
    def num_accepted(self) -> int:
        return sum(self.accepted_by_depth)


class EngineStats(Struct, frozen=True):
    """A snapshot; counts and seconds are totals since the start.

    On a GPU a stage's work may show in the seconds of the stage that waits for its result.
    """

    num_steps: int
    num_running: int
    num_waiting: int
    num_preemptions: int
    prompt_tokens: int  # of all requests admitted so far
    prefix_cache_queries: int  # tokens looked up: those of the prompts, unless it is switched off
    prefix_cache_hits: int  # tokens found
    kv_slots_total: int
    kv_slots_allocated: int  # in blocks held by running sequences
    kv_slots_used: int  # of those, with valid KV; a slot shared by several counts once
    kv_blocks_idle: int  # cached prefixes nobody uses now
    draft_seconds: float
    forward_seconds: float
    sample_seconds: float
    commit_seconds: float
    speculation: SpecStats  # all requests together
    drafters: tuple[DrafterStats, ...]  # as in `EngineInfo`
    predictions: DrafterStats  # nodes from texts that callers predicted, whoever read them

    @property
    def kv_utilisation(self) -> float:
        """Slots in use / slots allocated."""
        return self.kv_slots_used / self.kv_slots_allocated if self.kv_slots_allocated else 1.0

    @property
    def generation_tokens(self) -> int:
        return self.speculation.num_emitted_tokens

    @property
    def num_drafts(self) -> int:
        """Passes of one sequence that verified at least one drafted node."""
        return self.speculation.drafted_by_depth[0] if self.speculation.drafted_by_depth else 0

    @property
    def num_draft_tokens(self) -> int:
        """Drafted nodes verified."""
        return self.speculation.num_draft_tokens

    @property
    def num_accepted_tokens(self) -> int:
        return self.speculation.num_accepted_draft_tokens

    @property
    def drafted_by_depth(self) -> tuple[int, ...]:
        """Index d: passes whose tree reached depth d + 1."""
        return self.speculation.drafted_by_depth

    @property
    def accepted_by_depth(self) -> tuple[int, ...]:
        """Index d: passes that accepted d + 1 tokens or more."""
        return self.speculation.accepted_by_depth


@dataclass(slots=True)
class Stopwatch:
    """Seconds spent inside `with`, added up."""

    seconds: float = 0.0
    last: float = 0.0  # the latest `with` alone
    _started: float = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.last = time.perf_counter() - self._started
        self.seconds += self.last


@dataclass(slots=True)
class StepTimes:
    """Where the time of the steps went."""

    num_steps: int = 0
    draft: Stopwatch = field(default_factory=Stopwatch)
    forward: Stopwatch = field(default_factory=Stopwatch)
    sample: Stopwatch = field(default_factory=Stopwatch)
    commit: Stopwatch = field(default_factory=Stopwatch)
