"""Warm-up: forward passes of every kind once, before the first request.

The first pass of a shape is slow, because kernels are compiled or chosen and memory is allocated.
"""

import time
from collections.abc import Callable
from dataclasses import replace

from specserve.engine.engine import Engine
from specserve.engine.measure import measure_costs
from specserve.engine.parts import EngineParts
from specserve.models.fields import ModelError
from specserve.runner.warmup import STEPS_PER_ROUND, warmup_rounds
from specserve.speculation.cost_model import CostModel
from specserve.types import StepOutput


def warm_up(parts: EngineParts, on_stage: Callable[[str], None] = lambda stage: None) -> float:
    """Run every kind of forward pass once on an engine of its own, then `measure_costs`.

    Returns the seconds of the slowest step, if possible of the third round or a later one, because
    the first two build kernels. Raises ModelError if the model cannot run the largest passes.
    """
    config, engine = parts.config, Engine(replace(parts, cost_model=CostModel()))
    rounds = list(
        warmup_rounds(
            row_multiple=parts.model.row_multiple,
            max_rows=config.schedule.max_num_batched_tokens,
            max_seqs=config.schedule.max_num_seqs,
            max_nodes=config.draft.max_nodes,
            max_tokens=parts.max_context,
        )
    )
    slowest = 0.0
    for index, requests in enumerate(rounds, start=1):
        on_stage(f"warming up ({index} of {len(rounds)})")
        for request in requests:
            engine.submit(request)
        outputs: list[StepOutput] = []
        seconds = []
        for _ in range(STEPS_PER_ROUND):
            started = time.perf_counter()
            outputs += engine.step()
            seconds.append(time.perf_counter() - started)
        slowest = max(seconds) if index <= 2 else max(slowest, *seconds)
        for request in requests:
            engine.abort(request.id)
        outputs += engine.step()
        errors = [output.error for output in outputs if output.finish == "error"]
        if errors:
            raise ModelError(
                f"warm-up: {errors[0]}; if memory is short, lower kv_memory or "
                f"max_num_batched_tokens ({config.schedule.max_num_batched_tokens})"
            )
    measure_costs(parts, on_stage)
    return slowest
