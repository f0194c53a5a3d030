"""Summarises samples of offline generation: medians, ratios to plain decoding and their spread."""

from collections.abc import Callable, Sequence
from statistics import median

from msgspec import Struct
from rich.console import Console

from specserve_evals import provenance
from specserve_evals.progress import plain_table
from specserve_evals.runs import PLAIN

OVERALL = "(all)"
COLUMNS = (
    *("category", "batch", "draft", "requests", "tokens", "tokens/s", "TTFT", "TPOT"),
    *("tokens per pass", "accepted", "speedup", "TPOT speedup", "same ids"),
)
ON_SCREEN = ("category", "batch", "draft", "tokens/s", "TTFT", "TPOT", "tokens per pass", "speedup")


class Sample(Struct, frozen=True):
    """One run of one cell (category, batch, draft)."""

    category: str
    batch: int
    draft: str
    repeat: int
    seconds: float
    ids: tuple[tuple[int, ...], ...]  # per request
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]
    num_passes: int
    num_drafted: int
    num_accepted: int

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.ids))


class Ratio(Struct, frozen=True):
    """A ratio to `none`: that of the medians, and the least and the greatest of the repeats."""

    of_medians: float
    least: float
    greatest: float


class Row(Struct, frozen=True):
    category: str
    batch: int
    draft: str
    num_requests: int  # per repeat
    num_tokens: int  # per repeat
    tokens_per_s: float  # median of the repeats
    ttft_s: float | None  # medians over requests and repeats
    tpot_s: float | None
    tokens_per_pass: float
    acceptance: float | None  # accepted / drafted tokens
    speedup: Ratio | None  # tokens/s / tokens/s of `none`
    tpot_ratio: Ratio | None  # TPOT of `none` / TPOT; above 1 is faster than `none`
    same_ids: bool | None  # whether all token ids equal those of `none`


class Report(Struct, frozen=True):
    provenance: provenance.Provenance
    rows: tuple[Row, ...]


def summarise(samples: Sequence[Sample]) -> tuple[Row, ...]:
    """One row per cell, and one over all categories for each batch and draft."""
    everything = [*samples, *_overall(samples)]
    cells = dict.fromkeys((s.category, s.batch, s.draft) for s in everything)
    groups = {
        cell: [s for s in everything if (s.category, s.batch, s.draft) == cell] for cell in cells
    }
    return tuple(
        _row(group, groups.get((category, batch, PLAIN.name)))
        for (category, batch, _), group in groups.items()
    )


def _overall(samples: Sequence[Sample]) -> list[Sample]:
    """For each batch, draft and repeat, the samples of all categories joined into one."""
    keys = dict.fromkeys((s.batch, s.draft, s.repeat) for s in samples)
    return [_join([s for s in samples if (s.batch, s.draft, s.repeat) == key]) for key in keys]


def _join(parts: Sequence[Sample]) -> Sample:
    first = parts[0]
    return Sample(
        category=OVERALL,
        batch=first.batch,
        draft=first.draft,
        repeat=first.repeat,
        seconds=sum(part.seconds for part in parts),
        ids=sum((part.ids for part in parts), ()),
        ttft_s=sum((part.ttft_s for part in parts), ()),
        tpot_s=sum((part.tpot_s for part in parts), ()),
        num_passes=sum(part.num_passes for part in parts),
        num_drafted=sum(part.num_drafted for part in parts),
        num_accepted=sum(part.num_accepted for part in parts),
    )


def _row(group: Sequence[Sample], plain: Sequence[Sample] | None) -> Row:
    first = group[0]
    drafted = sum(sample.num_drafted for sample in group)
    against = None if first.draft == PLAIN.name else plain
    return Row(
        category=first.category,
        batch=first.batch,
        draft=first.draft,
        num_requests=len(first.ids),
        num_tokens=first.num_tokens,
        tokens_per_s=median(map(_speed, group)),
        ttft_s=_median([seconds for sample in group for seconds in sample.ttft_s]),
        tpot_s=_median([seconds for sample in group for seconds in sample.tpot_s]),
        tokens_per_pass=sum(s.num_tokens for s in group) / sum(s.num_passes for s in group),
        acceptance=sum(s.num_accepted for s in group) / drafted if drafted else None,
        speedup=_ratio(group, against, _speed),
        tpot_ratio=_ratio(group, against, _inverse_tpot),
        same_ids=None if against is None else _same_ids(group, against),
    )


def _speed(sample: Sample) -> float:
    return sample.num_tokens / sample.seconds


def _inverse_tpot(sample: Sample) -> float:
    """1 / median TPOT, in 1/s; 0 if no request has a second token."""
    return 1.0 / median(sample.tpot_s) if sample.tpot_s else 0.0


def _ratio(
    group: Sequence[Sample], plain: Sequence[Sample] | None, value: Callable[[Sample], float]
) -> Ratio | None:
    if plain is None or not all(map(value, plain)):
        return None
    each = [value(own) / value(other) for own, other in zip(group, plain, strict=True)]
    return Ratio(median(map(value, group)) / median(map(value, plain)), min(each), max(each))


def _same_ids(group: Sequence[Sample], plain: Sequence[Sample]) -> bool:
    return all(own.ids == other.ids for own, other in zip(group, plain, strict=True))


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def show(report: Report, console: Console) -> None:
    """Print the columns that fit a terminal; the files have all of them."""
    table = plain_table(*ON_SCREEN)
    for row in report.rows:
        cells = dict(zip(COLUMNS, _cells(row), strict=True))
        style = "bold" if row.category == OVERALL else None
        table.add_row(*(cells[name] for name in ON_SCREEN), style=style)
    console.print(table)


def markdown(report: Report) -> str:
    """The table with its provenance."""
    lines = ["# Offline generation", "", provenance.markdown(report.provenance), ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(_cells(row))} |" for row in report.rows]
    lines += [
        "",
        "tokens/s: output tokens per second of wall time, prompts included, median of the repeats.",
        "TTFT and TPOT: medians over requests. Speedups: ratios of the medians of tokens/s and",
        "TPOT to `none` (above 1 is faster), in brackets the lowest and the highest repeat.",
        "tokens per pass: emitted tokens per forward pass of the target. accepted: the fraction of",
        "drafted tokens that were accepted.",
        "",
    ]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    return [
        row.category,
        str(row.batch),
        row.draft,
        str(row.num_requests),
        str(row.num_tokens),
        f"{row.tokens_per_s:.1f}",
        "-" if row.ttft_s is None else f"{row.ttft_s * 1000:.0f} ms",
        "-" if row.tpot_s is None else f"{row.tpot_s * 1000:.1f} ms",
        f"{row.tokens_per_pass:.2f}",
        "-" if row.acceptance is None else f"{row.acceptance:.0%}",
        spread(row.speedup),
        spread(row.tpot_ratio),
        {None: "-", True: "yes", False: "NO"}[row.same_ids],
    ]


def spread(ratio: Ratio | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio.of_medians:.2f} ({ratio.least:.2f} - {ratio.greatest:.2f})"
