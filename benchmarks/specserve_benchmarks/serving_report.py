"""Summarises offline and served samples: tokens/s, time to first token, the server's cost."""

from collections.abc import Sequence
from statistics import median, quantiles

from msgspec import Struct
from rich.console import Console

from specserve_benchmarks.offline_report import Ratio, spread
from specserve_evals import provenance
from specserve_evals.progress import plain_table

COLUMNS = (
    *("concurrency", "requests", "tokens", "offline tok/s", "served tok/s", "served / offline"),
    *("offline TTFT p50", "p99", "served TTFT p50", "p99", "same ids"),
)


class Sample(Struct, frozen=True):
    """One run of one side at one concurrency."""

    concurrency: int
    side: str  # "offline" or "served"
    repeat: int
    seconds: float
    ids: tuple[tuple[int, ...], ...]  # per request
    ttft_s: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.ids)) / self.seconds


class Row(Struct, frozen=True):
    """Medians of the repeats; TTFT over all requests of all repeats, in seconds."""

    concurrency: int
    num_requests: int  # per repeat
    num_tokens: int  # per repeat
    offline_tokens_per_s: float
    served_tokens_per_s: float
    ratio: Ratio  # served / offline
    offline_ttft_s: tuple[float, float]  # p50, p99
    served_ttft_s: tuple[float, float]
    same_ids: bool


class Report(Struct, frozen=True):
    provenance: provenance.Provenance
    rows: tuple[Row, ...]


def summarise(samples: Sequence[Sample]) -> tuple[Row, ...]:
    """One row per concurrency."""
    return tuple(
        _row([sample for sample in samples if sample.concurrency == concurrency])
        for concurrency in dict.fromkeys(sample.concurrency for sample in samples)
    )


def _row(samples: Sequence[Sample]) -> Row:
    offline = [sample for sample in samples if sample.side == "offline"]
    served = [sample for sample in samples if sample.side == "served"]
    speeds = [median(s.tokens_per_s for s in side) for side in (offline, served)]
    each = [b.tokens_per_s / a.tokens_per_s for a, b in zip(offline, served, strict=True)]
    return Row(
        concurrency=offline[0].concurrency,
        num_requests=len(offline[0].ids),
        num_tokens=sum(map(len, offline[0].ids)),
        offline_tokens_per_s=speeds[0],
        served_tokens_per_s=speeds[1],
        ratio=Ratio(speeds[1] / speeds[0], min(each), max(each)),
        offline_ttft_s=_percentiles(offline),
        served_ttft_s=_percentiles(served),
        same_ids=all(a.ids == b.ids for a, b in zip(offline, served, strict=True)),
    )


def _percentiles(samples: Sequence[Sample]) -> tuple[float, float]:
    values = [seconds for sample in samples for seconds in sample.ttft_s]
    if len(values) == 1:
        return values[0], values[0]
    return median(values), quantiles(values, n=100, method="inclusive")[98]


def show(report: Report, console: Console) -> None:
    table = plain_table(*COLUMNS)
    for row in report.rows:
        table.add_row(*_cells(row))
    console.print(table)


def markdown(report: Report) -> str:
    """The table with its provenance."""
    lines = [
        "# The server compared with its engine",
        "",
        provenance.markdown(report.provenance),
        "",
    ]
    lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(_cells(row))} |" for row in report.rows]
    lines += [
        "",
        "tokens/s: output tokens by wall time, prompts included, median of the repeats; the ratio",
        "is of the medians, in brackets the least and the greatest of the repeats. TTFT: from",
        "sending a request to its first token, over all requests. The HTTP client runs on the same",
        "machine.",
        "",
    ]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    return [
        str(row.concurrency),
        str(row.num_requests),
        str(row.num_tokens),
        f"{row.offline_tokens_per_s:.1f}",
        f"{row.served_tokens_per_s:.1f}",
        spread(row.ratio),
        *(f"{1000 * s:.0f} ms" for s in (*row.offline_ttft_s, *row.served_ttft_s)),
        "yes" if row.same_ids else "NO",
    ]
