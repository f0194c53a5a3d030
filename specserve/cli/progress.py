"""Shows progress on stderr: a bar per stage on a terminal, else one line per stage."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed

Report = Callable[[str, float], None]  # (stage, fraction done: 0 to 1)


@contextmanager
def show_progress() -> Iterator[Report]:
    """Yields the function that reports progress. Bars are removed at the end of the context."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _StageLines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), Elapsed())
    with Progress(*columns, console=console, transient=True) as bars:
        yield _Bars(bars)


class _Bars:
    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, fraction: float) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=1.0)
        self._bars.update(self._tasks[stage], completed=fraction)


class _StageLines:
    def __init__(self) -> None:
        self._last: str | None = None

    def __call__(self, stage: str, fraction: float) -> None:
        if stage != self._last:
            print(f"specserve: {stage}", file=sys.stderr, flush=True)
            self._last = stage
