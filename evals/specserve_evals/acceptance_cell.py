"""Measures one cell of an acceptance run: one draft at one temperature and tree budget.

Requests run one at a time, without prefix caching, on an engine that only this cell uses, so that a
drafter that learns online sees every prompt once. The same engine also answers each prompt without
its drafters, as the reference.
"""

import argparse
import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from msgspec import Struct

from specserve.completion import Completion
from specserve.engine.engine import Engine
from specserve.engine.metrics import EngineStats
from specserve.engine.warm_up import warm_up
from specserve.llm import LLM
from specserve.speculation.compose import ComposedDrafter
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
    """The clock (`time.perf_counter`) and the engine's statistics at one moment."""

    clock: float
    stats: EngineStats

    @classmethod
    def take(cls, engine: Engine) -> "Reading":
        return cls(time.perf_counter(), engine.stats())


def measure(
    args: argparse.Namespace, cell: Cell, prompts: Sequence[Prompt], advance: Advance
) -> CellResult:
    """Measure one cell on a new engine. Raises ValueError if a request or a drafter fails."""
    gc.collect()  # frees the previous engine before the next one is loaded
    llm = open_llm(
        args,
        cell.variant,
        lambda stage, _: advance(0, stage),
        max_nodes=cell.budget,
        prefix_caching=False,
    )
    warm_up(llm.engine.parts)
    llm.engine = Engine(llm.engine.parts)
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
    """Answer `prompt` with the draft and without it, in the order that `plain_first` gives.

    The caller alternates the order, because the first answer warms the machine up for the second.
    """
    if plain_first:
        plain, plain_run = answer_plainly(llm, prompt, params)
        drafted, run = answer(llm, prompt, params, SpeculationParams())
    else:
        drafted, run = answer(llm, prompt, params, SpeculationParams())
        plain, plain_run = answer_plainly(llm, prompt, params)
    ids = range(1, 1 + len(llm.engine.drafter.names))
    return Outcome(
        prompt=prompt.id,
        category=prompt.category,
        stats=drafted.stats,
        accepted_by_drafter=tuple(map(drafted.drafter_ids.count, ids)),
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
    """Returns the completion and its `Run`. Raises ValueError, naming the prompt, if it fails."""
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
    """The `Run` of a completion; `first` is taken at its first text delta, `last` at its end."""
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
    """Remove the drafters from the engine inside the `with` block.

    Steps then have the cost of plain decoding, and no drafter observes the answer, so that none can
    learn it before it is measured on the same prompt.
    """
    drafter = engine.drafter
    engine.drafter = ComposedDrafter({}, engine.shape.vocab_size, engine.controller)
    try:
        yield
    finally:
        engine.drafter = drafter
