"""Runs an engine in a child process with a Python interpreter of its own.

Owns starting the child, sending it requests and ending it. Invariants: one request at a time; a
child that dies raises PeerError, which shows the end of the child's stderr.
"""

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec
from msgspec import Struct

T = TypeVar("T")


class Ready(Struct, frozen=True):
    version: str
    load_s: float


class Answer(Struct, frozen=True):
    tokens: tuple[tuple[int, ...], ...]
    seconds: float


class PeerError(ValueError):
    """A child process could not start, or it died."""


class Peer:
    """The engine `name`: the module `run_{program}` of `peer_children`, run by `python`.

    `settings` go to the child as JSON, `environment` is added to this process's environment
    variables. The constructor waits until the engine is loaded; it raises PeerError if that fails.
    """

    def __init__(
        self,
        name: str,
        program: str,
        python: Path,
        settings: Mapping[str, Any],
        environment: Mapping[str, str],
    ) -> None:
        self.name = name
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name, "log")
        command = [str(python), "-m", f"specserve_benchmarks.peer_children.run_{program}"]
        try:
            with self._log.open("w", encoding="utf-8") as log:
                self._process = subprocess.Popen(
                    [*command, msgspec.json.encode(settings).decode()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env={**os.environ, **environment},
                )
        except OSError as error:
            self._folder.cleanup()
            raise PeerError(
                f"{name}: {python} cannot be run ({error.strerror}); give the Python of the "
                f"environment that has it"
            ) from error
        try:
            self.ready = self._read(Ready)
        except PeerError:
            self.close()
            raise

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Answer:
        """Generate `max_tokens` tokens for each prompt, given as token ids.

        `Answer.seconds` is the time for all prompts together. Raises PeerError if the child died.
        """
        assert self._process.stdin is not None
        request = {"prompts": [list(ids) for ids in prompts], "max_tokens": max_tokens}
        try:
            self._process.stdin.write(msgspec.json.encode(request) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the child has died: `_read` raises PeerError
        return self._read(Answer)

    def _read(self, kind: type[T]) -> T:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            last = "\n".join(self._log.read_text(encoding="utf-8").splitlines()[-12:])
            raise PeerError(f"{self.name}: its process ended with {code}:\n{last}")
        return msgspec.json.decode(line, type=kind)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
