"""How long a pass takes by its number of rows and by how much stands before them, on this machine
and with this model.

Times the runner alone, on one sequence that is thrown away. Knows nothing of drafters.
"""

import time
from collections.abc import Iterable
from statistics import median
from typing import Final

from specserve.cache.manager import KVCacheManager
from specserve.runner.runner import Runner
from specserve.runner.warmup import probe_request
from specserve.schedule.cost import PassCosts, PerToken
from specserve.schedule.scheduler import Scheduler
from specserve.sequence import Sequence
from specserve.step import Entry
from specserve.tree import MAX_NODES, DraftTree, chain_tree

_SIZES: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_CONTEXT: Final = 128  # tokens before the tree
_LONG_CONTEXT: Final = 1024
_LONG_SIZES: Final = (1, 8)
_REPEATS: Final = 5
_SECONDS: Final = 2.0  # after which larger passes are left to the slope


def measure_costs(scheduler: Scheduler, kv: KVCacheManager, runner: Runner, room: int) -> PassCosts:
    """Median seconds of passes of one tree. The sequence may have `room` tokens before it."""
    scheduler.add(probe_request(min(_LONG_CONTEXT, room)))
    seq = scheduler.plan().entries[0].seq
    kv.reserve(seq.table, seq.num_pending + MAX_NODES)
    end = time.perf_counter() + _SECONDS
    # Nothing was computed: what K and V hold takes no time.
    context = min(_CONTEXT, room)
    seq.table.commit(context)
    samples = _medians(runner, seq, _SIZES, end)
    if room <= context or time.perf_counter() > end:
        return PassCosts(samples, context)
    more = min(_LONG_CONTEXT, room) - context
    seq.table.commit(more)
    few, many = (
        seconds - samples[size]
        for size, seconds in _medians(runner, seq, _LONG_SIZES, float("inf")).items()
    )
    per_row = max(0.0, (many - few) / (_LONG_SIZES[1] - _LONG_SIZES[0]) / more)
    fixed = max(0.0, few / more - per_row)
    return PassCosts(samples, context, PerToken(fixed, per_row))


def _medians(runner: Runner, seq: Sequence, sizes: Iterable[int], end: float) -> dict[int, float]:
    """By size, as far as time is."""
    samples: dict[int, float] = {}
    for size in sizes:
        if samples and time.perf_counter() > end:
            break
        tree = chain_tree(0, [0] * (size - 1), [1.0] * (size - 1), 1)
        samples[size] = median(_timed(runner, Entry(seq, 0, size), tree) for _ in range(_REPEATS))
    return samples


def _timed(runner: Runner, entry: Entry, tree: DraftTree) -> float:
    start = time.perf_counter()
    runner.forward([entry], {entry.seq.id: tree})
    return time.perf_counter() - start
