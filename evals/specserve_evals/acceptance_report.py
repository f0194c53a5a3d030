"""Renders an acceptance run as tables: on a terminal, and in Markdown with its provenance."""

from collections.abc import Iterator
from typing import Final

from msgspec import Struct
from rich.console import Console

from specserve_evals import provenance
from specserve_evals.acceptance_figures import OVERALL, CellResult, Figures, Report
from specserve_evals.progress import plain_table

MAX_DEPTHS: Final = 10  # depths in a table; the JSON file has all of them
ON_SCREEN: Final = 10  # columns of the summary that fit a terminal
NOTES: Final = """\
- tau: emitted tokens per forward pass of the target, its own token included. Ratios are pooled:
  sums over all forward passes are divided. Those that only compute a part of a prompt do not count.
  In brackets: tokens/s relative to plain decoding of the same prompts by the same engine without
  its drafters; the two run in turn.
- accepted: the fraction of the verified drafted nodes that were accepted.
- draft, verify, host: milliseconds per forward pass, from the first text of an answer on. "verify"
  is the forward pass of the target with its sampling, "host" the remaining time.
- tokens/s: from submission to the last token, prompt included; decoding: from the first text on.
- speedup: tokens/s relative to plain decoding.
- By depth: the fraction of drafted trees of which at least that many tokens were accepted. In
  brackets: the same fraction of the trees of which at least one token fewer was accepted. Trees
  that have no node at this depth count in both."""


class Grid(Struct, frozen=True):
    """A table, independent of the output format. A terminal shows the `OVERALL` rows in bold."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def show(report: Report, console: Console) -> None:
    for grid in category_grids(report):
        _show_grid(grid, len(grid.columns), console)
    _show_grid(summary(report), ON_SCREEN, console)


def markdown(report: Report) -> str:
    blocks = ["# Acceptance", provenance.markdown(report.provenance)]
    if report.passed_over:
        blocks.append(f"Skipped because too long: prompts {', '.join(report.passed_over)}.")
    grids = [summary(report), *category_grids(report), by_depth(report), *by_drafter(report)]
    blocks += [f"## {grid.title}\n\n{_markdown_table(grid)}" for grid in grids]
    return "\n\n".join([*blocks, NOTES]) + "\n"


def summary(report: Report) -> Grid:
    """One row per cell, over all prompts."""
    columns = (
        *("draft", "temp", "budget", "tau", "accepted", "draft ms", "verify ms"),
        *("host ms", "tokens/s", "speedup", "decoding", "decoding speedup", "tokens"),
    )
    return Grid("All prompts", columns, tuple(_summary_row(cell) for cell in report.cells))


def category_grids(report: Report) -> Iterator[Grid]:
    """One table per temperature and budget: tau by category and draft."""
    for temperature, budget in dict.fromkeys((c.temperature, c.budget) for c in report.cells):
        cells = [c for c in report.cells if (c.temperature, c.budget) == (temperature, budget)]
        yield Grid(
            f"tau by category: temperature {temperature:g}, budget {budget}",
            ("category", "prompts", *(cell.draft for cell in cells)),
            tuple(
                (category, str(figures.num_prompts), *(_tau(c.figures[category]) for c in cells))
                for category, figures in cells[0].figures.items()
            ),
        )


def by_depth(report: Report) -> Grid:
    overall = [cell.figures[OVERALL] for cell in report.cells]
    deepest = min(MAX_DEPTHS, max(len(figures.reached) for figures in overall))
    rows = []
    for cell, figures in zip(report.cells, overall, strict=True):
        pairs = list(zip(figures.reached, figures.followed, strict=True))[:deepest]
        shares = [f"{reached:.0%} ({followed:.0%})" for reached, followed in pairs]
        rows.append((*_key(cell), *shares, *["-"] * (deepest - len(shares))))
    columns = ("draft", "temp", "budget", *map(str, range(1, deepest + 1)))
    return Grid("Accepted by depth", columns, tuple(rows))


def by_drafter(report: Report) -> Iterator[Grid]:
    """Accepted tokens by drafter: one table for each draft that merges several drafters."""
    for draft in dict.fromkeys(cell.draft for cell in report.cells if len(cell.drafters) > 1):
        cells = [cell for cell in report.cells if cell.draft == draft]
        yield Grid(
            f"Accepted by drafter: {draft}",
            ("draft", "temp", "budget", *cells[0].drafters),
            tuple((*_key(cell), *_drafter_shares(cell.figures[OVERALL])) for cell in cells),
        )


def _key(cell: CellResult) -> tuple[str, str, str]:
    return cell.draft, f"{cell.temperature:g}", str(cell.budget)


def _summary_row(cell: CellResult) -> tuple[str, ...]:
    figures = cell.figures[OVERALL]
    return (
        *_key(cell),
        f"{figures.tau:.2f}",
        _format(figures.accepted, "{:.0%}"),
        _format(figures.draft_ms, "{:.2f}"),
        _format(figures.verify_ms, "{:.2f}"),
        _format(figures.host_ms, "{:.2f}"),
        f"{figures.tokens_per_s:.1f}",
        f"{figures.speedup:.2f}x",
        _format(figures.decode_tokens_per_s, "{:.1f}"),
        _format(figures.decode_speedup, "{:.2f}x"),
        str(figures.stats.num_emitted_tokens),
    )


def _tau(figures: Figures) -> str:
    return f"{figures.tau:.2f} ({figures.speedup:.2f}x)"


def _drafter_shares(figures: Figures) -> list[str]:
    total = sum(figures.accepted_by_drafter)
    return [f"{n} ({n / total:.0%})" if total else "0" for n in figures.accepted_by_drafter]


def _format(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _show_grid(grid: Grid, num_columns: int, console: Console) -> None:
    table = plain_table(*grid.columns[:num_columns])
    for row in grid.rows:
        table.add_row(*row[:num_columns], style="bold" if row[0] == OVERALL else None)
    console.print(f"\n{grid.title}", table, sep="\n")


def _markdown_table(grid: Grid) -> str:
    rows = [grid.columns, ("---",) * len(grid.columns), *grid.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
