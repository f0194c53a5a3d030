"""Reads the vitals of a server: the resources of its processes, and gauges of its /metrics.

Linux only: the resources of a process are read from /proc. Vitals are comparable only while the
server is idle.
"""

import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from msgspec import Struct
from prometheus_client.parser import text_string_to_metric_families

from specserve_evals.served import Served

TASKS: Final = "specserve:tasks"
PREEMPTIONS: Final = "vllm:num_preemptions_total"
IDLE: Final = (  # gauges that are 0 while no request is open
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "specserve:open_streams",
    "specserve:kv_slots_allocated",
)
# Module on the command line -> role.
_ROLES: Final = {"engine_main": "engine", "tokenizer_worker": "tokenizer"}
_POLL_S: Final = 0.1  # seconds from the request for /metrics to reading the processes
_MAX_WAIT_S: Final = 15.0  # seconds that `wait_until_idle` waits at most
_NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})


class ProcessVitals(Struct, frozen=True):
    role: str  # "http", "engine" or "tokenizer"
    pid: int
    num_fds: int
    num_threads: int
    rss_bytes: int


class Vitals(Struct, frozen=True):
    processes: tuple[ProcessVitals, ...]  # the HTTP process, then its children by process id
    metrics: dict[str, float]


def read_vitals(server: Served, headers: Mapping[str, str] = _NO_HEADERS) -> Vitals:
    """Read the vitals. `headers` authorise the request for /metrics if the server has API keys."""
    request = urllib.request.Request(f"{server.url}/metrics", headers=dict(headers))
    with urllib.request.urlopen(request, timeout=60) as response:
        metrics = _metrics(response.read().decode())
    time.sleep(_POLL_S)  # until the server has closed the connection of this request
    return Vitals(tuple(_read(role, pid) for role, pid in _pids(server.pid)), metrics)


def wait_until_idle(
    server: Served, baseline: Vitals | None = None, headers: Mapping[str, str] = _NO_HEADERS
) -> Vitals:
    """Wait until the server is idle and holds no more than at `baseline`; returns its vitals.

    After 15 seconds it returns the vitals of that moment, whatever they are.
    """
    end = time.monotonic() + _MAX_WAIT_S
    while True:
        vitals = read_vitals(server, headers)
        if not leftovers(vitals, baseline or vitals) or time.monotonic() > end:
            return vitals


def without_replaced(vitals: Vitals, baseline: Vitals, role: str) -> Vitals:
    """`baseline` without the processes of `role` that have ended, if as many run as then."""
    pids, before = ({p.pid for p in v.processes if p.role == role} for v in (vitals, baseline))
    ended = before - pids if len(pids) == len(before) else set[int]()
    left = tuple(process for process in baseline.processes if process.pid not in ended)
    return Vitals(left, baseline.metrics)


def leftovers(vitals: Vitals, baseline: Vitals) -> list[str]:
    """One line for each resource that an idle server holds and did not hold at the baseline."""
    found = [f"{name} is {value:g}" for name in IDLE if (value := vitals.metrics[name])]
    tasks, before = vitals.metrics[TASKS], baseline.metrics[TASKS]
    if tasks > before:
        found.append(f"{tasks:g} asyncio tasks instead of {before:g}")
    now = {process.pid: process for process in vitals.processes}
    for then in baseline.processes:
        if then.pid not in now:
            found.append(f"the {then.role} process of the baseline has ended")
        elif (num_fds := now[then.pid].num_fds) > then.num_fds:
            found.append(
                f"the {then.role} process has {num_fds} open files instead of {then.num_fds}"
            )
    return found


def _metrics(text: str) -> dict[str, float]:
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    return {name: values[name] for name in (*IDLE, TASKS, PREEMPTIONS)}


def _pids(parent: int) -> Iterator[tuple[str, int]]:
    yield "http", parent
    for pid in sorted(int(entry.name) for entry in Path("/proc").glob("[0-9]*")):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
            command = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
        except OSError:  # the process has ended
            continue
        if int(stat.rpartition(")")[2].split()[1]) == parent:
            yield from ((role, pid) for module, role in _ROLES.items() if module in command)


def _read(role: str, pid: int) -> ProcessVitals:
    folder = Path(f"/proc/{pid}")
    lines = (
        line.partition(":") for line in (folder / "status").read_text(encoding="utf-8").splitlines()
    )
    status = {name: value.split() for name, _, value in lines}
    return ProcessVitals(
        role=role,
        pid=pid,
        num_fds=len(list((folder / "fd").iterdir())),
        num_threads=int(status["Threads"][0]),
        rss_bytes=int(status["VmRSS"][0]) * 1024,
    )
