"""Measures how much one API key's attacks slow down another key: TTFT of a steady load.

specserve eval two_keys --seconds 60

Rounds alternate between the load alone and a load of the same rate beside the hostile key's
attacks. Exit code 1 if a request of the load fails, if its p99 TTFT during the attacks is more than
`MAX_RATIO` times that alone, or if the server holds resources afterwards that it did not hold
before.
"""

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from random import Random
from subprocess import PIPE
from typing import Final

import aiohttp
import msgspec
import numpy as np
from msgspec import Struct
from rich.console import Console

from specserve.cli.parser import OPTIONAL_TARGET_HELP, engine_config
from specserve.cli.parser import build_parser as specserve_parser
from specserve.config import TargetConfig
from specserve.engine.device import choose_platform
from specserve_evals import provenance
from specserve_evals.hostile_key import ATTACKS
from specserve_evals.progress import plain_table, stdout_console
from specserve_evals.runs import at_least_one
from specserve_evals.served import Served, serve
from specserve_evals.soak_requests import words
from specserve_evals.vitals import leftovers, wait_until_idle, without_replaced

MAX_RATIO: Final = 2.0  # allowed p99 TTFT during the attacks / p99 TTFT alone
_KEYS: Final = {name: f"{name}-0123456789abcdef" for name in ("steady", "hostile", "metrics")}
_LEAD_S: Final = 3.0  # seconds of attacks before the load begins; their queues are full by then
_PROMPT_CHARS: Final = 400  # characters per prompt of the load
_NUM_TOKENS: Final = 24  # tokens per answer of the load
_LONGEST_S: Final = 300.0  # seconds; an answer of the load that takes longer is an error


class Load(Struct, frozen=True):
    """Results of the steady load over all rounds of one kind (alone or during the attacks)."""

    ttft_s: list[float] = []
    total_s: list[float] = []
    errors: list[str] = []

    def quantile(self, q: float) -> float:
        """The `q` quantile of the TTFT, in seconds."""
        return float(np.quantile(self.ttft_s, q))


class Report(Struct, frozen=True):
    provenance: provenance.Provenance
    alone: Load
    beside: Load
    hostile_answers: Mapping[str, Mapping[str, int]]  # attack -> status -> number
    left_behind: list[str]
    failures: list[str]


async def steady_load(url: str, rate: float, seconds: float, seed: str, load: Load) -> None:
    """Start `rate` streams per second for `seconds`, whether or not earlier ones have finished.

    The results are added to `load`.
    """
    rng = Random(seed)
    begin = time.monotonic()
    async with _session("steady") as session, asyncio.TaskGroup() as group:
        for index in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, begin + index / rate - time.monotonic()))
            prompt = words(rng, _PROMPT_CHARS)
            group.create_task(_stream(session, url, prompt, load))


async def _stream(session: aiohttp.ClientSession, url: str, prompt: str, load: Load) -> None:
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": _NUM_TOKENS,
        "ignore_eos": True,
        "stream": True,
    }
    begin = time.monotonic()
    num_events = 0
    try:
        async with (
            asyncio.timeout(_LONGEST_S),
            session.post(f"{url}/v1/chat/completions", json=body) as response,
        ):
            if response.status != 200:
                load.errors.append(f"{response.status}: {(await response.text())[:300]}")
                return
            async for line in response.content:
                data = line.removeprefix(b"data: ").strip()
                if data == b"[DONE]":
                    load.total_s.append(time.monotonic() - begin)
                    return
                if line.startswith(b"data: ") and _has_text(data):
                    num_events += 1
                    if num_events == 1:
                        load.ttft_s.append(time.monotonic() - begin)
        load.errors.append("the stream ended without [DONE]")
    except TimeoutError:
        load.errors.append(f"no complete answer within {_LONGEST_S:g} s")
    except (aiohttp.ClientError, ConnectionError) as error:
        load.errors.append(f"{type(error).__name__}: {error}")


def _has_text(data: bytes) -> bool:
    return any(choice["delta"].get("content") for choice in json.loads(data)["choices"])


@contextlib.asynccontextmanager
async def _session(key: str) -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, headers=headers_of(key), timeout=timeout
    ) as session:
        yield session


def headers_of(key: str) -> Mapping[str, str]:
    return {"Authorization": f"Bearer {_KEYS[key]}"}


async def run(server: Served, args: argparse.Namespace, origin: provenance.Provenance) -> Report:
    """Alternate rounds alone and during the attacks; the server becomes idle after each pair."""
    alone, beside = Load(), Load()
    hostile: dict[str, Counter[str]] = {}
    metrics = headers_of("metrics")
    await steady_load(server.url, args.rate, _LEAD_S, f"{args.seed}/warm up", Load())
    baseline = await asyncio.to_thread(wait_until_idle, server, headers=metrics)
    vitals = baseline
    for number in range(args.rounds):
        seed = f"{args.seed}/{number}"
        await steady_load(server.url, args.rate, args.seconds, f"{seed}/alone", alone)
        command = [sys.executable, "-m", "specserve_evals.hostile_key"]
        arguments = [server.url, _KEYS["hostile"], seed, *(args.attack or ATTACKS)]
        with subprocess.Popen([*command, *arguments], stdin=PIPE, stdout=PIPE) as attack:
            try:
                await asyncio.sleep(_LEAD_S)
                await steady_load(server.url, args.rate, args.seconds, f"{seed}/beside", beside)
                answers, _ = await asyncio.to_thread(attack.communicate)
            finally:
                attack.kill()
        for name, counts in json.loads(answers).items():
            hostile.setdefault(name, Counter()).update(counts)
        vitals = await asyncio.to_thread(wait_until_idle, server, baseline, headers=metrics)
    # A text of the attacks may have taken longer than the limit; then its process was replaced.
    left = leftovers(vitals, without_replaced(vitals, baseline, "tokenizer"))
    failures = find_failures(alone, beside, left)
    return Report(origin, alone, beside, hostile, left, failures)


def find_failures(alone: Load, beside: Load, left_behind: Sequence[str]) -> list[str]:
    found = [f"alone: {error}" for error in alone.errors]
    found += [f"during the attacks: {error}" for error in beside.errors]
    if alone.ttft_s and beside.ttft_s:
        ratio = beside.quantile(0.99) / alone.quantile(0.99)
        if ratio > MAX_RATIO:
            found.append(
                f"p99 TTFT is {ratio:.2f} times that without attacks; {MAX_RATIO:g} is allowed"
            )
    return found + [f"not released: {what}" for what in left_behind]


def show(report: Report, console: Console) -> None:
    """Print the table and the result."""
    table = plain_table(
        "", "requests", "TTFT p50 ms", "p90", "p99", "complete answer p50 ms", "errors"
    )
    for name, load in (("alone", report.alone), ("during the attacks", report.beside)):
        times = [f"{1e3 * load.quantile(q):.0f}" for q in (0.5, 0.9, 0.99)] if load.ttft_s else []
        total = f"{1e3 * float(np.median(load.total_s)):.0f}" if load.total_s else ""
        num_requests = str(len(load.ttft_s))
        table.add_row(name, num_requests, *times, total, str(len(load.errors)))
    console.print(table)
    for name, answers in report.hostile_answers.items():
        counted = ", ".join(f"{count} x {status}" for status, count in answers.items())
        console.print(f"{name}: {counted}", markup=False)
    for failure in report.failures:
        console.print(f"failed: {failure}", markup=False)
    console.print(f"{len(report.failures)} failures")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 the test passed; 1 it failed; 2 wrong usage, or the server did not start."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        key_file = Path(folder) / "keys"
        scopes = {"steady": "inference", "hostile": "inference", "metrics": "metrics"}
        lines = [f"{name}:{scopes[name]}:{key}\n" for name, key in _KEYS.items()]
        key_file.touch(mode=0o600)
        key_file.write_text("".join(lines), encoding="utf-8")
        flags = ["--api-key-file", str(key_file), *args.serve_flags]
        try:
            config = engine_config(specserve_parser().parse_args(["serve", args.target, *flags]))
            platform = choose_platform(config.target)
            origin = provenance.collect("specserve_evals.two_keys", arguments, platform, None)
            with serve(args.target, flags) as server:
                report = asyncio.run(run(server, args, origin))
        except (ValueError, RuntimeError) as error:
            print(f"specserve eval two_keys: error: {error}", file=sys.stderr)
            return 2
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
    show(report, stdout_console())
    return 1 if report.failures else 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specserve eval two_keys",
        description="TTFT of one key's steady load, without and during the attacks of another key.",
        allow_abbrev=False,
    )
    parser.add_argument("--target", default=TargetConfig().target, help=OPTIONAL_TARGET_HELP)
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="length of a round (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=at_least_one,
        default=2,
        metavar="N",
        help="rounds without attacks, and rounds with them (default: %(default)s)",
    )
    parser.add_argument(
        "--rate",
        type=float,
        default=1.0,
        metavar="R",
        help="requests per second that the attacked key sends (default: %(default)s)",
    )
    parser.add_argument(
        "--attack",
        action="append",
        choices=list(ATTACKS),
        metavar="NAME",
        help=f"run only this attack; may be repeated (default: all of {', '.join(ATTACKS)})",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of all requests (default: 0)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument(
        "serve_flags", nargs="*", metavar="-- FLAG", help="flags of `specserve serve`, after --"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
