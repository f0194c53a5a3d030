"""Measures how long a forward pass takes, by number of rows and by context length.

The seconds of all these passes are measured once and kept in a file, by what they depend on. Later
starts time two of the passes again. If their ratio is still that of the file, the stored seconds
are used, scaled to the speed that the machine has now; otherwise all passes are measured again.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
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
_REPEATS: Final = 5  # samples per point, while there is time
_SECONDS: Final = 2.0  # time budget; sizes that it leaves out are extrapolated by `CostModel`
_MIN_POINTS: Final = len(_LONG_SIZES) + _SIZES.index(max(_LONG_SIZES)) + 1  # points always measured

_CHECKED_SIZES: Final = (1, 8)  # rows, timed again at every start
_TOLERANCE: Final = 1.25  # by which their ratio may differ from the stored one; noise is below it

_Seconds = Annotated[float, Meta(ge=0.0)]


class _PassCosts(Struct, frozen=True):
    """Median seconds of forward passes, as `CostModel.measure` takes them."""

    samples: dict[int, Annotated[float, Meta(gt=0.0)]]
    context: int
    fixed: _Seconds
    per_row: _Seconds


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
    file = _file_of(parts, context, far)
    costs = _read(file)
    scale = None if costs is None else _scale(parts.runner, seq, costs)
    if costs is None or scale is None:
        costs, scale = _measured(parts.runner, seq, context, far), 1.0
        _write(file, costs)
    samples = {size: scale * seconds for size, seconds in costs.samples.items()}
    parts.cost_model.measure(samples, context, scale * costs.fixed, scale * costs.per_row)


def _measured(runner: Runner, seq: SequenceState, context: int, far: int) -> _PassCosts:
    """The costs at `context` tokens, and how they grow up to `far` tokens."""
    points = [(size, context) for size in _SIZES]
    if far > context:
        points[:0] = [(size, far) for size in _LONG_SIZES]
    medians = _medians(runner, seq, points)
    samples = {size: seconds for (size, before), seconds in medians.items() if before == context}
    fixed = per_row = 0.0
    if far > context:
        few, many = (medians[size, far] - samples[size] for size in _LONG_SIZES)
        more = far - context
        per_row = max(0.0, (many - few) / (_LONG_SIZES[1] - _LONG_SIZES[0]) / more)
        fixed = max(0.0, few / more - per_row)
    return _PassCosts(samples, context, fixed, per_row)


def _scale(runner: Runner, seq: SequenceState, costs: _PassCosts) -> float | None:
    """How many times as long as in `costs` a forward pass takes now; None if that depends on the
    number of rows."""
    medians = _medians(runner, seq, [(size, costs.context) for size in _CHECKED_SIZES])
    ratios = [seconds / costs.samples[size] for (size, _), seconds in medians.items()]
    if max(ratios) > _TOLERANCE * min(ratios):
        return None
    return sum(ratios) / len(ratios)


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


def _file_of(parts: EngineParts, context: int, far: int) -> Path:
    """The file for the costs of these parts: its name is a hash of what the costs depend on."""
    model, runner = parts.model, parts.runner
    known = (
        *(_SIZES, context, far, parts.config.cache.block_size, torch.get_num_threads()),
        *(parts.platform.kernels.name, str(parts.platform.device), model.exact),
        *(type(model).__name__, str(model.dtype), model.num_bytes, runner.num_top),
        *(runner.aux_layers, model.shape),
    )
    name = hashlib.sha256(msgspec.json.encode(known)).hexdigest()[:16]
    return default_cache_dir() / "pass-costs" / f"{name}.json"


def _read(file: Path) -> _PassCosts | None:
    """The costs in `file`; None if it is missing or damaged."""
    with suppress(OSError, msgspec.MsgspecError):
        costs = msgspec.json.decode(file.read_bytes(), type=_PassCosts)
        if costs.samples.keys() >= set(_CHECKED_SIZES):
            return costs
    return None


def _write(file: Path, costs: _PassCosts) -> None:
    """Replace `file` at once, as several processes may write it. Does nothing if it cannot be
    written: the next start measures again."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=file.parent, delete=False) as stream:
            stream.write(msgspec.json.encode(costs))
        Path(stream.name).replace(file)
