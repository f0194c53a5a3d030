"""Describes an engine, and collects the counters of its parts into one EngineStats."""

from specserve.cache.manager import KVCacheManager
from specserve.engine.metrics import DrafterStats, EngineInfo, EngineStats
from specserve.engine.parts import EngineParts
from specserve.engine.step_times import StepTimes
from specserve.schedule.scheduler import Scheduler
from specserve.speculation.compose import ComposedDrafter
from specserve.speculation.counts import DrafterCounts
from specserve.tree import PREDICTION_ID


def describe(parts: EngineParts) -> EngineInfo:
    config = parts.config
    return EngineInfo(
        limits=parts.limits,
        block_size=config.cache.block_size,
        max_num_seqs=config.schedule.max_num_seqs,
        max_nodes=config.draft.max_nodes,
        device=str(parts.platform.device),
        weights=parts.model.weights,
        kv_dtype=str(parts.model.dtype).removeprefix("torch."),
        exact=parts.platform.exact,
        default_sampling=parts.default_sampling,
    )


def take_snapshot(
    scheduler: Scheduler, kv: KVCacheManager, drafter: ComposedDrafter, times: StepTimes
) -> EngineStats:
    """Take a snapshot between two steps. It loops over sequences and drafters, not over tokens."""
    tables = [seq.table for seq in scheduler.running]
    # Only full blocks are shared, so each further user of a block counts `block_size` slots twice.
    num_doubled = sum(len(table.block_ids) for table in tables) - kv.pool.num_used
    num_committed = sum(table.num_committed for table in tables)
    counts, active, failures = drafter.counts, drafter.active, drafter.num_failures
    return EngineStats(
        num_steps=times.num_steps,
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        num_preemptions=scheduler.num_preemptions,
        prompt_tokens=scheduler.num_prompt_tokens,
        prefix_cache_queries=scheduler.num_prompt_tokens if kv.prefix_caching else 0,
        prefix_cache_hits=scheduler.num_cached_tokens,
        kv_slots_total=kv.num_slots,
        kv_slots_allocated=kv.pool.num_used * kv.block_size,
        kv_slots_used=num_committed - num_doubled * kv.block_size,
        kv_blocks_idle=kv.pool.num_idle,
        draft_seconds=times.seconds["draft"],
        forward_seconds=times.seconds["forward"],
        sample_seconds=times.seconds["sample"],
        commit_seconds=times.seconds["commit"],
        speculation=scheduler.counts.freeze(),
        drafters=tuple(
            _drafter_stats(name, name in active, failures[name], counts, drafter_id)
            for drafter_id, name in enumerate(drafter.names, start=1)
        ),
        predictions=_drafter_stats("prediction", True, 0, counts, PREDICTION_ID),
    )


def _drafter_stats(
    name: str, active: bool, num_failures: int, counts: DrafterCounts, drafter_id: int
) -> DrafterStats:
    verified = counts.verified[drafter_id]
    deepest = max((depth for depth, count in enumerate(verified) if count), default=0)
    return DrafterStats(
        name=name,
        active=active,
        num_failures=num_failures,
        num_proposed=counts.proposed[drafter_id],
        verified_by_depth=tuple(verified[1 : 1 + deepest]),
        accepted_by_depth=tuple(counts.accepted[drafter_id][1 : 1 + deepest]),
    )
