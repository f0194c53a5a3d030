"""The directory of a run: a lock on it, and the progress from which the run is resumed."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct

STATE: Final = "state.json"
LOCK: Final = ".running"


class RunState(Struct, frozen=True):
    settings: dict[str, Any]  # those that must not change on resuming


State = TypeVar("State", bound=RunState)


def open_state(kind: type[State], out: Path, settings: dict[str, Any], *, resume: bool) -> State:
    """The state of the run in `out`, or of a new run, which is not written yet.

    Raises ValueError if the state cannot be read or was made with other settings, or if a new run
    finds another one in `out`.
    """
    path = out / STATE
    if not resume:
        if path.exists():
            raise ValueError(f"out: {out} holds a run; add --resume, or give another directory")
        return kind(settings)
    try:
        state = msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f"resume: {path} cannot be read: {error}") from error
    for name, value in settings.items():
        if (before := state.settings.get(name)) != value:
            raise ValueError(f"{name}: {value!r} goes on with a run that had {before!r}; leave it")
    return state


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Hold an exclusive lock on `directory`, which is created if missing: two runs in it would
    remove each other's state.

    Raises ValueError if another run holds the lock, or if the directory cannot be used. The system
    releases the lock when a process dies, even if the lock file remains.
    """
    path = directory / LOCK
    if "," in str(directory):
        raise ValueError(f"out: {directory} has a comma, which --draft takes as the end of a name")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"out: {directory} cannot be used: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"out: another run is at work in {directory}; wait for its end, or give another"
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                directory.rmdir()  # succeeds only if the run left nothing in it
