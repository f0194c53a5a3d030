"""Soak test of a server: many concurrent mixed requests, a third of them cut off by the client.

specserve eval soak --requests 2000 --concurrency 64

Exit code 1 if a request fails, if the server holds resources afterwards that it did not hold
before, if the memory of its HTTP or engine process grows by more than `MAX_GROWTH`, or if an answer
has other token ids when the same request is sent again alone.
"""

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Final

import msgspec
from msgspec import Struct
from rich.console import Console

from specserve.cli.parser import OPTIONAL_TARGET_HELP, engine_config
from specserve.cli.parser import build_parser as specserve_parser
from specserve.config import TargetConfig
from specserve.engine.device import choose_platform
from specserve_evals import provenance
from specserve_evals.progress import Advance, plain_table, stdout_console, track
from specserve_evals.runs import at_least_one
from specserve_evals.served import Served, serve
from specserve_evals.soak_client import Answer, fire, open_session
from specserve_evals.soak_requests import Shot, Sizes, draw
from specserve_evals.vitals import PREEMPTIONS, TASKS, Vitals, leftovers, wait_until_idle

NUM_ROUNDS: Final = 4  # after each round the server becomes idle and its vitals are read
MAX_GROWTH: Final = 0.05  # allowed relative growth of resident memory in the second half
# Roles whose memory is checked. A tokenizer process may grow, because the tokenizers library caches
# words, up to 10,000.
GROWING: Final = ("http", "engine")
MAX_LISTED: Final = 20  # failures printed; the JSON file has all of them
_WARM_UP: Final = 24  # requests before the baseline; they open what the server opens only once


class Plan(Struct, frozen=True):
    num_requests: int
    concurrency: int
    num_repeats: int  # finished requests to send again
    seed: int
    sizes: Sizes


class Round(Struct, frozen=True):
    num_requests: int  # of this and earlier rounds
    seconds: float  # of this round
    num_tokens: int  # of this round's answers that were not cut off
    vitals: Vitals  # of the idle server after this round


class Report(Struct, frozen=True):
    provenance: provenance.Provenance
    plan: Plan
    num_finished: int
    cuts: dict[str, int]  # number of requests cut off, by `Cut`
    errors: tuple[str, ...]
    num_repeated: int
    mismatches: tuple[str, ...]
    growth: dict[str, float]  # relative, of resident memory, by process role
    baseline: Vitals
    rounds: tuple[Round, ...]
    failures: tuple[str, ...]  # empty: the test passed


class SoakTest:
    """Runs a plan against a server that has no other client."""

    def __init__(self, server: Served, plan: Plan, advance: Advance) -> None:
        self._server = server
        self._plan = plan
        self._advance = advance
        self.answers: list[tuple[Shot, Answer]] = []
        self.rounds: list[Round] = []
        self.mismatches: list[str] = []
        self.num_repeated = 0

    async def run(self) -> Vitals:
        """Run the plan. Returns the baseline; the other results are in the public fields."""
        plan = self._plan
        shots = [draw(plan.seed, index, plan.sizes) for index in range(plan.num_requests)]
        await self._volley([draw(plan.seed, -1 - index, plan.sizes) for index in range(_WARM_UP)])
        baseline = await asyncio.to_thread(wait_until_idle, self._server)
        for part in range(NUM_ROUNDS):
            first, last = (len(shots) * end // NUM_ROUNDS for end in (part, part + 1))
            started = time.monotonic()
            fired = await self._volley(shots[first:last])
            seconds = time.monotonic() - started
            self.answers += fired
            num_tokens = sum(len(ids) for _, answer in fired for ids in answer.ids)
            vitals = await asyncio.to_thread(wait_until_idle, self._server, baseline)
            self.rounds.append(Round(last, seconds, num_tokens, vitals))
        await self._repeat()
        return baseline

    async def _volley(self, shots: Sequence[Shot]) -> list[tuple[Shot, Answer]]:
        """Send all `shots`, `concurrency` at a time; returns each with its answer."""
        waiting = iter(shots)
        fired = []
        async with open_session() as session, asyncio.TaskGroup() as group:

            async def fire_one_by_one() -> None:
                for shot in waiting:
                    fired.append((shot, await fire(session, self._server.url, shot)))
                    self._advance(1, "soak test")

            for _ in range(self._plan.concurrency):
                group.create_task(fire_one_by_one())
        return fired

    async def _repeat(self) -> None:
        """Send some finished requests again, one at a time, and record token ids that differ."""
        whole = [(shot, found) for shot, found in self.answers if not (found.cut or found.error)]
        chosen = Random(self._plan.seed).sample(whole, min(self._plan.num_repeats, len(whole)))
        async with open_session() as session:
            for shot, found in chosen:
                again = await fire(
                    session, self._server.url, msgspec.structs.replace(shot, cut=None)
                )
                self.num_repeated += 1
                if again.ids != found.ids:
                    wrong = (
                        f"{shot.path} {shot.body}: {found.ids}, alone {again.error or again.ids}"
                    )
                    self.mismatches.append(wrong)
                self._advance(1, "repeated alone")


def growth(rounds: Sequence[Round]) -> dict[str, float]:
    """Relative growth of resident memory over the second half, by role.

    If several processes have the same role, the largest growth counts.
    """
    middle, end = (rounds[index].vitals.processes for index in (len(rounds) // 2 - 1, -1))
    before = {process.pid: process.rss_bytes for process in middle}
    grown: dict[str, float] = {}
    for process in end:
        change = process.rss_bytes / before.get(process.pid, process.rss_bytes) - 1
        grown[process.role] = max(change, grown.get(process.role, change))
    return grown


def find_failures(
    baseline: Vitals, rounds: Sequence[Round], errors: Sequence[str], mismatches: Sequence[str]
) -> list[str]:
    """One line for each failure of the test; empty if it passed."""
    found = [
        f"after {each.num_requests} requests: {left}"
        for each in rounds
        for left in leftovers(each.vitals, baseline)
    ]
    for role, grown in growth(rounds).items():
        if role in GROWING and grown > MAX_GROWTH:
            found.append(f"the {role} process grew by {grown:.1%} in the second half")
    found += [f"error: {error}" for error in errors]
    return found + [f"differs when repeated alone: {mismatch}" for mismatch in mismatches]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 the test passed; 1 it failed; 2 wrong usage, or the server did not start."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(arguments)
    try:
        return run(args, arguments)
    except (ValueError, RuntimeError) as error:
        print(f"specserve eval soak: error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    sizes = Sizes(args.max_prompt, args.max_tokens)
    plan = Plan(args.requests, args.concurrency, args.repeats, args.seed, sizes)
    config = engine_config(specserve_parser().parse_args(["serve", args.target, *args.serve_flags]))
    origin = provenance.collect(
        "specserve_evals.soak", arguments, choose_platform(config.target), None
    )
    with (
        serve(args.target, args.serve_flags) as server,
        track(_WARM_UP + plan.num_requests + plan.num_repeats) as advance,
    ):
        test = SoakTest(server, plan, advance)
        baseline = asyncio.run(test.run())
    report = make_report(origin, plan, test, baseline)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
    show(report, stdout_console())
    return 1 if report.failures else 0


def make_report(
    origin: provenance.Provenance, plan: Plan, test: SoakTest, baseline: Vitals
) -> Report:
    answers = [answer for _, answer in test.answers]
    errors = tuple(answer.error for answer in answers if answer.error is not None)
    return Report(
        provenance=origin,
        plan=plan,
        num_finished=sum(not (answer.cut or answer.error) for answer in answers),
        cuts=dict(Counter(answer.cut for answer in answers if answer.cut is not None)),
        errors=errors,
        num_repeated=test.num_repeated,
        mismatches=tuple(test.mismatches),
        growth=growth(test.rounds),
        baseline=baseline,
        rounds=tuple(test.rounds),
        failures=tuple(find_failures(baseline, test.rounds, errors, test.mismatches)),
    )


def show(report: Report, console: Console) -> None:
    """Print the table and the result."""
    roles = [process.role for process in report.baseline.processes]
    table = plain_table(
        *("requests", "requests/s", "tokens/s", "tasks"),
        *(f"{role}: fds, threads, MiB" for role in roles),
    )
    table.add_row("0", "", "", *_cells(report.baseline))
    before = 0
    for each in report.rounds:
        rates = ((each.num_requests - before) / each.seconds, each.num_tokens / each.seconds)
        before = each.num_requests
        table.add_row(str(before), *(f"{rate:.1f}" for rate in rates), *_cells(each.vitals))
    console.print(table)
    cuts = ", ".join(f"{count} {where}" for where, count in sorted(report.cuts.items()))
    grown = ", ".join(f"{role} {value:+.2%}" for role, value in report.growth.items())
    console.print(f"{report.num_finished} requests finished; cut off: {cuts}")
    preempted = report.rounds[-1].vitals.metrics[PREEMPTIONS]
    console.print(f"{preempted:g} preemptions")
    console.print(f"growth of memory in the second half: {grown}")
    console.print(
        f"{report.num_repeated} requests repeated alone, {len(report.mismatches)} mismatches"
    )
    for failure in report.failures[:MAX_LISTED]:
        console.print(f"failed: {failure}", markup=False)
    console.print(f"{len(report.failures)} failures")


def _cells(vitals: Vitals) -> list[str]:
    return [f"{vitals.metrics[TASKS]:g}"] + [
        f"{process.num_fds} {process.num_threads} {process.rss_bytes / 2**20:.1f}"
        for process in vitals.processes
    ]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specserve eval soak",
        description="Send many mixed requests, a third of them cut off; look for leaks and errors.",
        allow_abbrev=False,
    )
    parser.add_argument("--target", default=TargetConfig().target, help=OPTIONAL_TARGET_HELP)
    for flag, default, text in (
        ("--requests", 2000, "requests in all"),
        ("--concurrency", 64, "requests at a time"),
        ("--repeats", 32, "requests to repeat alone afterwards"),
        ("--max-prompt", 200, "most characters of a prompt"),
        ("--max-tokens", 48, "most tokens of an answer"),
    ):
        help_text = f"{text} (default: %(default)s)"
        parser.add_argument(flag, type=at_least_one, default=default, metavar="N", help=help_text)
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the random requests (default: 0)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result here")
    parser.add_argument(
        "serve_flags", nargs="*", metavar="-- FLAG", help="flags of `specserve serve`, after --"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
