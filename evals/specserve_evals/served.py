"""Runs `specserve serve` in a child process inside a `with` block."""

import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from msgspec import Struct

_URL: Final = re.compile(r" at (http\S+)")
_START_S: Final = 300.0  # seconds within which the server must become ready
_STOP_S: Final = 60.0  # seconds from SIGTERM to SIGKILL


class Served(Struct, frozen=True):
    url: str
    pid: int  # of the HTTP process


@contextmanager
def serve(target: str, flags: Sequence[str] = ()) -> Iterator[Served]:
    """Start a server on a free port, yield once it is ready, and stop it at the end.

    Raises RuntimeError, with the end of the server's output, if it does not become ready.
    """
    command = [sys.executable, "-m", "specserve.cli", "serve", target, "--port", "0", *flags]
    with _terminable(), tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield Served(_wait_until_ready(process, log.fileno()), process.pid)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that the server is stopped before this process ends."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait_until_ready(process: "subprocess.Popen[bytes]", log: int) -> str:
    end = time.monotonic() + _START_S
    said = ""
    while process.poll() is None and time.monotonic() < end:
        said = Path(f"/proc/self/fd/{log}").read_text(encoding="utf-8", errors="replace")
        match = _URL.search(said)
        if match is not None and _ready(match[1]):
            return match[1]
        time.sleep(0.1)
    raise RuntimeError(f"the server did not become ready:\n{said[-2000:]}")


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5):
            return True
    except (urllib.error.URLError, TimeoutError):
        return False
