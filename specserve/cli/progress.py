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
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), Elapsed())
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    tasks: dict[str, TaskID] = {}

    def report(stage: str, fraction: float) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=1.0)
            if not console.is_terminal:
                print(f"specserve: {stage}", file=sys.stderr, flush=True)
        bars.update(tasks[stage], completed=fraction)

    with bars:
        yield report
