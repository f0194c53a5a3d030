"""How long a pass takes by its number of rows and by how much stands before them, on this machine
and with this model.

Times the runner alone, on one sequence that is thrown away. Knows nothing of drafters.
"""

import time
from collections.abc import Sequence as Seq
from statistics import median
from typing import Final

from specserve.cache.manager import KVCacheManager
from specserve.runner.runner import Runner
from specserve.runner.warmup import probe_request
from specserve.schedule.cost import PassCosts, PerToken
from specserve.schedule.scheduler import Scheduler
from specserve.sequence import Sequence
from specserve.step import Entry
from specserve.tree import MAX_NODES, chain_tree

_Point = tuple[int, int]  # rows, tokens before them
_SIZES: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_CONTEXT: Final = 128  # tokens before the tree
_LONG_CONTEXT: Final = 1024
_LONG_SIZES: Final = (1, 8)
_REPEATS: Final = 5
_SECONDS: Final = 2.0  # after which larger passes are left to the slope
_NEEDED: Final = len(_LONG_SIZES) + _SIZES.index(max(_LONG_SIZES)) + 1  # points, whatever they take


def measure_costs(scheduler: Scheduler, kv: KVCacheManager, runner: Runner, room: int) -> PassCosts:
    """Median seconds of passes of one tree. The sequence may have `room` tokens before it."""
    scheduler.add(probe_request(min(_LONG_CONTEXT, room)))
    seq = scheduler.plan().entries[0].seq
    kv.reserve(seq.table, seq.num_pending + MAX_NODES)
    context, far = min(_CONTEXT, room), min(_LONG_CONTEXT, room)
    points = [(size, context) for size in _SIZES]
    if far > context:
        points[:0] = [(size, far) for size in _LONG_SIZES]
    medians = _medians(runner, seq, points)
    samples = {size: seconds for (size, before), seconds in medians.items() if before == context}
    if far == context:
        return PassCosts(samples, context)
    few, many = (medians[size, far] - samples[size] for size in _LONG_SIZES)
    more = far - context
    per_row = max(0.0, (many - few) / (_LONG_SIZES[1] - _LONG_SIZES[0]) / more)
    return PassCosts(samples, context, PerToken(max(0.0, few / more - per_row), per_row))


def _medians(runner: Runner, seq: Sequence, points: Seq[_Point]) -> dict[_Point, float]:
    """By rows and tokens before them, as far as time is.

    Round after round, as a machine that is slower for a while is so for all of them. The first
    round only warms up, and tells how many there is time for.
    """
    end = time.perf_counter() + _SECONDS
    known: dict[_Point, list[float]] = {}
    for point in points:
        _timed(runner, seq, point)
        known[point] = []
        if time.perf_counter() > end and len(known) >= _NEEDED:
            break
    for number in range(_REPEATS):
        for point, seconds in known.items():
            if not number or time.perf_counter() < end:
                seconds.append(_timed(runner, seq, point))
    return {point: median(seconds) for point, seconds in known.items()}


def _timed(runner: Runner, seq: Sequence, point: _Point) -> float:
    size, context = point
    seq.table.num_committed = context  # nothing was computed: what K and V hold takes no time
    tree = chain_tree(0, [0] * (size - 1), [1.0] * (size - 1), 1)
    start = time.perf_counter()
    runner.forward([Entry(seq, 0, size)], {seq.id: tree})
    return time.perf_counter() - start
