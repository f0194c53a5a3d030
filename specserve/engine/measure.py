"""How long a pass takes by its number of rows, on this machine and with this model.

Times the runner alone, on one sequence that is thrown away. Knows nothing of drafters.
"""

import time
from statistics import median
from typing import Final

from specserve.cache.manager import KVCacheManager
from specserve.runner.runner import Runner
from specserve.runner.warmup import probe_request
from specserve.schedule.cost import PassCosts
from specserve.schedule.scheduler import Scheduler
from specserve.step import Entry
from specserve.tree import MAX_NODES, DraftTree, chain_tree

_SIZES: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_CONTEXT: Final = 128  # tokens before the tree
_REPEATS: Final = 5
_SECONDS: Final = 2.0  # after which larger passes are left to the slope


def measure_costs(scheduler: Scheduler, kv: KVCacheManager, runner: Runner, room: int) -> PassCosts:
    """Median seconds of passes of one tree. The sequence may have `room` tokens before it."""
    scheduler.add(probe_request(min(_CONTEXT, room)))
    entry = scheduler.plan().entries[0]
    seq = entry.seq
    kv.reserve(seq.table, seq.num_pending + MAX_NODES)
    start = time.perf_counter()
    samples: dict[int, float] = {}
    for size in _SIZES:
        if samples and time.perf_counter() - start > _SECONDS:
            break
        tree = chain_tree(0, [0] * (size - 1), [1.0] * (size - 1), 1)
        samples[size] = median(_timed(runner, Entry(seq, 0, size), tree) for _ in range(_REPEATS))
    return PassCosts(samples)


def _timed(runner: Runner, entry: Entry, tree: DraftTree) -> float:
    start = time.perf_counter()
    runner.forward([entry], {entry.seq.id: tree})
    return time.perf_counter() - start
