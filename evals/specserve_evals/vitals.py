"""The vital signs of a server: what its processes hold, and the gauges that it shows.

Linux only: what a process holds is read from /proc. Worth comparing while the server is idle.
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
IDLE: Final = (  # gauges that are 0 when nothing is under way
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "specserve:open_streams",
    "specserve:kv_slots_allocated",
)
_ROLES: Final = {"engine_main": "engine", "text_main": "text"}  # by the module that runs there
_POLL_S: Final = 0.1
_SETTLE_S: Final = 15.0
_NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})


class ProcessVitals(Struct, frozen=True):
    role: str  # "http", "engine" or "text"
    pid: int
    num_fds: int
    num_threads: int
    rss_bytes: int


class Vitals(Struct, frozen=True):
    processes: tuple[ProcessVitals, ...]  # the HTTP process, then its children by age
    metrics: dict[str, float]


def read_vitals(server: Served, headers: Mapping[str, str] = _NO_HEADERS) -> Vitals:
    """`headers` authorise the request for `/metrics`, where the server has keys."""
    request = urllib.request.Request(f"{server.url}/metrics", headers=dict(headers))
    with urllib.request.urlopen(request, timeout=60) as response:
        metrics = _metrics(response.read().decode())
    time.sleep(_POLL_S)  # until the connection we just used is gone
    return Vitals(tuple(_read(role, pid) for role, pid in _pids(server.pid)), metrics)


def settle(
    server: Served, baseline: Vitals | None = None, headers: Mapping[str, str] = _NO_HEADERS
) -> Vitals:
    """The vitals once it is idle and holds no more than at `baseline`, else those after 15 s."""
    end = time.monotonic() + _SETTLE_S
    while True:
        vitals = read_vitals(server, headers)
        if not leftovers(vitals, baseline or vitals) or time.monotonic() > end:
            return vitals


def leftovers(vitals: Vitals, baseline: Vitals) -> list[str]:
    """What an idle server holds that it did not hold at the baseline."""
    found = [f"{name} is {value:g}" for name in IDLE if (value := vitals.metrics[name])]
    tasks, before = vitals.metrics[TASKS], baseline.metrics[TASKS]
    if tasks > before:
        found.append(f"{tasks:g} asyncio tasks instead of {before:g}")
    now = {process.pid: process for process in vitals.processes}
    for then in baseline.processes:
        if then.pid not in now:
            found.append(f"the {then.role} process of the beginning is gone")
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
        except OSError:  # over since
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
