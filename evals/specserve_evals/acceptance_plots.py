"""Draws the plots of an acceptance run: tau by budget, acceptance by depth, tau by category.

python -m specserve_evals.acceptance_plots DIR     # of a run that was made with --no-plots

Needs matplotlib: pip install 'specserve[evals]'. Every plot has one panel per temperature and one
colour per draft.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from specserve_evals.acceptance_figures import OVERALL, CellResult, Report

PANEL_INCHES: Final = (6.0, 4.0)
INCHES_PER_BAR: Final = 0.15
DOTS_PER_INCH: Final = 150


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw the plots as PNG files in `folder`; returns the files written."""
    pictures: dict[str, Callable[[Axes, list[CellResult]], None]] = {
        "acceptance-tau.png": tau_by_budget,
        "acceptance-depth.png": reached_by_depth,
        "acceptance-categories.png": tau_by_category,
    }
    num_drafts = len(dict.fromkeys(cell.draft for cell in report.cells))
    for name, panel in pictures.items():
        temperatures = dict.fromkeys(cell.temperature for cell in report.cells)
        width, height = PANEL_INCHES
        if panel is tau_by_category:
            width = max(width, INCHES_PER_BAR * len(report.cells[0].figures) * num_drafts)
        figure = Figure(figsize=(width * len(temperatures), height), layout="constrained")
        panels = figure.subplots(1, len(temperatures), sharey=True, squeeze=False)[0]
        for axes, temperature in zip(panels, temperatures, strict=True):
            panel(axes, [cell for cell in report.cells if cell.temperature == temperature])
            axes.set_title(f"{axes.get_title()}temperature {temperature:g}")
            axes.grid(axis="y", alpha=0.3)
            axes.set_axisbelow(True)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
        figure.suptitle(f"{report.settings['target']}, {len(report.prompts)} prompts")
        figure.savefig(folder / name, dpi=DOTS_PER_INCH)
    return [folder / name for name in pictures]


def tau_by_budget(axes: Axes, cells: list[CellResult]) -> None:
    for draft, own in _by_draft(cells).items():
        taus = [cell.figures[OVERALL].tau for cell in own]
        axes.plot([cell.budget for cell in own], taus, marker="o", label=draft)
    axes.set_xticks(sorted({cell.budget for cell in cells}))
    axes.set_xlabel("budget: nodes per tree")
    axes.set_ylabel("tau: tokens per forward pass")


def reached_by_depth(axes: Axes, cells: list[CellResult]) -> None:
    """`Figures.reached` at the largest budget; `Figures.followed` as dashed lines."""
    for draft, own in _by_draft(cells).items():
        figures = own[-1].figures[OVERALL]
        depths = range(1, len(figures.reached) + 1)
        (line,) = axes.plot(depths, figures.reached, marker="o", label=draft)
        axes.plot(depths, figures.followed, linestyle="--", color=line.get_color(), alpha=0.6)
    deepest = max(len(cell.figures[OVERALL].reached) for cell in cells)
    axes.set_xlim(0.5, max(deepest, 4) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(0, 1)
    axes.set_title(f"budget {cells[-1].budget}, ")
    axes.set_xlabel("depth (dashed: of the trees accepted to the depth before)")
    axes.set_ylabel("fraction of trees accepted to this depth")


def tau_by_category(axes: Axes, cells: list[CellResult]) -> None:
    """tau at the largest budget."""
    drafts = _by_draft(cells)
    categories = list(cells[0].figures)
    bar = 0.8 / len(drafts)
    for index, (draft, own) in enumerate(drafts.items()):
        places = [place + (index - (len(drafts) - 1) / 2) * bar for place in range(len(categories))]
        taus = [own[-1].figures[category].tau for category in categories]
        axes.bar(places, taus, bar, label=draft)
    axes.set_xticks(range(len(categories)), categories, rotation=45, ha="right", fontsize="small")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_title(f"budget {cells[-1].budget}, ")
    axes.set_ylabel("tau: tokens per forward pass")


def _by_draft(cells: list[CellResult]) -> dict[str, list[CellResult]]:
    """The cells of each draft, in ascending order of budget."""
    grouped: dict[str, list[CellResult]] = {}
    for cell in sorted(cells, key=lambda cell: cell.budget):
        grouped.setdefault(cell.draft, []).append(cell)
    return {draft: grouped[draft] for draft in dict.fromkeys(cell.draft for cell in cells)}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 drawn; 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m specserve_evals.acceptance_plots",
        description="Draw the plots of a finished acceptance run.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="with its acceptance.json")
    folder = parser.parse_args(argv).folder
    try:
        report = msgspec.json.decode((folder / "acceptance.json").read_bytes(), type=Report)
    except (OSError, msgspec.DecodeError) as error:
        print(f"acceptance_plots: error: {folder}/acceptance.json: {error}", file=sys.stderr)
        return 2
    for file in draw(report, folder):
        print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
