"""Terminal output of a long run: progress on stderr, tables on stdout."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Advance = Callable[[int, str], None]  # (items done since the last call, label of the current work)
LINE_EVERY_S: Final = 4.0  # least seconds between two lines where stderr is not a terminal
FILE_WIDTH: Final = 160  # columns where stdout is not a terminal


def stdout_console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=FILE_WIDTH)


def plain_table(*columns: str) -> Table:
    """A narrow table, without lines between its columns."""
    return Table(*columns, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)


@contextmanager
def track(total: int) -> Iterator[Advance]:
    """Show the progress of `total` items on stderr: a bar on a terminal, else occasional lines.

    Yields the function to call when items are done.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
        task = bars.add_task("", total=total)

        def advance(count: int, label: str) -> None:
            bars.update(task, advance=count, description=label)

        yield advance


class _Lines:
    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._last = time.monotonic()
        # (items done, time) after the first call, in which a resumed run reports the items of
        # earlier runs. The estimate of the time left excludes them.
        self._first: tuple[int, float] | None = None

    def __call__(self, count: int, label: str) -> None:
        now = time.monotonic()
        self._done += count
        if self._first is None:
            self._first = self._done, now
        if now - self._last >= LINE_EVERY_S:
            estimate = ""
            if done := self._done - self._first[0]:
                left = (now - self._first[1]) / done * (self._total - self._done)
                estimate = f", about {left / 60:.0f} min left"
            line = f"{self._done} of {self._total}{estimate}: {label}"
            print(line, file=sys.stderr, flush=True)
            self._last = now
