"""Times a forward pass of the target by its number of rows (batched tokens), per weight format.

python -m specserve_benchmarks.passes --format auto --format int8 --contexts 200 1000

One sequence with a single-path tree after its context; logits and the best token of every row are
computed, as in greedy verification. The cases take turns. Times are also given relative to the
first number of rows of the same format and context.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Final, get_args

import msgspec
import torch
from msgspec import Struct

from specserve.batch import ForwardBatch, build_batch, tree_segment
from specserve.cache.storage import KVStorage
from specserve.cache.table import BlockTable
from specserve.cli.flags import add_flags, given
from specserve.cli.parser import OPTIONAL_TARGET_HELP
from specserve.cli.progress import show_progress
from specserve.config import TargetConfig, load_config
from specserve.engine.device import choose_platform
from specserve.field_help import ENGINE_HELP
from specserve.hub import resolve
from specserve.models.loader import load_model
from specserve.models.model import Model
from specserve.tree import chain_tree
from specserve.types import Quantization
from specserve_benchmarks.bandwidth import read_bandwidth
from specserve_benchmarks.flags import RESULTS, add_repeats, add_sizes
from specserve_evals import provenance
from specserve_evals.progress import stdout_console, track

ROWS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
BLOCK_SIZE: Final = 32  # slots per KV block


class Cell(Struct, frozen=True):
    quantization: str
    context: int
    num_rows: int
    seconds: tuple[float, ...]  # one per repeat

    @property
    def median_ms(self) -> float:
        return median(self.seconds) * 1e3


class Report(Struct, frozen=True):
    provenance: provenance.Provenance
    bytes_per_s: float  # memory bandwidth, see `read_bandwidth`
    weight_bytes: dict[str, int]  # by format
    cells: list[Cell]


def measure(models: dict[str, Model], args: argparse.Namespace) -> list[Cell]:
    """Time every case once per repeat, in turn, after one round as warm-up."""
    cases = list(_cases(models, args))
    seconds: list[list[float]] = [[] for _ in cases]
    with track((args.repeats + 1) * len(cases)) as advance, torch.inference_mode():
        for repeat in range(args.repeats + 1):
            for (name, _, _, batch, kv), taken in zip(cases, seconds, strict=True):
                started = time.perf_counter()
                models[name](batch, kv, num_top=1)
                if repeat:
                    taken.append(time.perf_counter() - started)
                advance(1, name)
    return [
        Cell(name, context, num_rows, tuple(taken))
        for (name, context, num_rows, _, _), taken in zip(cases, seconds, strict=True)
    ]


def _cases(
    models: dict[str, Model], args: argparse.Namespace
) -> Iterator[tuple[str, int, int, ForwardBatch, KVStorage]]:
    num_blocks = -(-(max(args.contexts) + max(args.rows)) // BLOCK_SIZE)
    table = BlockTable(BLOCK_SIZE, list(range(num_blocks)))
    for name, model in models.items():
        device = torch.device("cpu")
        kv = KVStorage(model.kv_spec, num_blocks * BLOCK_SIZE, device)
        kv.data.normal_()
        for context in args.contexts:
            for num_rows in args.rows:
                drafted = list(range(1, num_rows))
                segment = tree_segment(
                    table, context, chain_tree(0, drafted, [1.0] * len(drafted), 1)
                )
                yield (
                    name,
                    context,
                    num_rows,
                    build_batch([segment], BLOCK_SIZE, model.row_multiple, device),
                    kv,
                )


def markdown(report: Report) -> str:
    """One table per context: a line for each number of rows, a column for each format."""
    names = list(report.weight_bytes)
    lines = ["# Time of a forward pass by its number of rows", ""]
    for context in dict.fromkeys(cell.context for cell in report.cells):
        cells = {
            (cell.quantization, cell.num_rows): cell.median_ms
            for cell in report.cells
            if cell.context == context
        }
        rows = list(dict.fromkeys(num_rows for _, num_rows in cells))
        lines += [
            f"## Context of {context} tokens: milliseconds (relative to {rows[0]} rows)",
            "",
            "| rows | " + " | ".join(names) + " |",
            "|---" * (len(names) + 1) + "|",
        ]
        for num_rows in rows:
            entries = [
                f"{cells[name, num_rows]:.2f} ({cells[name, num_rows] / cells[name, rows[0]]:.2f})"
                for name in names
            ]
            lines.append(f"| {num_rows} | " + " | ".join(entries) + " |")
        lines.append("")
    lines += [
        f"Memory bandwidth: {report.bytes_per_s / 1e9:.1f} GB/s. Bytes of the weights, and the "
        "time to read them: "
        + ", ".join(
            f"{name} {size / 1e6:.1f} MB, {size / report.bytes_per_s * 1e3:.2f} ms"
            for name, size in report.weight_bytes.items()
        )
        + ".",
        "",
    ]
    return "\n".join(lines) + "\n" + provenance.markdown(report.provenance) + "\n"


def run(args: argparse.Namespace, arguments: Sequence[str]) -> None:
    config = load_config(given(args, TargetConfig))
    platform = choose_platform(config.target)
    if config.target.threads is not None:
        torch.set_num_threads(config.target.threads)
    with show_progress() as progress:
        directory = resolve(args.target, progress=progress)
    models = {
        name: load_model(
            directory,
            kernels=platform.kernels,
            dtype=platform.dtype,
            device=platform.device,
            exact=platform.exact,
            quantization=name,
            packed_kv_dtype=platform.packed_kv_dtype,
        )
        for name in args.formats or ["auto"]
    }
    report = Report(
        provenance.collect("specserve_benchmarks.passes", arguments, platform, None),
        read_bandwidth(),
        {name: model.num_bytes for name, model in models.items()},
        measure(models, args),
    )
    text = markdown(report)
    stdout_console().print(text, markup=False)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".md").write_text(text, encoding="utf-8")
        args.out.with_suffix(".json").write_bytes(
            msgspec.json.format(msgspec.json.encode(report), indent=2)
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 measured; 2 wrong usage."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(arguments)
    try:
        run(args, arguments)
    except ValueError as error:
        print(f"passes: error: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m specserve_benchmarks.passes",
        description="Time forward passes on the CPU, by rows, context and weight format.",
        allow_abbrev=False,
    )
    parser.add_argument("--target", default=TargetConfig().target, help=OPTIONAL_TARGET_HELP)
    parser.add_argument(
        "--format",
        action="append",
        dest="formats",
        choices=get_args(Quantization),
        help="a setting of --quantization; repeatable (default: auto)",
    )
    add_sizes(parser, ROWS, [200])
    add_repeats(parser, 25)
    parser.add_argument(
        "--out", type=Path, metavar="STEM", help=f"STEM.md and STEM.json, such as {RESULTS.name}/X"
    )
    skip = frozenset({"target", "max_model_len", "quantization", "device"})
    add_flags(parser.add_argument_group("engine"), TargetConfig, ENGINE_HELP, skip=skip)
    return parser


if __name__ == "__main__":
    sys.exit(main())
