"""`specserve generate`: generates completions of prompts and prints them as text or JSON."""

import argparse
import sys
import time

import msgspec

from specserve.cli.flags import given
from specserve.cli.parser import SPECULATION_PREFIX, engine_config
from specserve.cli.progress import show_progress
from specserve.cli.prompts import Messages, as_chat, as_text, read_prompts
from specserve.cli.results import json_lines, summary
from specserve.config import ENGINE_SECTIONS, EngineConfig
from specserve.llm import LLM, Generation
from specserve.types import SamplingParams, SpeculationParams


def run(args: argparse.Namespace) -> int:
    config = engine_config(args)
    sampling = SamplingParams(**given(args, SamplingParams))
    speculation = SpeculationParams(**given(args, SpeculationParams, SPECULATION_PREFIX))
    prompts = read_prompts(args.prompt, args.prompts)
    if args.raw:
        prompts = [as_text(prompt) for prompt in prompts]
    llm = _load(config)
    if args.chat or (not args.raw and llm.tokenizer.has_chat_template):
        prompts = [as_chat(prompt) for prompt in prompts]
    streamed = len(prompts) == 1 and sampling.n == 1 and not args.json
    started = time.perf_counter()
    generations = _generate(llm, prompts, sampling, speculation, args.prediction, streamed)
    seconds = time.perf_counter() - started
    for index, generation in enumerate(generations):
        if args.json:
            print(*json_lines(index, generation), sep="\n")
        elif not streamed:
            _print_text(index, generation)
    failed = _print_errors(generations)
    completions = [completion for each in generations for completion in each.completions]
    if not args.json and len(failed) < len(generations):
        sys.stdout.flush()
        print(f"[{summary(completions, seconds)}]", file=sys.stderr)
    return 1 if failed else 0


def _load(config: EngineConfig) -> LLM:
    settings = {
        name: value
        for section in ENGINE_SECTIONS
        for name, value in msgspec.structs.asdict(getattr(config, section)).items()
    }
    with show_progress() as report:
        return LLM(progress=report, **settings)


def _generate(
    llm: LLM,
    prompts: list[str | Messages],
    sampling: SamplingParams,
    speculation: SpeculationParams,
    prediction: str | None,
    streamed: bool,
) -> list[Generation]:
    predictions = None if prediction is None else [prediction] * len(prompts)
    if not streamed:
        return llm.generate(prompts, sampling, speculation=speculation, predictions=predictions)
    generations = llm.generate(
        prompts,
        sampling,
        speculation=speculation,
        predictions=predictions,
        on_text=lambda _, piece: print(piece, end="", flush=True),
    )
    if generations[0].error is None:
        print()
    return generations


def _print_text(index: int, generation: Generation) -> None:
    several = len(generation.completions) > 1
    for sample, completion in enumerate(generation.completions):
        number = f"{index}.{sample}" if several else f"{index}"
        print(f"--- {number} ({completion.finish_reason})")
        if completion.text:
            print(completion.text)


def _print_errors(generations: list[Generation]) -> list[int]:
    """Print the errors to stderr. Returns the indices of the prompts that failed."""
    failed = [index for index, each in enumerate(generations) if each.error is not None]
    for index in failed:
        where = f"prompt {index}: " if len(generations) > 1 else ""
        print(f"specserve: error: {where}{generations[index].error}", file=sys.stderr)
    return failed
