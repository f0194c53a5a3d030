"""Times the start: `specserve generate` for one line, and `specserve serve` until it is ready.

python -m specserve_benchmarks.startup --tree new=. --tree old=../old --repeats 9

Every repeat starts each tree once, in turn; the first repeat fills the caches and does not count.
Processor time is that of all processes together, and varies less than wall time on a busy machine.
The stages of the first tree follow, from one more start of each kind.
"""

import argparse
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Final
from urllib.error import URLError
from urllib.request import urlopen

import msgspec
from msgspec import Struct

from specserve.cli.parser import OPTIONAL_TARGET_HELP
from specserve.config import TargetConfig
from specserve.engine.device import choose_platform
from specserve_benchmarks.flags import RESULTS, add_repeats
from specserve_evals import provenance
from specserve_evals.progress import stdout_console, track

COMMANDS: Final = ("generate", "serve")
_FOLDERS: Final = (".", "kernels", "drafts", "evals", "benchmarks")  # of a tree, on PYTHONPATH
_ROOT: Final = Path(__file__).parents[2]
_LINE: Final = ("--prompt", "Hello", "--max-tokens", "20", "--temperature", "0")
_POLL_S: Final = 0.02
_TIMEOUT_S: Final = 300.0

Stage = tuple[str, float, float]  # name, seconds of wall time, seconds of processor time


class Start(Struct, frozen=True):
    tree: str
    command: str
    wall_s: float
    processor_s: float


class Report(Struct, frozen=True):
    provenance: provenance.Provenance
    starts: list[Start]
    stages: dict[str, list[Stage]]  # by command, of the first tree


def measure(trees: Mapping[str, Path], target: str, repeats: int) -> Iterator[Start]:
    """Start every tree with every command once per repeat, after one repeat as warm-up.

    Raises ValueError if two trees generate different texts.
    """
    texts: set[bytes] = set()
    with track((repeats + 1) * len(trees) * len(COMMANDS)) as advance:
        for repeat in range(repeats + 1):
            for command in COMMANDS:
                for name, tree in trees.items():
                    advance(1, f"{name}: {command}")
                    before, started = _processor_s(), time.perf_counter()
                    if command == "generate":
                        texts.add(_generate(tree, target))
                        wall = time.perf_counter() - started
                    else:
                        with _serving(tree, target):
                            wall = time.perf_counter() - started
                    if repeat:
                        yield Start(name, command, wall, _processor_s() - before)
    if len(texts) > 1:
        raise ValueError(f"the texts differ: {sorted(texts)}")


def _processor_s() -> float:
    """Of all processes that this one has waited for, and theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _environment(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(str(tree / each) for each in _FOLDERS)}


def _specserve(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "specserve.cli", *arguments]


def _generate(tree: Path, target: str) -> bytes:
    command = _specserve("generate", target, *_LINE)
    return subprocess.run(
        command, env=_environment(tree), check=True, capture_output=True, timeout=_TIMEOUT_S
    ).stdout


@contextmanager
def _serving(tree: Path, target: str) -> Iterator[None]:
    """A server that is ready. Raises ValueError if it ends before, TimeoutError if it is late."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = _specserve("serve", target, "--port", str(port))
    deadline = time.monotonic() + _TIMEOUT_S
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, env=_environment(tree), stdout=log, stderr=log)
        try:
            while not _is_ready(port):
                if server.poll() is not None:
                    log.seek(0)
                    raise ValueError(f"the server ended: {log.read().decode(errors='replace')}")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not ready after {_TIMEOUT_S:g} s")
                time.sleep(_POLL_S)
            yield
        finally:
            server.terminate()
            server.wait()


def _is_ready(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/ready", timeout=10) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):  # not listening yet, or 503
        return False


def stages(tree: Path, command: str, target: str) -> list[Stage]:
    """The stages of one start of this tree."""
    program = [sys.executable, "-P", "-m", "specserve_benchmarks.startup_stages", command, target]
    environment = _environment(tree)
    done = subprocess.run(program, env=environment, check=True, stdout=subprocess.PIPE)
    return msgspec.json.decode(done.stdout, type=list[Stage])


def markdown(report: Report) -> str:
    lines = [
        "# Start-up",
        "",
        "Seconds, median (least to most). `serve`: until `/ready` answers 200; its processor time",
        "includes that of stopping it.",
        "",
        "| tree | command | wall time | processor time |",
        "|---|---|---|---|",
    ]
    for command in COMMANDS:
        for tree in dict.fromkeys(start.tree for start in report.starts):
            own = [each for each in report.starts if (each.tree, each.command) == (tree, command)]
            spreads = [_spread([each.wall_s for each in own])]
            spreads.append(_spread([each.processor_s for each in own]))
            lines.append(f"| {tree} | {command} | " + " | ".join(spreads) + " |")
    for command, own_stages in report.stages.items():
        lines += ["", f"Stages of `{command}`, one start:", "", "| stage | wall | processor |"]
        lines.append("|---|---|---|")
        lines += [f"| {name} | {wall:.2f} | {cpu:.2f} |" for name, wall, cpu in own_stages]
    return "\n".join(lines) + "\n\n" + provenance.markdown(report.provenance) + "\n"


def _spread(seconds: Sequence[float]) -> str:
    return f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def _tree(value: str) -> tuple[str, Path]:
    name, _, folder = value.partition("=")
    path = Path(folder or name).resolve()
    if not (path / "specserve" / "cli").is_dir():
        raise argparse.ArgumentTypeError(f"{value!r}: {path} has no folder specserve/cli")
    return (name if folder else path.name), path


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m specserve_benchmarks.startup",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--target", default=TargetConfig().target, help=OPTIONAL_TARGET_HELP)
    parser.add_argument(
        "--tree",
        type=_tree,
        action="append",
        metavar="NAME=DIR",
        help="a source tree with built kernels, several to compare them; not given: this one",
    )
    add_repeats(parser, 5)
    parser.add_argument("--out", type=Path, help=f"write OUT.md and OUT.json, as in {RESULTS}")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    trees = dict(args.tree or [("this", _ROOT)])
    given = sys.argv[1:] if arguments is None else arguments
    try:
        report = Report(
            provenance.collect(
                "specserve_benchmarks.startup", given, choose_platform(TargetConfig()), None
            ),
            list(measure(trees, args.target, args.repeats)),
            {each: stages(next(iter(trees.values())), each, args.target) for each in COMMANDS},
        )
    except (ValueError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = markdown(report)
    stdout_console().print(text, markup=False)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".md").write_text(text, encoding="utf-8")
        encoded = msgspec.json.encode(report)
        args.out.with_suffix(".json").write_bytes(msgspec.json.format(encoded, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
