"""Fuzz test of the HTTP API: sends a server valid and invalid requests made from its schema.

specserve eval fuzz --examples 2000

schemathesis generates the requests from the server's /openapi.json: boundary values of every field
and random data. Exit code 1 for any 5xx response, for any response that contradicts the schema, or
if the server holds resources afterwards that it did not hold before.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct
from rich.console import Console

from specserve.cli.parser import OPTIONAL_TARGET_HELP
from specserve.config import TargetConfig
from specserve_evals.progress import stdout_console
from specserve_evals.runs import at_least_one
from specserve_evals.served import Served, serve
from specserve_evals.vitals import leftovers, wait_until_idle

CHECKS: Final = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
    *("response_schema_conformance", "negative_data_rejection", "unsupported_method"),
)
PHASES: Final = ("coverage", "fuzzing")
_FIRST: Final = 64  # most random examples per operation in one round
_REQUEST_S: Final = 300  # seconds; timeout of one request


class Failure(Struct, frozen=True):
    title: str
    operations: tuple[str, ...]


class TestCases(Struct, frozen=True):
    generated: int


class Round(Struct, frozen=True):
    """The JSON report of one run of schemathesis."""

    test_cases: TestCases
    failures: tuple[Failure, ...]
    errors: tuple[dict[str, object], ...]


def fuzz(server: Served, num_examples: int, seed: int, phases: Sequence[str]) -> list[Round]:
    """Run rounds until `num_examples` were generated in all or a round found a failure.

    The first round has all `phases`; later rounds have random data only. Raises RuntimeError if
    schemathesis does not run.
    """
    rounds: list[Round] = []
    while sum(each.test_cases.generated for each in rounds) < num_examples:
        rounds.append(_round(server.url, seed + len(rounds), num_examples, phases))
        phases = ("fuzzing",)
        if rounds[-1].failures or rounds[-1].errors:
            break
    return rounds


def _round(url: str, seed: int, num_examples: int, phases: Sequence[str]) -> Round:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
            *("--phases", ",".join(phases), "--checks", ",".join(CHECKS)),
            *("--max-examples", str(min(_FIRST, num_examples)), "--seed", str(seed)),
            *("--mode", "all", "--generation-database", "none", "--no-color"),
            *("--request-timeout", str(_REQUEST_S), "--continue-on-failure"),
            *("--report", "json", "--report-json-path", str(report)),
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if not report.exists():
            raise RuntimeError(f"schemathesis did not run:\n{done.stderr or done.stdout}")
        found = msgspec.json.decode(report.read_bytes(), type=Round)
    if found.failures or found.errors:
        print(done.stdout)  # contains a curl command for each failure
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 no failure found; 1 failures found; 2 wrong usage, or the test did not run."""
    args = build_parser().parse_args(argv)
    try:
        return run(args, stdout_console())
    except (ValueError, RuntimeError) as error:
        print(f"specserve eval fuzz: error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, console: Console) -> int:
    with serve(args.target, args.serve_flags) as server:
        fuzz(server, 1, args.seed, ("fuzzing",))  # warm-up before the baseline
        baseline = wait_until_idle(server)
        rounds = fuzz(server, args.examples, args.seed, args.phases)
        left = leftovers(wait_until_idle(server, baseline), baseline)
    for each in rounds:
        for failure in each.failures:
            console.print(f"failed: {failure.title}: {', '.join(failure.operations)}", markup=False)
        for error in each.errors:
            console.print(f"error: {error}", markup=False)
    for found in left:
        console.print(f"not released: {found}", markup=False)
    num_failures = sum(len(each.failures) + len(each.errors) for each in rounds) + len(left)
    num_examples = sum(each.test_cases.generated for each in rounds)
    console.print(f"{num_examples} examples in {len(rounds)} rounds, {num_failures} failures")
    return 1 if num_failures else 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specserve eval fuzz",
        description="Valid and invalid requests generated from the API's description (OpenAPI).",
        allow_abbrev=False,
    )
    parser.add_argument("--target", default=TargetConfig().target, help=OPTIONAL_TARGET_HELP)
    parser.add_argument(
        "--examples",
        type=at_least_one,
        default=2000,
        metavar="N",
        help="requests to send, at least (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=1, metavar="N", help="seed of the requests (default: 1)"
    )
    parser.add_argument(
        "--phases",
        nargs="+",
        default=list(PHASES),
        choices=PHASES,
        help="coverage: every field at its limits; fuzzing: random requests "
        f"(default: {' '.join(PHASES)})",
    )
    parser.add_argument(
        "serve_flags", nargs="*", metavar="-- FLAG", help="flags of `specserve serve`, after --"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
