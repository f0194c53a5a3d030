"""Logs a status line at a fixed interval, worded as vLLM's; no line while nothing happens."""

import asyncio
import logging
import time
from collections.abc import Callable
from itertools import islice, zip_longest
from typing import Final

from specserve.engine.metrics import EngineStats
from specserve.server.service import Service

MAX_POSITIONS: Final = 16  # depths whose acceptance rate is printed

logger = logging.getLogger(__name__)


async def print_status(service: Service, interval: float) -> None:
    """Log the status every `interval` seconds, until cancelled."""
    before, since = service.engine.stats, time.monotonic()
    while True:
        await asyncio.sleep(interval)
        after, now = service.engine.stats, time.monotonic()
        if after is not None:
            line = format_status(before, after, now - since, service.admission.num_waiting)
            if line is not None:
                logger.info("%s", line)
        before, since = after, now


def format_status(
    before: EngineStats | None, after: EngineStats, seconds: float, num_queued: int = 0
) -> str | None:
    """The status line for the time between two snapshots, `seconds` apart.

    None if there was no step and nothing runs or waits. If `before` is None, or from an engine that
    has been restarted since, the totals of `after` are used.
    """
    if before is not None and before.num_steps > after.num_steps:
        before = None

    def growth(read: Callable[[EngineStats], int]) -> int:
        return read(after) - (0 if before is None else read(before))

    num_waiting = after.num_waiting + num_queued
    if not (growth(lambda s: s.num_steps) or after.num_running or num_waiting):
        return None
    queries = growth(lambda s: s.prefix_cache_queries)
    hits = growth(lambda s: s.prefix_cache_hits)
    prompt = growth(lambda s: s.prompt_tokens) / seconds
    generated = growth(lambda s: s.generation_tokens) / seconds
    line = (
        f"Avg prompt throughput: {prompt:.1f} tokens/s, "
        f"Avg generation throughput: {generated:.1f} tokens/s, "
        f"Running: {after.num_running} reqs, Waiting: {num_waiting} reqs, "
        f"KV cache usage: {_percent(after.kv_slots_allocated, after.kv_slots_total)}, "
        f"Prefix cache hit rate: {_percent(hits, queries)}"
    )
    drafts = growth(lambda s: s.num_drafts)
    if drafts == 0:
        return line
    drafted = growth(lambda s: s.num_draft_tokens)
    accepted = growth(lambda s: s.num_accepted_tokens)
    known = () if before is None else before.speculation.accepted_by_depth
    reached, total = after.speculation.drafted_by_depth, after.speculation.accepted_by_depth
    by_depth = zip_longest(reached, total, known, fillvalue=0)
    rates = [(now - past) / drafts for _, now, past in islice(by_depth, MAX_POSITIONS)]
    return (
        f"{line}, SpecDecoding metrics: Mean acceptance length: {1 + accepted / drafts:.2f}, "
        f"Accepted throughput: {accepted / seconds:.2f} tokens/s, "
        f"Drafted throughput: {drafted / seconds:.2f} tokens/s, "
        f"Accepted: {accepted} tokens, Drafted: {drafted} tokens, "
        f"Per-position acceptance rate: {', '.join(f'{rate:.3f}' for rate in rates)}, "
        f"Avg Draft acceptance rate: {_percent(accepted, drafted)}"
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole if whole else 0.0:.1f}%"
