"""Shows progress on stderr: a bar per stage on a terminal, else one line per stage."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Report = Callable[[str, float], None]  # (stage, fraction done: 0 to 1)


@contextmanager
def show_progress() -> Iterator[Report]:
    """Yields the function that reports progress. Bars are removed at the end of the context.

    The library that draws them is imported at the first report: mostly there is nothing to wait
    for.
    """
    tasks: dict[str, TaskID] = {}
    bars: Progress | None = None
    with ExitStack() as stack:

        def report(stage: str, fraction: float) -> None:
            nonlocal bars
            if bars is None:
                bars = stack.enter_context(_bars())
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=1.0)
                if bars.disable:
                    print(f"specserve: {stage}", file=sys.stderr, flush=True)
            bars.update(tasks[stage], completed=fraction)

        yield report


def _bars() -> "Progress":
    """Bars that are disabled where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    return Progress(
        *(*columns, TimeElapsedColumn()),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
