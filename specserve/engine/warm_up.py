"""Warm-up: forward passes of every kind once, before the first request.

The first pass of a shape is slow, because kernels are compiled or chosen and memory is allocated.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

import msgspec

from specserve.engine.engine import Engine
from specserve.engine.measure import measure_costs
from specserve.engine.parts import EngineParts
from specserve.models.fields import ModelError
from specserve.speculation.cost_model import CostModel
from specserve.types import Request, SamplingParams, StepOutput

_STEPS_ALONE: Final = 3  # of one sequence: a prompt, a tree after a prompt, a tree after a tree
_STEPS_TOGETHER: Final = 2  # of several sequences, after a round of one: prompts, trees
_PROMPT_LEN: Final = 4  # tokens per prompt in the rounds that run trees

_GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, seed=0)
_SAMPLED = SamplingParams(
    temperature=0.8,
    top_k=8,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.1,
    logprobs=1,
    ignore_eos=True,
    seed=0,
)


def warm_up(parts: EngineParts, on_stage: Callable[[str], None] = lambda stage: None) -> float:
    """Run every kind of forward pass once on an engine of its own, then `measure_costs`.

    Returns the seconds of the slowest step after the first round, which builds kernels. Raises
    ModelError if the model cannot run the largest passes.
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
        for _ in range(_STEPS_ALONE if len(requests) == 1 else _STEPS_TOGETHER):
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


def warmup_rounds(
    *, row_multiple: int, max_rows: int, max_seqs: int, max_nodes: int, max_tokens: int
) -> Iterator[list[Request]]:
    """Yield the rounds; the requests of one round run together.

    The first rounds have prompts only: `row_multiple` rows in one forward pass, then twice as many
    each time, up to `max_rows`. The last rounds have trees of `max_nodes` nodes: for one sequence,
    then for as many sequences as fit. No sequence exceeds `max_tokens` tokens, prompt and output.
    """
    num_rows = row_multiple
    while num_rows < max_rows:
        yield _prompts(num_rows, max_seqs, max_tokens - 1)
        num_rows *= 2
    yield _prompts(max_rows, max_seqs, max_tokens - 1)
    prompt_len = min(_PROMPT_LEN, max_tokens - 1)
    for num_seqs in sorted({1, min(max_seqs, max(1, max_rows // max_nodes))}):
        yield [
            _request(index, prompt_len, min(2 * max_nodes + 2, max_tokens - prompt_len))
            for index in range(num_seqs)
        ]


def _prompts(num_rows: int, max_seqs: int, longest: int) -> list[Request]:
    """Up to `max_seqs` prompts of `num_rows` tokens in total, each of which generates one token."""
    lengths = [longest] * (num_rows // longest) + [num_rows % longest]
    return [_request(i, length, 1) for i, length in enumerate(lengths[:max_seqs]) if length]


def _request(index: int, prompt_len: int, max_tokens: int) -> Request:
    """A prompt that repeats one token, so that drafters that copy repeated text propose trees."""
    sampling = msgspec.structs.replace(_SAMPLED if index % 2 else _GREEDY, max_tokens=max_tokens)
    salt = f"{prompt_len}/{max_tokens}/{index}"  # distinct, so the prefix cache has no hits
    return Request(f"warm-up-{index}", (0,) * prompt_len, sampling, cache_salt=salt)
