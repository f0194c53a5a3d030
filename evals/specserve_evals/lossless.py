"""Checks that speculation changes no token id, for every draft and batch size.

specserve eval lossless --prompts spec_bench.jsonl --draft ngram

The reference is plain decoding (`none`) at batch 1. Exit code 1 on any difference, or if the target
does not accept the tokens that it drafts for itself (--self-draft).
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace
from rich.console import Console

from specserve.cli.parser import PROMPTS_HELP
from specserve.cli.progress import show_progress
from specserve.llm import LLM
from specserve.types import SamplingParams
from specserve_evals import provenance
from specserve_evals.audit import Audit
from specserve_evals.identity import Comparison, compare, sampling_settings
from specserve_evals.progress import Advance, plain_table, stdout_console, track
from specserve_evals.prompts import Prompt, load_prompts, select
from specserve_evals.runs import (
    PLAIN,
    SELF,
    Variant,
    add_run_flags,
    at_least_one,
    check_options,
    fits,
    generate_in_batches,
    open_llm,
    parse_variants,
    self_draft,
)

SETTINGS: Final = ("greedy", "temp-1", "nucleus", "penalties")
DEFAULT_SETTINGS: Final = ("greedy", "nucleus", "penalties")
SELF_ACCEPTANCE: Final = 0.999  # least fraction of its own drafted tokens that a target must accept
MAX_LISTED: Final = 20  # mismatches printed; the JSON file has all of them


class Report(Struct, frozen=True):
    provenance: provenance.Provenance
    prompts: tuple[str, ...]
    passed_over: tuple[str, ...]
    num_compared_tokens: int
    num_mismatches: int
    comparisons: tuple[Comparison, ...]


class Examination:
    """Runs the variants one after another; the first run, `none` at batch 1, is the reference."""

    def __init__(self, args: argparse.Namespace, variants: Sequence[Variant]) -> None:
        self._args = args
        self._variants = variants
        self._reference: dict[str, list[tuple[int, ...]]] = {}  # setting -> ids per prompt
        self.comparisons: list[Comparison] = []

    def run(self, llm: LLM, prompts: Sequence[Prompt]) -> None:
        """Run all variants. `llm` is an engine for `none`; each other variant gets a new engine."""
        args = self._args
        plain_batches = list(dict.fromkeys([1, *args.batch]))
        runs = len(plain_batches) + len(self._variants) * len(args.batch)
        with track(runs * len(args.settings) * len(prompts)) as advance:
            self._run_variant(llm, PLAIN, plain_batches, prompts, advance)
            for variant in self._variants:
                del llm  # frees the previous engine before the next one is loaded
                gc.collect()
                llm = open_llm(args, variant, lambda stage, _: advance(0, stage))
                self._run_variant(llm, variant, args.batch, prompts, advance)

    def _run_variant(
        self,
        llm: LLM,
        variant: Variant,
        batches: Sequence[int],
        prompts: Sequence[Prompt],
        advance: Advance,
    ) -> None:
        audit = Audit()
        llm.engine.observe((), audit.observe)
        settings = sampling_settings(llm.tokenizer, self._args.max_tokens)
        for setting in self._args.settings:
            sampling = seeded(settings[setting], self._args.seed, len(prompts))
            for batch in batches:
                cell = (variant.name, setting, batch)
                is_reference = setting not in self._reference
                completions, seconds = generate_in_batches(
                    llm, prompts, sampling, batch, advance, f"{variant.name}, {setting}, {batch}"
                )
                ids = [completion.token_ids for completion in completions]
                expected = self._reference.setdefault(setting, ids)
                row = compare(cell, prompts, expected, completions, seconds, audit.take())
                self.comparisons.append(replace(row, is_reference=is_reference))
        failed = [name for name, count in llm.engine.drafter.num_failures.items() if count]
        if failed:
            raise ValueError(f"draft: {failed} failed; see the log")


def seeded(params: SamplingParams, seed: int, count: int) -> list[SamplingParams]:
    """`count` copies of `params` with the seeds `seed`, `seed` + 1, and so on."""
    return [replace(params, seed=seed + index) for index in range(count)]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 no token differs; 1 the check failed (see the module); 2 wrong usage."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(arguments)
    try:
        return run(args, arguments)
    except ValueError as error:
        print(f"specserve eval lossless: error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    console = stdout_console()
    prompts = load_prompts(args.prompts)
    variants = parse_variants(args.draft) if args.draft or not args.self_draft else []
    if args.self_draft:
        variants.append(self_draft(args.target))
    check_options(args, variants)
    with show_progress() as report:
        llm = open_llm(args, PLAIN, report)
    chosen = select(prompts, limit=args.limit, fits=lambda p: fits(llm, p, args.max_tokens))
    console.print(chosen.describe())
    origin = provenance.collect(
        "specserve_evals.lossless", arguments, llm.engine.platform, args.prompts
    )
    examination = Examination(args, variants)
    examination.run(llm, chosen.prompts)
    found = Report(
        provenance=origin,
        prompts=tuple(prompt.id for prompt in chosen.prompts),
        passed_over=tuple(prompt.id for prompt in chosen.passed_over),
        num_compared_tokens=sum(
            row.num_tokens for row in examination.comparisons if not row.is_reference
        ),
        num_mismatches=sum(len(row.mismatches) for row in examination.comparisons),
        comparisons=tuple(examination.comparisons),
    )
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2))
    return show(found, console)


def show(report: Report, console: Console) -> int:
    """Print the table and the result; returns the exit code."""
    table = plain_table(
        *("draft", "sampling", "batch", "rows", "tokens", "mismatches"),
        *("per pass", "accepted", "tokens/s"),
    )
    for row in report.comparisons:
        table.add_row(
            row.draft,
            row.setting,
            str(row.batch),
            str(row.num_prompts),
            str(row.num_tokens),
            "reference" if row.is_reference else str(len(row.mismatches)),
            f"{row.tokens_per_pass:.2f}",
            "-" if row.acceptance is None else f"{row.acceptance:.2%}",
            f"{row.tokens_per_s:.1f}",
        )
    console.print(table)
    differing = [(row, mismatch) for row in report.comparisons for mismatch in row.mismatches]
    for row, mismatch in differing[:MAX_LISTED]:
        console.print(
            f"{row.draft}, {row.setting}, batch {row.batch}: prompt {mismatch.prompt} differs at "
            f"output position {mismatch.position}: {mismatch.found} instead of {mismatch.expected}"
        )
    weak = [
        row
        for row in report.comparisons
        if row.draft == SELF and (row.acceptance or 0.0) < SELF_ACCEPTANCE
    ]
    for row in weak:
        console.print(
            f"self-draft, {row.setting}, batch {row.batch}: {row.acceptance or 0.0:.3%} accepted; "
            f"expected at least {SELF_ACCEPTANCE:.1%}"
        )
    console.print(
        f"{report.num_mismatches} mismatches; {report.num_compared_tokens} tokens compared"
    )
    return 1 if differing or weak else 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specserve eval lossless",
        description="Compare generated token ids with and without speculation, id by id.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE.jsonl", help=PROMPTS_HELP
    )
    parser.add_argument(
        "--limit",
        type=at_least_one,
        default=24,
        metavar="N",
        help="number of prompts, spread over all categories (default: %(default)s)",
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=SETTINGS,
        default=DEFAULT_SETTINGS,
        metavar="NAME",
        help=f"sampling settings: {', '.join(SETTINGS)} (default: {' '.join(DEFAULT_SETTINGS)})",
    )
    parser.add_argument(
        "--self-draft",
        action="store_true",
        help="also use the target as its own drafter, whose drafts it must accept",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result here")
    add_run_flags(parser, max_tokens=64)
    return parser


if __name__ == "__main__":
    sys.exit(main())
