"""A real `specserve serve` process on a free port, and what tests ask of it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

MODEL = "tiny-chat"
_URL = re.compile(r" at (http\S+)")


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class LiveServer:
    """`url` is its address, `log` the file with everything it said."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self.log = log

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 60.0,
    ) -> Reply:
        """One request; a body that is no bytes is sent as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **(headers or {})}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return _reply(response.status, response.headers, response.read())
        except urllib.error.HTTPError as error:
            with error:
                return _reply(error.code, error.headers, error.read())

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels; 0.0 if there are none."""
        text = self.ask("/metrics").body.decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def wait_for(self, path: str, status: int, seconds: float = 30.0) -> Reply:
        """Ask until the answer has this status."""
        end = time.monotonic() + seconds
        while True:
            reply = self.ask(path)
            if reply.status == status or time.monotonic() > end:
                assert reply.status == status, f"{path}: {reply} after {seconds} s"
                return reply
            time.sleep(0.05)

    def wait_until_idle(self, seconds: float = 30.0) -> None:
        """Nothing runs or waits, and no block is held by anybody."""
        names = (
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            "specserve:open_streams",
            "specserve:kv_slots_allocated",
        )
        end = time.monotonic() + seconds
        while any(values := [self.metric(name) for name in names]):
            assert time.monotonic() < end, dict(zip(names, values, strict=True))
            time.sleep(0.05)

    def children(self) -> list[tuple[int, str]]:
        """(process id, command line) of the processes the server started."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                status = (entry / "stat").read_text()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            # Until it runs its own program, a child looks like its parent.
            started = "specserve.process" in command or "tokenizer_worker" in command
            if started and int(status.rpartition(")")[2].split()[1]) == self.process.pid:
                found.append((int(entry.name), command))
        return found

    def engine_pid(self) -> int:
        (pid,) = [pid for pid, command in self.children() if "engine_main" in command]
        return pid

    def stop(self, timeout: float = 20.0) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)


@contextmanager
def start_server(model: Path, *flags: str, **env: str) -> Iterator[LiveServer]:
    """A server on a free port of 127.0.0.1; ready when it is handed out, gone afterwards."""
    with _process(model, "--port", "0", *flags, **env) as (process, log):
        yield LiveServer(process, _wait_for_url(process, log), log)


@contextmanager
def start_early(model: Path, *flags: str, **env: str) -> Iterator[LiveServer]:
    """The same, but handed out as soon as it answers, while its engine is still starting."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with _process(model, "--port", port, *flags, **env) as (process, log):
        server = LiveServer(process, f"http://127.0.0.1:{port}", log)
        end = time.monotonic() + 30
        while not _answers(server):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.02)
        yield server


@contextmanager
def _process(
    model: Path, *flags: str, **env: str
) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    """The command, and the file with what it says."""
    command = [sys.executable, "-m", "specserve.cli", "serve", str(model)]
    settings = ("--dtype", "float32", "--device", "cpu", "--kv-memory", "4MiB", "--threads", "1")
    # pytest tells the name of the running test, which may contain what a test looks for.
    inherited = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "server.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [*command, *settings, *flags],
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=inherited | {"OMP_NUM_THREADS": "1"} | env,
            )
        try:
            yield process, log
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def events(body: bytes) -> list[Any]:
    """The messages of an event stream, without the closing [DONE], which has to be there."""
    lines = [line for line in body.decode().split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]", body[-200:]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def _answers(server: LiveServer) -> bool:
    try:
        return server.ask("/health").status > 0
    except OSError:
        return False


def _wait_for_url(process: subprocess.Popen[bytes], log: Path, seconds: float = 60.0) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if match := _URL.search(log.read_text()):
            return match[1]
        time.sleep(0.02)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")


def _reply(status: int, headers: Any, body: bytes) -> Reply:
    return Reply(status, {name.lower(): value for name, value in headers.items()}, body)
