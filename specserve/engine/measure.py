"""Measures how long a forward pass takes, by number of rows and by context length."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Final

from specserve.cache.table import BlockTable
from specserve.engine.parts import EngineParts
from specserve.runner.runner import Runner
from specserve.sequence import SequenceState
from specserve.step import Entry
from specserve.tree import MAX_NODES, chain_tree
from specserve.types import Request, SamplingParams

_Point = tuple[int, int]  # rows, context length in tokens
_SIZES: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # rows, measured at _CONTEXT
_CONTEXT: Final = 128  # tokens before the tree
_LONG_CONTEXT: Final = 1024  # tokens, to measure how the time grows with the context
_LONG_SIZES: Final = (1, 8)  # rows, measured at _LONG_CONTEXT
_REPEATS: Final = 5  # samples per point, while there is time
_SECONDS: Final = 2.0  # time budget; sizes that it leaves out are extrapolated by `CostModel`
_MIN_POINTS: Final = len(_LONG_SIZES) + _SIZES.index(max(_LONG_SIZES)) + 1  # points always measured


def measure_costs(parts: EngineParts, on_stage: Callable[[str], None] = lambda stage: None) -> None:
    """Give the cost model of `parts` the median seconds of forward passes over one tree.

    Engines made afterwards verify only nodes that are worth their cost. Does nothing if all nodes
    are verified anyway. Overwrites KV slots, so no engine may have requests meanwhile.
    """
    room = parts.max_context - MAX_NODES
    if not parts.config.draft.cost_aware or room <= 0:
        return
    on_stage("measuring what a pass costs")
    context, far = min(_CONTEXT, room), min(_LONG_CONTEXT, room)
    kv = parts.new_kv_manager()
    request = Request("probe", (0,) * far, SamplingParams())
    seq = SequenceState(request, list(request.prompt_ids), BlockTable(kv.block_size))
    kv.reserve(seq.table, far + MAX_NODES)
    points = [(size, context) for size in _SIZES]
    if far > context:
        points[:0] = [(size, far) for size in _LONG_SIZES]
    medians = _medians(parts.runner, seq, points)
    samples = {size: seconds for (size, before), seconds in medians.items() if before == context}
    fixed = per_row = 0.0
    if far > context:
        few, many = (medians[size, far] - samples[size] for size in _LONG_SIZES)
        more = far - context
        per_row = max(0.0, (many - few) / (_LONG_SIZES[1] - _LONG_SIZES[0]) / more)
        fixed = max(0.0, few / more - per_row)
    parts.cost_model.measure(samples, context, fixed, per_row)


def _medians(runner: Runner, seq: SequenceState, points: Sequence[_Point]) -> dict[_Point, float]:
    """The median seconds of each point, for as many points as the time budget allows.

    The first round is a warm-up and decides how many points are measured. All points are timed
    round by round, so that a temporary slowdown of the machine affects them alike.
    """
    end = time.perf_counter() + _SECONDS
    known: dict[_Point, list[float]] = {}
    for point in points:
        _timed(runner, seq, point)
        known[point] = []
        if time.perf_counter() > end and len(known) >= _MIN_POINTS:
            break
    for number in range(_REPEATS):
        for point, seconds in known.items():
            if not number or time.perf_counter() < end:
                seconds.append(_timed(runner, seq, point))
    return {point: median(seconds) for point, seconds in known.items()}


def _timed(runner: Runner, seq: SequenceState, point: _Point) -> float:
    size, context = point
    seq.table.num_committed = context  # not computed: the time does not depend on K and V
    tree = chain_tree(0, [0] * (size - 1), [1.0] * (size - 1), 1)
    start = time.perf_counter()
    runner.forward([Entry(seq, 0, size)], {seq.id: tree})
    return time.perf_counter() - start
