"""Times each kernel and a model step by rows (batched tokens) and context, for each backend.

python -m specserve_benchmarks.kernels --device cpu

One sequence with a tree of 1 to 64 nodes; shapes and dtype are those of the target.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Final

import msgspec
import torch
from msgspec import Struct
from rich.console import Console

from specserve.cli.flags import add_flags, given
from specserve.cli.parser import OPTIONAL_TARGET_HELP
from specserve.cli.progress import show_progress
from specserve.config import TargetConfig, load_config
from specserve.engine.device import Platform, choose_platform
from specserve.field_help import ENGINE_HELP
from specserve.hub import resolve
from specserve.models.loader import load_model
from specserve.models.shape import ModelShape
from specserve_benchmarks.flags import add_sizes
from specserve_benchmarks.kernel_cases import NUM_BY_ROWS_ONLY, Case, kernel_cases, step_cases
from specserve_evals import provenance
from specserve_evals.progress import Advance, plain_table, stdout_console, track
from specserve_kernels.dispatch import CHOICES, named_kernels
from specserve_kernels.ops import Kernels

ROWS: Final = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS: Final = (128, 1024, 4096)
SECONDS_PER_CASE: Final = 0.3  # seconds; approximate limit for all samples of one case
NUM_SAMPLES: Final = 7  # per case
SHORTEST_SAMPLE_S: Final = 0.002  # seconds; far longer than a clock read or a kernel launch


class Timing(Struct, frozen=True):
    kernel: str
    backend: str
    num_rows: int
    context: int | None  # None: the call does not depend on it
    seconds: float  # per call, median of the samples
    num_bytes: int  # bytes that one call has to move

    @property
    def gb_per_s(self) -> float:
        return self.num_bytes / self.seconds / 1e9


class Report(Struct, frozen=True):
    provenance: provenance.Provenance
    timings: tuple[Timing, ...]


def seconds_per_call(call: Callable[[], object], device: torch.device) -> float:
    """Median seconds per call over `NUM_SAMPLES` samples of enough calls each, after a warm-up."""

    def sample(count: int) -> float:
        _synchronise(device)
        started = time.perf_counter()
        for _ in range(count):
            call()
        _synchronise(device)
        return (time.perf_counter() - started) / count

    sample(1)  # the first call may compile the kernel
    estimate = sample(1)
    affordable = int(SECONDS_PER_CASE / NUM_SAMPLES / estimate)
    count = max(1, min(affordable, int(SHORTEST_SAMPLE_S / estimate) + 1))
    return median(sample(count) for _ in range(NUM_SAMPLES))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def backends(names: Sequence[str], platform: Platform) -> list[Kernels]:
    """The named backends; by default the torch reference and the one in use."""
    chosen = dict.fromkeys(names or ["torch", platform.kernels.name])
    return [named_kernels(name) for name in chosen]


def measure(args: argparse.Namespace, platform: Platform) -> tuple[Timing, ...]:
    """Time every case of every backend. Raises ValueError if a context does not fit the target."""
    chosen = backends(args.backend, platform)
    with show_progress() as report:
        directory = resolve(args.target, progress=report)
    shape = ModelShape.from_dir(directory)
    longest = shape.max_position_embeddings - max(args.rows)
    if max(args.contexts) > longest:
        raise ValueError(
            f"contexts: {max(args.contexts)} is too long for {args.target}; "
            f"use at most {longest} with {max(args.rows)} rows"
        )
    per_backend = len(args.rows) * (2 * len(args.contexts) + NUM_BY_ROWS_ONLY)
    with track(per_backend * len(chosen)) as advance, torch.inference_mode():
        return tuple(
            _time(case, kernels.name, platform.device, advance)
            for kernels in chosen
            for case in cases(kernels, platform, directory, args)
        )


def cases(
    kernels: Kernels, platform: Platform, directory: Path, args: argparse.Namespace
) -> Iterator[Case]:
    """All cases of one backend: its kernels, then model steps, which take longest."""
    shape, dtype, device = ModelShape.from_dir(directory), platform.dtype, platform.device
    yield from kernel_cases(kernels, shape, dtype, device, args.rows, args.contexts)
    exact = platform.exact and kernels.exact
    model = load_model(directory, kernels=kernels, dtype=dtype, device=device, exact=exact)
    yield from step_cases(model, device, args.rows, args.contexts)


def _time(case: Case, backend: str, device: torch.device, advance: Advance) -> Timing:
    seconds = seconds_per_call(case.call, device)
    advance(1, f"{backend}: {case.kernel}")
    return Timing(case.kernel, backend, case.num_rows, case.context, seconds, case.num_bytes)


def show(timings: Sequence[Timing], console: Console) -> None:
    """Print a table with one row per call and one pair of columns per backend."""
    names = list(dict.fromkeys(timing.backend for timing in timings))
    table = plain_table("kernel", "context", "rows")
    for name in names:
        table.add_column(f"{name}, us", justify="right")
        table.add_column("GB/s", justify="right")
    groups: dict[tuple[str, int | None, int], dict[str, Timing]] = {}
    for timing in timings:
        key = (timing.kernel, timing.context, timing.num_rows)
        groups.setdefault(key, {})[timing.backend] = timing
    for (kernel, context, num_rows), found in groups.items():
        cells = [kernel, "-" if context is None else str(context), str(num_rows)]
        for name in names:
            timing_of = found[name]
            cells += [f"{timing_of.seconds * 1e6:.1f}", f"{timing_of.gb_per_s:.1f}"]
        table.add_row(*cells)
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 measured; 2 wrong usage."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(arguments)
    try:
        config = load_config(given(args, TargetConfig))
        platform = choose_platform(config.target)
        if config.target.threads is not None:
            torch.set_num_threads(config.target.threads)
        timings = measure(args, platform)
    except ValueError as error:
        print(f"kernels: error: {error}", file=sys.stderr)
        return 2
    if args.out is not None:
        origin = provenance.collect("specserve_benchmarks.kernels", arguments, platform, None)
        report = msgspec.json.encode(Report(origin, timings))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_bytes(msgspec.json.format(report, indent=2))
    show(timings, stdout_console())
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m specserve_benchmarks.kernels",
        description="Time kernels and model steps.",
        allow_abbrev=False,
    )
    parser.add_argument("--target", default=TargetConfig().target, help=OPTIONAL_TARGET_HELP)
    add_sizes(parser, ROWS, CONTEXTS)
    parser.add_argument(
        "--backend",
        action="append",
        default=[],
        choices=CHOICES,
        help="kernels to time; repeatable. not given: torch, and the kernels in use",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result here")
    skip = frozenset({"target", "max_model_len"})
    add_flags(parser.add_argument_group("engine"), TargetConfig, ENGINE_HELP, skip=skip)
    return parser


if __name__ == "__main__":
    sys.exit(main())
