"""A lock on a run's directory: two runs in one directory would remove each other's state."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

LOCK: Final = ".running"


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Hold an exclusive lock on `directory`, which is created if missing.

    Raises ValueError if another run holds the lock, or if the directory cannot be used. The system
    releases the lock when a process dies, even if the lock file remains.
    """
    path = directory / LOCK
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
