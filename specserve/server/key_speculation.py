"""Speculation totals per API key: the only speculation figures shown to a key without `metrics`.

Totals of the whole engine would reveal to one key how many tokens each forward pass of another
key's requests accepted, and so something about their content (arXiv 2411.01076).
"""

from dataclasses import dataclass

from specserve.types import SpecStats


@dataclass(slots=True)
class KeyTotals:
    """Counts over finished requests. `num_drafts`: forward passes that verified drafted nodes."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


class KeySpeculation:
    """The totals by key. Their number is bounded by the number of API keys."""

    def __init__(self) -> None:
        self._totals: dict[str, KeyTotals] = {}

    def add(self, key: str, stats: SpecStats) -> None:
        """Count one finished sequence."""
        totals = self._totals.setdefault(key, KeyTotals())
        totals.num_drafts += stats.drafted_by_depth[0] if stats.drafted_by_depth else 0
        totals.num_draft_tokens += stats.num_draft_tokens
        totals.num_accepted_tokens += stats.num_accepted_draft_tokens

    def of(self, key: str) -> KeyTotals:
        return self._totals.get(key, KeyTotals())
