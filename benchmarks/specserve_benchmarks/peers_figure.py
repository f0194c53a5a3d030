"""Draws the results of `peers`: tokens per second of every engine.

python -m specserve_benchmarks.peers_figure RESULT.json FIGURE.png

Needs matplotlib (`pip install -e '.[evals]'`).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from specserve_benchmarks.peers_report import EVERYTHING, Report

_OURS: Final = "#c0392b"
_OTHERS: Final = "#8a8f98"
_SIZE: Final = (9.0, 2.8)  # inches
_DPI: Final = 150


def draw(report: Report, out: Path) -> None:
    """Left: one request at a time. Right, if measured: several requests together."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2 if report.batch.rows else 1, figsize=_SIZE, squeeze=False)
    single = {row.engine: row.tokens_per_s for row in report.single.rows if row.group == EVERYTHING}
    names = sorted(single, key=single.__getitem__)
    axis = axes[0][0]
    axis.barh(names, [single[name] for name in names], color=[_color(name) for name in names])
    axis.bar_label(axis.containers[0], fmt="%.0f", padding=3)
    axis.margins(x=0.15)
    axis.set_title("one request at a time, tokens/s", fontsize=10)
    if report.batch.rows:
        rows = [row for row in report.batch.rows if row.group != EVERYTHING]
        for engine in dict.fromkeys(row.engine for row in rows):
            own = [row for row in rows if row.engine == engine]
            style = "--" if engine.endswith("none") else "-"
            axes[0][1].plot(
                [row.group.removeprefix("batch ") for row in own],
                [row.tokens_per_s for row in own],
                style,
                marker="o",
                color=_color(engine),
                label=engine,
            )
        axes[0][1].set_ylim(bottom=0)
        axes[0][1].set_xlabel("requests together")
        axes[0][1].set_title("tokens/s", fontsize=10)
        axes[0][1].legend(frameon=False, fontsize=8)
    for each in axes[0]:
        each.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out, dpi=_DPI)


def _color(engine: str) -> str:
    return _OURS if engine.startswith("specserve") else _OTHERS


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m specserve_benchmarks.peers_figure",
        description="Draw the results of specserve_benchmarks.peers.",
        allow_abbrev=False,
    )
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument("out", type=Path, metavar="FIGURE.png")
    args = parser.parse_args(argv)
    draw(msgspec.json.decode(args.result.read_bytes(), type=Report), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
