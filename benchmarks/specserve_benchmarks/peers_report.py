"""Summarises the runs of `peers`: tokens per second, ratios with their spread, tables.

A ratio is taken within one repeat, so that both engines ran at about the same time; the result is
the median over the repeats with the lowest and the highest.
"""

from collections.abc import Iterable, Sequence
from statistics import median

from msgspec import Struct

from specserve_evals import provenance


class Run(Struct, frozen=True):
    """One call of one engine. `group` is the prompt's category, a prompt length or a batch size."""

    engine: str
    group: str
    prompt: str
    repeat: int
    num_prompts: int
    num_tokens: int
    seconds: float


class Ratio(Struct, frozen=True):
    """Tokens per second / tokens per second of the baseline, over the repeats."""

    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lowest:.2f}-{self.highest:.2f})"


class Row(Struct, frozen=True):
    group: str
    engine: str
    tokens_per_s: float  # median of the repeats
    ratio: Ratio


class Roofline(Struct, frozen=True):
    """Plain decoding compared with its bound: a token needs at least one read of all weights."""

    weight_bytes: int
    bandwidth: float  # bytes per second, measured
    seconds_per_token: float  # of plain decoding after the first token, all host time included

    @property
    def share(self) -> float:
        """Time to read the weights once / time of one token; at most 1 in theory."""
        return self.weight_bytes / self.bandwidth / self.seconds_per_token


class Table(Struct, frozen=True):
    baseline: str
    rows: list[Row]


class Report(Struct, frozen=True):
    provenance: provenance.Provenance
    versions: dict[str, str]  # of every engine
    load_s: dict[str, float]
    same_start: dict[str, float]  # median number of first tokens that agree with plain specserve
    single: Table
    drafts: Table  # specserve's drafts, with plain specserve as the baseline
    ttft: Table
    batch: Table
    roofline: Roofline | None
    runs: list[Run]


EVERYTHING = "all"


def table(runs: Sequence[Run], baseline: str) -> Table:
    """One row for each engine in each group, and over all groups if there are several."""
    groups = list(dict.fromkeys(run.group for run in runs))
    result = []
    for group in [*groups, *([EVERYTHING] if len(groups) > 1 else [])]:
        own = [run for run in runs if group in (run.group, EVERYTHING)]
        base = _speeds(run for run in own if run.engine == baseline)
        for engine in dict.fromkeys(run.engine for run in own):
            speeds = _speeds(run for run in own if run.engine == engine)
            ratios = [speed / base[repeat] for repeat, speed in speeds.items()]
            spread = Ratio(median(ratios), min(ratios), max(ratios))
            result.append(Row(group, engine, median(speeds.values()), spread))
    return Table(baseline, result)


def _speeds(runs: Iterable[Run]) -> dict[int, float]:
    """Tokens per second of each repeat, pooled over its prompts."""
    tokens: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for run in runs:
        tokens[run.repeat] = tokens.get(run.repeat, 0) + run.num_tokens
        seconds[run.repeat] = seconds.get(run.repeat, 0.0) + run.seconds
    return {repeat: tokens[repeat] / seconds[repeat] for repeat in tokens}


def markdown(report: Report) -> str:
    parts = ["# Comparison with other engines", ""]
    sections = [
        ("One request at a time, tokens/s, prompt included", report.single),
        ("The same, what drafting gains", report.drafts),
        ("First tokens per second", report.ttft),
        ("Requests together, tokens/s, prompts included", report.batch),
    ]
    for title, section in sections:
        if section.rows:
            parts += [f"## {title}", "", *_lines(section), ""]
    if (roof := report.roofline) is not None:
        parts += [
            "## Roofline",
            "",
            f"{roof.weight_bytes / 1e6:.1f} MB of weights / {roof.bandwidth / 1e9:.1f} GB/s "
            f"measured = {roof.weight_bytes / roof.bandwidth * 1e3:.2f} ms; a token of plain "
            f"decoding takes {roof.seconds_per_token * 1e3:.2f} ms: {roof.share:.0%}.",
            "",
        ]
    parts += ["## Engines", ""]
    for engine, version in report.versions.items():
        line = f"- {engine} {version}, loaded in {report.load_s[engine]:.1f} s"
        if engine in report.same_start:
            line += f"; first {report.same_start[engine]:.0f} tokens as ours (median)"
        parts.append(line)
    return "\n".join([*parts, "", provenance.markdown(report.provenance), ""])


def _lines(table: Table) -> list[str]:
    engines = list(dict.fromkeys(row.engine for row in table.rows))
    cells = {(row.group, row.engine): row for row in table.rows}
    lines = [f"In brackets the ratio to {table.baseline}: median (lowest-highest).", ""]
    lines.append("| | " + " | ".join(engines) + " |")
    lines.append("|---" * (len(engines) + 1) + "|")
    for group in dict.fromkeys(row.group for row in table.rows):
        row = [cells[group, engine] for engine in engines]
        texts = [f"{cell.tokens_per_s:.1f} [{cell.ratio}]" for cell in row]
        lines.append(f"| {group} | " + " | ".join(texts) + " |")
    return lines
