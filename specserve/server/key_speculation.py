"""What speculation did for the requests of each API key: all that one key may learn about it.

Totals of the whole engine would tell a key how many tokens each forward pass of another key's
requests accepted, and that tells their content (arXiv 2411.01076).
"""

from dataclasses import dataclass

from specserve.types import SpecStats


@dataclass(slots=True)
class KeyTotals:
    """Of finished requests. `num_drafts` counts forward passes that had drafted nodes to verify."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


class KeySpeculation:
    """The totals by key; there are as many as the server has keys."""

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
