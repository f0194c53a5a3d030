"""Measures the cost of the server: the same requests over HTTP and to an engine in this process.

python -m specserve_benchmarks.serving --prompts spec_bench.jsonl --concurrency 1 8 32

Both sides are closed loops: when one of `concurrency` requests is answered, the next one is sent.
They take turns, with the same prompts and seeds, and must give the same token ids. The HTTP client
runs on the same machine, so its cost counts as cost of the server.
"""

import argparse
import asyncio
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Final

import aiohttp
import msgspec
from msgspec import Struct

from specserve.cli.parser import PROMPTS_HELP
from specserve.cli.progress import show_progress
from specserve.llm import LLM
from specserve.types import Request, SamplingParams
from specserve_benchmarks.flags import add_repeats, add_results
from specserve_benchmarks.offline import demo_prompts, device_name
from specserve_benchmarks.serving_report import Report, Sample, markdown, show, summarise
from specserve_evals import provenance
from specserve_evals.progress import stdout_console, track
from specserve_evals.prompts import load_prompts, select
from specserve_evals.runs import (
    PLAIN,
    add_run_flags,
    at_least_one,
    check_options,
    fits,
    open_llm,
    parse_variants,
)
from specserve_evals.served import serve

_MIN_REQUESTS: Final = 8  # least number of requests per side, concurrency and repeat


class Work(Struct, frozen=True):
    """One request, the same for both sides."""

    prompt_ids: tuple[int, ...]
    seed: int
    max_tokens: int
    temperature: float


class Answer(Struct):
    """The token ids of an answer, and the seconds from sending the request to the first of them."""

    ids: tuple[int, ...] = ()
    ttft_s: float = 0.0


def run_offline(llm: LLM, works: Sequence[Work], concurrency: int) -> list[Answer]:
    """Run `works` on the engine of this process, `concurrency` requests at a time."""
    waiting = deque(enumerate(works))
    answers = [Answer() for _ in works]
    started: dict[str, float] = {}
    engine = llm.engine

    def submit() -> None:
        if waiting:
            index, work = waiting.popleft()
            sampling = SamplingParams(
                temperature=work.temperature, max_tokens=work.max_tokens, seed=work.seed
            )
            started[str(index)] = time.perf_counter()
            engine.submit(Request(str(index), work.prompt_ids, sampling))

    for _ in range(concurrency):
        submit()
    while engine.has_work:
        for output in engine.step():
            answer = answers[int(output.id)]
            if output.ids and not answer.ids:
                answer.ttft_s = time.perf_counter() - started[output.id]
            answer.ids += output.ids
            if output.finish is not None:
                submit()
    return answers


async def run_served(url: str, works: Sequence[Work], concurrency: int) -> list[Answer]:
    """Run `works` as streams over HTTP, `concurrency` at a time."""
    waiting = deque(enumerate(works))
    answers = [Answer() for _ in works]
    connector = aiohttp.TCPConnector(limit=concurrency)
    async with aiohttp.ClientSession(url, connector=connector) as session:

        async def worker() -> None:
            while waiting:
                index, work = waiting.popleft()
                answers[index] = await _stream(session, work)

        await asyncio.gather(*(worker() for _ in range(concurrency)))
    return answers


class _Choice(Struct):
    token_ids: tuple[int, ...] = ()


class _Chunk(Struct):
    choices: tuple[_Choice, ...]


async def _stream(session: aiohttp.ClientSession, work: Work) -> Answer:
    body = {
        "prompt": work.prompt_ids,
        "seed": work.seed,
        "max_tokens": work.max_tokens,
        "temperature": work.temperature,
        "top_p": 1.0,  # some models have another default
        "stream": True,
        "return_token_ids": True,
    }
    answer = Answer()
    started = time.perf_counter()
    timeout = aiohttp.ClientTimeout(total=None)
    async with session.post("/v1/completions", json=body, timeout=timeout) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            if not answer.ids:
                answer.ttft_s = time.perf_counter() - started
            for choice in msgspec.json.decode(line[6:], type=_Chunk).choices:
                answer.ids += choice.token_ids
    return answer


def measure(
    llm: LLM, url: str, works: Sequence[Work], args: argparse.Namespace
) -> Iterator[Sample]:
    """Run both sides in turn at every concurrency, and all of that `repeats` times."""
    total = 2 * args.repeats * len(args.concurrency)
    with track(total) as advance:
        for repeat in range(args.repeats):
            for concurrency in args.concurrency:
                share = list(islice(cycle(works), max(_MIN_REQUESTS, args.rounds * concurrency)))
                for side in ("offline", "served"):
                    started = time.perf_counter()
                    if side == "offline":
                        answers = run_offline(llm, share, concurrency)
                    else:
                        answers = asyncio.run(run_served(url, share, concurrency))
                    seconds = time.perf_counter() - started
                    yield Sample(
                        concurrency=concurrency,
                        side=side,
                        repeat=repeat,
                        seconds=seconds,
                        ids=tuple(answer.ids for answer in answers),
                        ttft_s=tuple(answer.ttft_s for answer in answers),
                    )
                    advance(1, f"concurrency {concurrency}, {side}, repeat {repeat + 1}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 measured and written; 1 the same, but token ids differ; 2 wrong usage."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(arguments)
    try:
        return run(args, arguments)
    except ValueError as error:
        print(f"serving: error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    console = stdout_console()
    args.batch = args.concurrency
    variants = parse_variants(args.draft) or [PLAIN]
    if len(variants) > 1:
        raise ValueError("draft: one server is measured; give --draft once, or NAME,NAME to merge")
    prompts = demo_prompts() if args.prompts is None else load_prompts(args.prompts)
    with show_progress() as progress:
        check_options(args, variants)
        llm = open_llm(args, variants[0], progress, prefix_caching=False, kv_memory=args.kv_memory)
    chosen = select(
        prompts, limit=args.limit, fits=lambda prompt: fits(llm, prompt, args.max_tokens)
    )
    console.print(chosen.describe())
    works = [
        Work(llm.encode(prompt.messages), args.seed + index, args.max_tokens, args.temperature)
        for index, prompt in enumerate(chosen.prompts)
    ]
    origin = provenance.collect(
        "specserve_benchmarks.serving", arguments, llm.engine.platform, args.prompts
    )
    with serve(args.target, server_flags(llm)) as served:
        run_offline(llm, works[:1], 1)
        asyncio.run(run_served(served.url, works[:1], 1))
        samples = list(measure(llm, served.url, works, args))
    report = Report(origin, summarise(samples))
    show(report, console)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"{origin.date[:10]}-{device_name(origin)}-serving"
    encoded = msgspec.json.format(msgspec.json.encode(report), indent=2)
    stem.with_suffix(".json").write_bytes(encoded)
    stem.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    console.print(f"written: {stem}.json and {stem}.md")
    return 0 if all(row.same_ids for row in report.rows) else 1


def server_flags(llm: LLM) -> list[str]:
    """The settings of the engine in this process, as flags for the server."""
    config = llm.config
    flags = [
        *("--kv-memory", str(config.cache.kv_memory)),
        *("--block-size", str(config.cache.block_size)),
        "--no-prefix-caching",
        *("--max-num-seqs", str(config.schedule.max_num_seqs)),
        *("--max-num-batched-tokens", str(config.schedule.max_num_batched_tokens)),
        *("--max-nodes", str(config.draft.max_nodes)),
        *("--dtype", config.target.dtype),
        *("--device", config.target.device),
        *("--exactness", config.target.exactness),
        *("--status-interval", "0"),
    ]
    for draft in config.draft.draft:
        flags += ["--draft", draft]
    for name in ("threads", "max_model_len"):
        if (value := getattr(config.target, name)) is not None:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m specserve_benchmarks.serving",
        description="Measure the speed and latency of the server relative to the engine alone.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help=f"{PROMPTS_HELP}; not given: those of the demo",
    )
    parser.add_argument(
        "--concurrency",
        nargs="+",
        type=at_least_one,
        default=[1, 8, 32],
        metavar="N",
        help="requests at a time; every number is measured (default: 1 8 32)",
    )
    parser.add_argument(
        "--rounds",
        type=at_least_one,
        default=2,
        metavar="N",
        help=f"requests per unit of concurrency, at least {_MIN_REQUESTS} in total "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--kv-memory",
        default="1GiB",
        metavar="SIZE",
        help="KV memory of each side (default: %(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=at_least_one,
        default=64,
        metavar="N",
        help="number of prompts, spread over all categories (default: %(default)s)",
    )
    add_repeats(parser, 3)
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="0 is greedy (default: %(default)s)",
    )
    add_results(parser)
    add_run_flags(parser, max_tokens=64)
    return parser


if __name__ == "__main__":
    sys.exit(main())
