"""Checks that a drafter, built in or installed, does what every drafter must do.

specserve eval conformance --draft ngram

The checks are the methods of `drafter_conformance.DrafterConformance`. Exit code 1 if one fails.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from statistics import median, quantiles
from typing import Final
from unittest import SkipTest

from specserve.cli.flags import add_flags, given
from specserve.cli.parser import TARGET_HELP
from specserve.config import DraftConfig
from specserve.field_help import ENGINE_HELP
from specserve.hub import resolve
from specserve.speculation import failures
from specserve.speculation.registry import check_options, find_drafter
from specserve_evals.drafter_conformance import PROMPTS, SAMPLING, DrafterConformance
from specserve_evals.engines import run_requests

RESULTS: Final = {"PASS": "passed", "FAIL": "failed", "SKIP": "could not be checked"}
CHECKS: Final = [name for name in vars(DrafterConformance) if name.startswith("test_")]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 all checks passed; 1 one failed; 2 wrong usage."""
    args = build_parser().parse_args(argv)
    try:
        kind = conformance_of(args)
        kind.setup_class()
    except ValueError as error:
        print(f"specserve eval conformance: error: {error}", file=sys.stderr)
        return 2
    logger = logging.getLogger(failures.__name__)
    logger.disabled = True  # a failed call is a line of the report, not a traceback each time
    try:
        return run_checks(kind)
    finally:
        logger.disabled = False
        kind.teardown_class()


def conformance_of(args: argparse.Namespace) -> type[DrafterConformance]:
    """The checks of the drafter that `args` name. Raises ValueError."""
    if args.draft == "auto":
        raise ValueError("draft: 'auto' stands for several drafters; name one of them")
    given_options = given(args, DraftConfig).get("options", {})
    check_options(given_options, {find_drafter(args.draft, resolve)[0]})

    class Conformance(DrafterConformance):
        drafter, target, device = args.draft, args.target, args.device
        options = given_options

    return Conformance


def run_checks(kind: type[DrafterConformance]) -> int:
    """Run all checks, with a line for each; returns the exit code."""
    results: list[str] = []
    for name in CHECKS:
        result, reason = run_check(kind, name)
        results.append(result)
        print(f"{result}  {name.removeprefix('test_')}: {reason}", flush=True)
        if result == "FAIL" and name == CHECKS[0]:
            return 1  # it does not load, so nothing else can be checked
    print_times(kind)
    counts = {text: results.count(result) for result, text in RESULTS.items()}
    print(", ".join(f"{number} {text}" for text, number in counts.items() if number))
    return 1 if "FAIL" in results else 0


def run_check(kind: type[DrafterConformance], name: str) -> tuple[str, str]:
    """PASS, FAIL or SKIP, and what was checked or why it failed or could not be checked."""
    check = getattr(kind(), name)
    try:
        check()
    except AssertionError as error:
        return "FAIL", str(error)
    except SkipTest as error:
        return "SKIP", str(error)
    except Exception as error:
        return "FAIL", f"{type(error).__name__}: {error}"
    return "PASS", (check.__doc__ or "").removesuffix(".")


def print_times(kind: type[DrafterConformance]) -> None:
    """Print how long the drafter's calls take, and how many of its tokens are accepted."""
    engine, watched = kind.watched_engine(cost_aware=False)
    for batch in (1, 4):
        for prompt in PROMPTS:
            run_requests(engine, [prompt] * batch, SAMPLING["greedy"])
    for (method, num_seqs), seconds in sorted(watched.seconds.items()):
        if num_seqs not in (1, 4) or len(seconds) < 2:
            continue
        typical, slow = median(seconds), quantiles(seconds, n=20)[-1]
        calls = f"{len(seconds)} calls of {method} for {num_seqs} sequence{'s' * (num_seqs > 1)}"
        print(f"time  {calls}: median {typical * 1e6:.1f} us, p95 {slow * 1e6:.1f} us")
    counts = engine.drafter.counts
    proposed, accepted = sum(counts.proposed.values()), sum(map(sum, counts.accepted.values()))
    random = " (the target is random)" if kind.target is None else ""
    print(f"time  {proposed} tokens proposed, {accepted} accepted{random}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specserve eval conformance",
        description="Check that a drafter does what every drafter must do: engines with it and "
        "without it run on prompts of token ids, under every kind of sampling and load.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--draft",
        required=True,
        metavar="NAME",
        help="an installed drafter or a draft's directory, which was made for the target",
    )
    parser.add_argument(
        "--target",
        metavar="TARGET",
        help=f"{TARGET_HELP}; not given: a tiny random Llama, which takes seconds",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="TEXT",
        help="cpu, cuda or cuda:N; on a GPU near ties may be decided differently, which is no "
        "fault of the drafter (default: %(default)s)",
    )
    skip = frozenset(DraftConfig.__struct_fields__) - {"options"}
    add_flags(parser.add_argument_group("drafter"), DraftConfig, ENGINE_HELP, skip=skip)
    return parser


if __name__ == "__main__":
    sys.exit(main())
