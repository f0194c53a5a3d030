"""Measures tokens per forward pass for every draft at every temperature and tree budget.

specserve eval acceptance --prompts spec_bench.jsonl --per-category 10 --draft ngram --out DIR

By default every drafted node is verified (--no-cost-aware), so that tokens per forward pass depend
on the draft and the budget and not on the machine. All cells (draft, temperature, budget) have the
same prompts, in the same order and with the same seeds, but share no state. An interrupted run
resumes at its first unfinished cell.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec.structs import replace
from rich.console import Console

from specserve.cli.flags import given
from specserve.cli.main import INTERRUPTED
from specserve.cli.parser import PROMPTS_HELP
from specserve.cli.progress import show_progress
from specserve.config import DraftConfig
from specserve.hub import resolve
from specserve.speculation.registry import create_drafter, expanded
from specserve.tree import MAX_NODES
from specserve.types import RequestError, SamplingParams
from specserve_evals import provenance
from specserve_evals.acceptance_cell import Cell, measure
from specserve_evals.acceptance_figures import Report
from specserve_evals.acceptance_report import markdown, show
from specserve_evals.progress import stdout_console, track
from specserve_evals.prompts import Prompt, Selection, load_prompts, select
from specserve_evals.provenance import checkpoint_label
from specserve_evals.runs import (
    PLAIN,
    Variant,
    add_run_flags,
    at_least_one,
    check_options,
    fits,
    open_llm,
    parse_variants,
)

JSON: Final = "acceptance.json"
MARKDOWN: Final = "acceptance.md"
# Arguments that may differ between runs of one report; the prompts are compared by their hash.
NOT_COMPARED: Final = frozenset({"out", "plots", "prompts", "variants"})


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 measured and written; 1 a draft changed an answer of exact kernels; 2 wrong
    usage; `INTERRUPTED` after Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(arguments)
    try:
        return run(args, arguments)
    except ValueError as error:
        print(f"specserve eval acceptance: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "specserve eval acceptance: interrupted; the same command resumes the run",
            file=sys.stderr,
        )
        return INTERRUPTED


def run(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    console = stdout_console()
    if args.plots and find_spec("matplotlib") is None:
        raise ValueError(
            "plots: matplotlib is not installed; pip install 'specserve[evals]', or give --no-plots"
        )
    variants = parse_variants(args.draft)
    if not variants:
        raise ValueError("draft: 'none' is measured beside every draft; give one of those")
    chosen, origin = prepare(args, arguments)
    check_drafters(args, variants)
    console.print(chosen.describe())
    report = Report(
        provenance=origin,
        settings=settings(args, variants),
        prompts=tuple(prompt.id for prompt in chosen.prompts),
        passed_over=tuple(prompt.id for prompt in chosen.passed_over),
    )
    report = resume(args.out, report)
    report = finish(args, variants, chosen.prompts, report, origin.revision)
    show(report, console)
    written = [args.out / JSON, args.out / MARKDOWN]
    written[1].write_text(markdown(report), encoding="utf-8")
    if args.plots:
        from specserve_evals.acceptance_plots import draw  # matplotlib is an extra

        written += draw(report, args.out)
    console.print(f"written: {', '.join(map(str, written))}")
    return report_changed_ids(report, console)


def prepare(
    args: argparse.Namespace, arguments: Sequence[str]
) -> tuple[Selection, provenance.Provenance]:
    """Select the prompts that fit, and collect the provenance, with an engine without a draft."""
    prompts = load_prompts(args.prompts)
    with show_progress() as progress:
        llm = open_llm(args, PLAIN, progress)
    chosen = select(
        prompts,
        limit=args.limit,
        per_category=args.per_category,
        fits=lambda prompt: fits(llm, prompt, args.max_tokens),
    )
    platform = llm.engine.platform
    return chosen, provenance.collect(
        "specserve_evals.acceptance", arguments, platform, args.prompts
    )


def check_drafters(args: argparse.Namespace, variants: Sequence[Variant]) -> None:
    """Check that every draft exists and fits the target, before the long run starts.

    Raises DraftError if one does not, ValueError for an option that would share state among cells.
    """
    options = given(args, DraftConfig).get("options", {})
    for name, chosen in options.items():
        if "file" in chosen:
            raise ValueError(
                f"options: {name}.file would carry answers from one cell to the next; "
                "give the directory of a draft as --draft instead"
            )
    check_options(args, variants)
    target = resolve(args.target)
    for spec in dict.fromkeys(
        spec for variant in variants for spec in expanded(variant.draft, target)
    ):
        create_drafter(spec, options, target, resolve)


def finish(
    args: argparse.Namespace,
    variants: Sequence[Variant],
    prompts: Sequence[Prompt],
    report: Report,
    revision: str | None,
) -> Report:
    """Measure the cells that `report` lacks, and write the report after each of them."""
    temperatures, budgets = dict.fromkeys(args.temperature), dict.fromkeys(args.budget)
    cells = [Cell(*each) for each in product(variants, temperatures, budgets)]
    done = {result.key: result for result in report.cells}
    missing = [cell for cell in cells if cell.key not in done]
    with track(len(missing) * len(prompts)) as advance:
        for cell in missing:
            result = measure(args, cell, prompts, advance)
            done[cell.key] = replace(result, revision=revision)
            report = replace(report, cells=tuple(done[c.key] for c in cells if c.key in done))
            write(args.out / JSON, report)
    return report


def resume(folder: Path, fresh: Report) -> Report:
    """The report in `folder`, or `fresh` if there is none.

    Raises ValueError if the report has another format or `identity`, or `folder` cannot be used.
    """
    file = folder / JSON
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = msgspec.json.decode(file.read_bytes(), type=Report)
    except FileNotFoundError:
        return fresh
    except OSError as error:
        raise ValueError(f"out: {folder} cannot be used: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ValueError(f"out: {file} is of another version; choose another directory") from error
    there, here = identity(found), identity(fresh)
    differences = [
        f"{name} {there.get(name)} instead of {here.get(name)}"
        for name in there | here
        if there.get(name) != here.get(name)
    ]
    if differences:
        raise ValueError(
            f"out: {folder} holds a run with {'; '.join(differences)}; "
            "repeat its command, or choose another directory"
        )
    return found


def settings(args: argparse.Namespace, variants: Sequence[Variant]) -> dict[str, Any]:
    """The arguments that the figures depend on, with paths of models and drafts cut to names.

    They go through JSON once, so that they compare equal with those of a report read from disk.
    """
    kept = {name: value for name, value in vars(args).items() if name not in NOT_COMPARED}
    kept["target"] = Path(args.target).name
    kept["draft"] = [variant.name for variant in variants]
    folders = [Path(part) for variant in variants for part in variant.draft if Path(part).is_dir()]
    if folders:  # the same directory may hold a draft that was trained again
        kept["checkpoints"] = {folder.name: checkpoint_label(folder) for folder in folders}
    decoded: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(kept))
    return decoded


def identity(report: Report) -> dict[str, Any]:
    """The properties that must be equal for two runs to be merged into one report."""
    origin = report.provenance
    assert origin.data is not None
    return report.settings | {
        "prompts": origin.data.label,
        "processor": origin.processor,
        "gpu": origin.gpu,
        "engine": origin.engine,
    }


def write(file: Path, report: Report) -> None:
    """Write the report atomically: to a temporary file that is then renamed."""
    part = file.with_suffix(".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
    os.replace(part, file)


def report_changed_ids(report: Report, console: Console) -> int:
    """The exit code: 1 if a draft changed an answer although the kernels are exact, else 0."""
    differing = sum(not outcome.same_ids for cell in report.cells for outcome in cell.outcomes)
    if differing:
        console.print(f"{differing} answers differ from those of plain decoding")
    return int(differing > 0 and report.provenance.engine["exactness"] == "exact")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specserve eval acceptance",
        description="Tokens per forward pass of the target, accepted tokens by depth and by "
        "drafter, the time of each part of a step, and the speedup over plain decoding. For every "
        "draft at every temperature and budget; one request at a time.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE.jsonl", help=PROMPTS_HELP
    )
    number = parser.add_mutually_exclusive_group()
    number.add_argument(
        "--limit",
        type=at_least_one,
        metavar="N",
        help="number of prompts, spread over all categories; not given: all",
    )
    number.add_argument(
        "--per-category", type=at_least_one, metavar="N", help="number of prompts of each category"
    )
    parser.add_argument(
        "--temperature",
        nargs="+",
        type=temperature,
        default=[0.0],
        metavar="X",
        help="0 is greedy (default: 0)",
    )
    parser.add_argument(
        "--budget",
        nargs="+",
        type=budget,
        default=[DraftConfig().max_nodes],
        metavar="N",
        help=f"tree nodes of a sequence, the root included: 2 to {MAX_NODES} (default: 8)",
    )
    parser.add_argument(
        "--cost-aware",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="leave out drafters and drafted nodes that cost more time than they save "
        "(default: no)",
    )
    parser.add_argument(
        "--plots",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw PNG files too (default: yes)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="for acceptance.json, acceptance.md and plots; a run in it is resumed",
    )
    add_run_flags(parser, max_tokens=128, skip=frozenset({"batch", "max_nodes", "cost_aware"}))
    parser.set_defaults(batch=[1])
    return parser


def temperature(text: str) -> float:
    try:
        SamplingParams(temperature=float(text)).validate(vocab_size=1)
    except RequestError as error:
        raise argparse.ArgumentTypeError(error.message) from error
    return float(text)


def budget(text: str) -> int:
    if not 2 <= (number := int(text)) <= MAX_NODES:
        raise argparse.ArgumentTypeError(f"{number} is out of range; expected 2 to {MAX_NODES}")
    return number


if __name__ == "__main__":
    sys.exit(main())
