"""Engines without a tokenizer, and how requests of token ids are run on them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specserve.config import load_config
from specserve.engine.engine import Engine
from specserve.engine.parts import load_parts
from specserve.hub import resolve
from specserve.types import Request, SamplingParams, SpeculationParams, StepOutput


def open_engine(
    target: Path,
    draft: str | Sequence[str] = "none",
    *,
    kv_slots: int | None = None,
    **settings: Any,
) -> Engine:
    """An engine for the model in the directory `target`.

    `kv_slots` is the size of the KV cache in tokens; it loads the model twice. Raises ConfigError,
    DraftError or ModelError.
    """
    if kv_slots is not None:
        parts = open_engine(target, draft, **settings).parts
        wanted = [each.kv_spec(parts.model.dtype) for each in parts.drafters.values()]
        specs = [parts.model.kv_spec, *(spec for spec in wanted if spec is not None)]
        settings["kv_memory"] = str(kv_slots * sum(spec.bytes_per_slot for spec in specs))
    drafts = [draft] if isinstance(draft, str) else draft
    config = load_config({"target": str(target), "draft": drafts, **settings})
    return Engine(load_parts(config, target, None, resolve))


def run_requests(
    engine: Engine,
    prompts: Sequence[tuple[int, ...]],
    sampling: SamplingParams | Sequence[SamplingParams],
    *,
    check: bool = True,
    speculation: SpeculationParams | None = None,
) -> list[list[StepOutput]]:
    """All outputs per prompt, with `check_integrity` after every step.

    The ids of the requests are q0, q1, and so on. Those that already run are finished too.
    """
    params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
    for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
        engine.submit(Request(f"q{index}", prompt, param, speculation or SpeculationParams()))
    outputs: dict[str, list[StepOutput]] = {f"q{index}": [] for index in range(len(prompts))}
    while engine.has_work:
        for output in engine.step():
            if output.id in outputs:
                outputs[output.id].append(output)
        if check:
            engine.check_integrity()
    return list(outputs.values())


def output_ids(outputs: Sequence[StepOutput]) -> tuple[int, ...]:
    """The token ids of one request."""
    return tuple(token for output in outputs for token in output.ids)
