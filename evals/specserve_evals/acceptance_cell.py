"""One cell of an acceptance run: one draft at one temperature and budget, prompt by prompt.

Batch 1, without prefix caching, on an engine of the cell's own: a drafter that learns from what it
serves meets every prompt once. The same engine without its drafters answers each prompt too.
"""

import argparse
import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from msgspec import Struct

from specserve.drafting.compose import ComposedDrafter
from specserve.engine.engine import Engine
from specserve.engine.metrics import EngineStats
from specserve.llm import LLM, Completion
from specserve.types import SamplingParams, SpeculationParams
from specserve_evals.acceptance_figures import CellResult, Outcome, Run, by_category
from specserve_evals.progress import Advance
from specserve_evals.prompts import Prompt
from specserve_evals.runs import Variant, open_llm

WITHOUT_DRAFT: Final = SpeculationParams(enabled=False)


class Cell(Struct, frozen=True):
    variant: Variant
    temperature: float
    budget: int

    @property
    def key(self) -> tuple[str, float, int]:
        return self.variant.name, self.temperature, self.budget

    @property
    def label(self) -> str:
        return f"{self.variant.name}, temperature {self.temperature:g}, budget {self.budget}"


class Reading(Struct, frozen=True):
    """What clock and counters say at one moment."""

    clock: float
    stats: EngineStats

    @classmethod
    def take(cls, engine: Engine) -> "Reading":
        return cls(time.perf_counter(), engine.stats())


def measure(
    args: argparse.Namespace, cell: Cell, prompts: Sequence[Prompt], advance: Advance
) -> CellResult:
    """One cell, on a fresh engine. Raises ValueError if a drafter failed."""
    gc.collect()  # one engine at a time in memory
    llm = open_llm(
        args,
        cell.variant,
        lambda stage, _: advance(0, stage),
        max_nodes=cell.budget,
        prefix_caching=False,
    )
    llm.engine.warm_up()
    outcomes = []
    for index, prompt in enumerate(prompts):
        params = SamplingParams(
            temperature=cell.temperature, max_tokens=args.max_tokens, seed=args.seed + index
        )
        outcomes.append(answer_both_ways(llm, prompt, params, plain_first=index % 2 == 1))
        failed = [name for name, count in llm.engine.drafter.num_failures.items() if count]
        if failed:
            raise ValueError(f"draft: {failed} failed; see the log")
        advance(1, cell.label)
    return CellResult(
        draft=cell.variant.name,
        temperature=cell.temperature,
        budget=cell.budget,
        drafters=llm.engine.drafter.names,
        figures=by_category(outcomes),
        outcomes=tuple(outcomes),
    )


def answer_both_ways(
    llm: LLM, prompt: Prompt, params: SamplingParams, *, plain_first: bool
) -> Outcome:
    """With the draft and without; whichever is second meets the warmer machine."""
    if plain_first:
        plain, plain_run = answer_plainly(llm, prompt, params)
        drafted, run = answer(llm, prompt, params, SpeculationParams())
    else:
        drafted, run = answer(llm, prompt, params, SpeculationParams())
        plain, plain_run = answer_plainly(llm, prompt, params)
    sources = range(1, 1 + len(llm.engine.drafter.names))
    return Outcome(
        prompt=prompt.id,
        category=prompt.category,
        stats=drafted.stats,
        accepted_by_drafter=tuple(drafted.sources.count(source) for source in sources),
        drafted=run,
        plain=plain_run,
        same_ids=drafted.token_ids == plain.token_ids,
    )


def answer_plainly(llm: LLM, prompt: Prompt, params: SamplingParams) -> tuple[Completion, Run]:
    with without_drafters(llm.engine):
        return answer(llm, prompt, params, WITHOUT_DRAFT)


def answer(
    llm: LLM, prompt: Prompt, params: SamplingParams, speculation: SpeculationParams
) -> tuple[Completion, Run]:
    """Raises ValueError, naming the prompt, if it fails."""
    readings: list[Reading] = []

    def on_text(index: int, piece: str) -> None:
        if not readings:
            readings.append(Reading.take(llm.engine))

    (generation,) = llm.generate(
        [prompt.messages], params, speculation=speculation, on_text=on_text
    )
    readings.append(Reading.take(llm.engine))
    if generation.error is not None:
        raise ValueError(f"prompt {prompt.id}: {generation.error}")
    completion = generation.completions[0]
    return completion, run_between(completion, readings[0], readings[-1])


def run_between(completion: Completion, first: Reading, last: Reading) -> Run:
    begin, end = first.stats, last.stats
    return Run(
        num_tokens=len(completion.token_ids),
        seconds=completion.timing.total_s,
        decode_passes=end.num_steps - begin.num_steps,
        decode_tokens=end.generation_tokens - begin.generation_tokens,
        decode_seconds=last.clock - first.clock,
        draft_seconds=end.draft_seconds - begin.draft_seconds,
        verify_seconds=end.forward_seconds
        - begin.forward_seconds
        + end.sample_seconds
        - begin.sample_seconds,
    )


@contextmanager
def without_drafters(engine: Engine) -> Iterator[None]:
    """Nobody proposes, nobody learns: what passes cost without them, and no answer given away."""
    drafter, engine.drafter = engine.drafter, ComposedDrafter({}, engine.shape.vocab_size)
    try:
        yield
    finally:
        engine.drafter = drafter
