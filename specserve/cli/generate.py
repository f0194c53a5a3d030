"""`specserve generate`: generates completions of prompts and prints them as text or JSON."""

import argparse
import sys
import time

from msgspec.structs import replace

from specserve.cli.flags import given
from specserve.cli.loading import without_gc
from specserve.cli.parser import SPECULATION_PREFIX, settings
from specserve.cli.progress import show_progress
from specserve.cli.prompts import as_chat, as_text, read_prompts
from specserve.cli.results import json_lines, summary
from specserve.completion import Generation
from specserve.llm import LLM
from specserve.types import SamplingParams, SpeculationParams


def run(args: argparse.Namespace) -> int:
    speculation = SpeculationParams(**given(args, SpeculationParams, SPECULATION_PREFIX))
    prompts = read_prompts(args.prompt, args.prompts)
    if args.raw:
        prompts = [as_text(prompt) for prompt in prompts]
    with show_progress() as report, without_gc():
        llm = LLM(config_file=args.config, progress=report, **settings(args))
    sampling = replace(llm.default_sampling_params, **given(args, SamplingParams))
    if args.chat or (not args.raw and llm.tokenizer.has_chat_template):
        prompts = [as_chat(prompt) for prompt in prompts]
    streamed = len(prompts) == 1 and sampling.n == 1 and not args.json
    started = time.perf_counter()
    generations = llm.generate(
        prompts,
        sampling,
        speculation=speculation,
        predictions=[args.prediction] * len(prompts),
        on_text=_print_delta if streamed else None,
    )
    seconds = time.perf_counter() - started
    if streamed and generations[0].error is None:
        print()
    for index, generation in enumerate(generations):
        if args.json:
            print(*json_lines(index, generation), sep="\n")
        elif not streamed:
            _print_text(index, generation)
    failed = [index for index, each in enumerate(generations) if each.error is not None]
    for index in failed:
        where = f"prompt {index}: " if len(generations) > 1 else ""
        print(f"specserve: error: {where}{generations[index].error}", file=sys.stderr)
    completions = [completion for each in generations for completion in each.completions]
    if not args.json and len(failed) < len(generations):
        sys.stdout.flush()
        print(f"[{summary(completions, seconds)}]", file=sys.stderr)
    return 1 if failed else 0


def _print_delta(index: int, delta: str) -> None:
    print(delta, end="", flush=True)


def _print_text(index: int, generation: Generation) -> None:
    several = len(generation.completions) > 1
    for sample, completion in enumerate(generation.completions):
        number = f"{index}.{sample}" if several else f"{index}"
        print(f"--- {number} ({completion.finish_reason})")
        if completion.text:
            print(completion.text)
