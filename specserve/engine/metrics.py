"""The description and the statistics of an engine. No torch."""

from msgspec import Struct

from specserve.engine.limits import Limits
from specserve.types import SamplingParams, SpecStats


class EngineInfo(Struct, frozen=True):
    """What does not change while an engine runs."""

    limits: Limits
    block_size: int
    max_num_seqs: int
    max_nodes: int
    device: str
    weights: str  # what they are held as, such as bfloat16 or int8
    kv_dtype: str
    exact: bool
    default_sampling: SamplingParams = SamplingParams()  # of a request that gives none


class DrafterStats(Struct, frozen=True):
    """What one drafter proposed, and what became of it. Index d of a tuple is depth d + 1."""

    name: str
    active: bool  # False: switched off after repeated failures
    num_proposed: int  # nodes, before the trees of several drafters are merged
    verified_by_depth: tuple[int, ...]  # nodes of merged trees that have its drafter id
    accepted_by_depth: tuple[int, ...]
    num_failures: int = 0  # failed calls; a request whose own call fails is decoded without it

    @property
    def num_verified(self) -> int:
        return sum(self.verified_by_depth)

    @property
    def num_accepted(self) -> int:
        return sum(self.accepted_by_depth)


class EngineStats(Struct, frozen=True):
    """A snapshot of the statistics; counts and seconds are totals since the start.

    On a GPU the work of a stage may count as time of the stage that waits for its result.
    """

    num_steps: int
    num_running: int
    num_waiting: int
    num_preemptions: int
    prompt_tokens: int  # of all requests admitted so far, each counted once
    prefix_cache_queries: int  # tokens looked up: `prompt_tokens`, or 0 without caching
    prefix_cache_hits: int  # prompt tokens found in the cache
    kv_slots_total: int
    kv_slots_allocated: int  # in blocks held by running sequences
    kv_slots_used: int  # of those, with valid KV; a slot of a shared block counts once
    kv_blocks_idle: int  # blocks of cached prefixes that no running sequence uses
    draft_seconds: float
    forward_seconds: float
    sample_seconds: float
    commit_seconds: float
    speculation: SpecStats  # over all requests
    drafters: tuple[DrafterStats, ...]  # in the order of `EngineInfo.limits.drafters`
    predictions: DrafterStats  # nodes drafted from the `prediction` of requests

    @property
    def generation_tokens(self) -> int:
        return self.speculation.num_emitted_tokens

    @property
    def num_drafts(self) -> int:
        """Number of verifications (one sequence, one forward pass) with a drafted node."""
        return self.speculation.drafted_by_depth[0] if self.speculation.drafted_by_depth else 0

    @property
    def num_draft_tokens(self) -> int:
        """Number of drafted nodes verified."""
        return self.speculation.num_draft_tokens

    @property
    def num_accepted_tokens(self) -> int:
        return self.speculation.num_accepted_draft_tokens
