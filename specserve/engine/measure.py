"""Measures how long a forward pass takes, by number of rows and by context length.

The least seconds of each pass are kept in a file, named by what they depend on. The first start
takes the time to measure all passes. A later one times a few of them, in another order every time,
so that the file comes to hold the times of an undisturbed machine. It uses those of the file,
scaled to the speed that the machine has now.
"""

import hashlib
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from tempfile import NamedTemporaryFile
from typing import Annotated, Final

import msgspec
import torch
from msgspec import Meta, Struct

from specserve.cache.table import BlockTable
from specserve.engine.parts import EngineParts
from specserve.hub.cache import default_cache_dir
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
_ROUNDS: Final = 5  # samples per point, while there is time
_SECONDS: Final = 2.0  # time budget; sizes that it leaves out are extrapolated by `CostModel`
_LATER_SECONDS: Final = 0.1  # time budget if there are stored times
_MAX_AGE: Final = 7 * 86400.0  # seconds; then all is measured again, as kernels and systems change


class _Stored(Struct, frozen=True):
    """The least seconds of forward passes."""

    since: float  # when this was begun, in seconds since 1970
    passes: list[tuple[int, int, Annotated[float, Meta(gt=0.0)]]]  # rows, context, seconds


def measure_costs(parts: EngineParts, on_stage: Callable[[str], None] = lambda stage: None) -> None:
    """Give the cost model of `parts` the seconds of forward passes over one tree.

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
    needed = points[: _SIZES.index(max(_LONG_SIZES)) + 1]
    if far > context:
        needed = [*((size, far) for size in _LONG_SIZES), *needed]
    file = _file_of(parts, context, far)
    since, stored = _read(file, needed)
    if stored:
        order = random.sample(list(stored), len(stored))
        timed = _time(parts.runner, seq, order, 1, _LATER_SECONDS)
    else:
        order = list(dict.fromkeys([*needed, *points]))
        timed = _time(parts.runner, seq, order, len(needed), _SECONDS)
    least = stored | {
        point: min([*seconds, stored.get(point, seconds[0])]) for point, seconds in timed.items()
    }
    if least != stored:
        _write(file, since, least)
    scale = median(each / least[point] for point, seconds in timed.items() for each in seconds)
    _set_costs(parts, {point: scale * seconds for point, seconds in least.items()}, context, far)


def _set_costs(parts: EngineParts, seconds: Mapping[_Point, float], context: int, far: int) -> None:
    samples = {size: each for (size, before), each in seconds.items() if before == context}
    fixed = per_row = 0.0
    if far > context:
        few, many = (seconds[size, far] - samples[size] for size in _LONG_SIZES)
        more = far - context
        per_row = max(0.0, (many - few) / (_LONG_SIZES[1] - _LONG_SIZES[0]) / more)
        fixed = max(0.0, few / more - per_row)
    parts.cost_model.measure(samples, context, fixed, per_row)


def _time(
    runner: Runner, seq: SequenceState, points: Sequence[_Point], min_points: int, budget: float
) -> dict[_Point, list[float]]:
    """The seconds of passes over the points, at least the first `min_points`.

    All points are timed round by round, so that a temporary slowdown of the machine affects them
    alike.
    """
    _timed(runner, seq, min(points))  # the first pass allocates memory and starts threads
    end = time.perf_counter() + budget
    timed: defaultdict[_Point, list[float]] = defaultdict(list)
    for _ in range(_ROUNDS):
        for point in points:
            if time.perf_counter() > end and len(timed) >= min_points:
                return timed
            timed[point].append(_timed(runner, seq, point))
    return timed


def _timed(runner: Runner, seq: SequenceState, point: _Point) -> float:
    size, context = point
    seq.table.num_committed = context  # not computed: the time does not depend on K and V
    tree = chain_tree(0, [0] * (size - 1), [1.0] * (size - 1), 1)
    start = time.perf_counter()
    runner.forward([Entry(seq, 0, size)], {seq.id: tree})
    return time.perf_counter() - start


def _file_of(parts: EngineParts, context: int, far: int) -> Path:
    """The file for the times of these parts: its name is a hash of what the times depend on."""
    model, runner = parts.model, parts.runner
    known = (
        *(_processor(), torch.get_num_threads(), str(parts.platform.device)),
        *(parts.platform.kernels.name, type(model).__name__, model.exact, str(model.dtype)),
        *(model.shape, model.num_bytes, runner.num_top, runner.aux_layers),
        *(context, far, parts.config.cache.block_size),
    )
    name = hashlib.sha256(msgspec.json.encode(known)).hexdigest()[:16]
    return default_cache_dir() / "pass-costs" / f"{name}.json"


def _processor() -> str:
    """The processor's model, where Linux tells it: several machines may share a home."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next((line for line in lines if line.startswith("model name")), "")
    return ""


def _read(file: Path, needed: Sequence[_Point]) -> tuple[float, dict[_Point, float]]:
    """Since when there are times in `file`, and these; now and none if it is missing, damaged or
    old, or has not all that are `needed`."""
    now = time.time()
    with suppress(OSError, msgspec.MsgspecError):
        stored = msgspec.json.decode(file.read_bytes(), type=_Stored)
        passes = {(rows, context): seconds for rows, context, seconds in stored.passes}
        if 0 <= now - stored.since < _MAX_AGE and passes.keys() >= set(needed):
            return stored.since, passes
    return now, {}


def _write(file: Path, since: float, least: Mapping[_Point, float]) -> None:
    """Replace `file` at once, as several processes may write it. Does nothing if it cannot be
    written: the next start measures again."""
    stored = _Stored(since, [(*point, seconds) for point, seconds in least.items()])
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=file.parent, delete=False) as stream:
            stream.write(msgspec.json.encode(stored))
        Path(stream.name).replace(file)
