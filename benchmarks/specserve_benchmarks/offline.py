"""Measures tokens/s, TTFT, TPOT and acceptance of offline generation, by batch and category.

python -m specserve_benchmarks.offline --prompts spec_bench.jsonl --draft none --draft ngram

Every engine is loaded once and the runs take turns, so that a change of the machine's speed affects
all of them. Prefix caching is off, so that a repeated prompt costs as much as the first time.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

import msgspec
from msgspec import Struct

from specserve.cli.parser import PROMPTS_HELP
from specserve.cli.progress import show_progress
from specserve.llm import LLM
from specserve.types import SamplingParams
from specserve_benchmarks.demo import PROMPTS
from specserve_benchmarks.flags import add_repeats, add_results
from specserve_benchmarks.offline_report import Report, Sample, markdown, show, summarise
from specserve_evals import provenance
from specserve_evals.progress import Advance, stdout_console, track
from specserve_evals.prompts import Prompt, load_prompts, select
from specserve_evals.runs import (
    PLAIN,
    add_run_flags,
    at_least_one,
    check_options,
    fits,
    generate_in_batches,
    open_llm,
    parse_variants,
)


class Cell(Struct, frozen=True):
    """The requests of one category, run `batch` at a time."""

    category: str
    batch: int
    prompts: tuple[Prompt, ...]


def plan(prompts: Sequence[Prompt], batches: Sequence[int], per_category: int) -> list[Cell]:
    """One cell per category and batch size: whole batches with at least `per_category` requests.

    A category with too few prompts repeats them from the first on.
    """
    by_category: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    return [
        Cell(category, batch, tuple(islice(cycle(own), -(-per_category // batch) * batch)))
        for category, own in by_category.items()
        for batch in batches
    ]


def measure(
    llms: dict[str, LLM], cells: Sequence[Cell], args: argparse.Namespace
) -> Iterator[Sample]:
    """Run every cell with every draft in turn, and all of that `repeats` times."""
    total = sum(len(cell.prompts) for cell in cells) * len(llms) * args.repeats
    with track(total) as advance:
        for repeat in range(args.repeats):
            for cell in cells:
                for draft, llm in llms.items():
                    yield _measure_cell(llm, cell, draft, repeat, args, advance)


def _measure_cell(
    llm: LLM, cell: Cell, draft: str, repeat: int, args: argparse.Namespace, advance: Advance
) -> Sample:
    sampling = [
        SamplingParams(
            temperature=args.temperature, max_tokens=args.max_tokens, seed=args.seed + index
        )
        for index in range(len(cell.prompts))
    ]
    label = f"{cell.category}, batch {cell.batch}, {draft}, repeat {repeat + 1}"
    completions, seconds = generate_in_batches(
        llm, cell.prompts, sampling, cell.batch, advance, label
    )
    return Sample(
        category=cell.category,
        batch=cell.batch,
        draft=draft,
        repeat=repeat,
        seconds=seconds,
        ids=tuple(completion.token_ids for completion in completions),
        ttft_s=tuple(c.timing.ttft_s for c in completions if c.timing.ttft_s is not None),
        tpot_s=tuple(c.timing.tpot_s for c in completions if c.timing.tpot_s is not None),
        num_passes=sum(c.stats.num_spec_steps for c in completions),
        num_drafted=sum(c.stats.num_draft_tokens for c in completions),
        num_accepted=sum(c.stats.num_accepted_draft_tokens for c in completions),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 measured and written; 2 wrong usage."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(arguments)
    try:
        run(args, arguments)
    except ValueError as error:
        print(f"offline: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace, arguments: Sequence[str]) -> None:
    console = stdout_console()
    prompts = demo_prompts() if args.prompts is None else load_prompts(args.prompts)
    compared = [PLAIN, *parse_variants(args.draft)]
    check_options(args, compared)
    with show_progress() as progress:
        llms = {
            variant.name: open_llm(args, variant, progress, prefix_caching=False)
            for variant in compared
        }
    plain = llms[PLAIN.name]
    per_category = max(args.per_category, *args.batch)
    chosen = select(
        prompts, per_category=per_category, fits=lambda p: fits(plain, p, args.max_tokens)
    )
    console.print(chosen.describe())
    origin = provenance.collect(
        "specserve_benchmarks.offline", arguments, plain.engine.platform, args.prompts
    )
    for llm in llms.values():
        warm_up(llm, chosen.prompts, args.batch)
    samples = list(measure(llms, plan(chosen.prompts, args.batch, args.per_category), args))
    report = Report(origin, summarise(samples))
    show(report, console)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"{origin.date[:10]}-{device_name(origin)}-offline"
    stem.with_suffix(".json").write_bytes(
        msgspec.json.format(msgspec.json.encode(report), indent=2)
    )
    stem.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    console.print(f"written: {stem}.json and {stem}.md")


def warm_up(llm: LLM, prompts: Sequence[Prompt], batches: Sequence[int]) -> None:
    """Generate a few tokens at every batch size."""
    params = SamplingParams(temperature=0.0, max_tokens=4)
    for batch in batches:
        llm.generate([prompt.messages for prompt in islice(cycle(prompts), batch)], params)


def demo_prompts() -> list[Prompt]:
    return [
        Prompt(name, name, [{"role": "user", "content": text}]) for name, text in PROMPTS.items()
    ]


def device_name(origin: provenance.Provenance) -> str:
    """'cpu', or the GPU's name in a form for file names."""
    return "-".join(origin.gpu.lower().split()) if origin.gpu else "cpu"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m specserve_benchmarks.offline",
        description="Measure offline generation with and without speculation.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help=f"{PROMPTS_HELP}; not given: those of the demo",
    )
    parser.add_argument(
        "--per-category",
        type=at_least_one,
        default=1,
        metavar="N",
        help="requests of each category at least; always whole batches (default: %(default)s)",
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
    add_run_flags(parser, max_tokens=128)
    return parser


if __name__ == "__main__":
    sys.exit(main())
