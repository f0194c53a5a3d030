"""One run at a time in a directory: two would remove each other's state."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

LOCK: Final = ".running"


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """The directory, made if need be, is this run's. Raises ValueError if it is another's.

    A run that dies lets go of it, whatever became of the file.
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
                directory.rmdir()  # nothing came of it
