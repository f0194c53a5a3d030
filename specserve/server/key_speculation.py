"""Speculation totals per API key: the only speculation figures shown to a key without `metrics`.

Totals of the whole engine would reveal to one key how many tokens each forward pass of another
key's requests accepted, and so something about their content (arXiv 2411.01076).
"""

from dataclasses import dataclass

from specserve.types import SpecStats


@dataclass(slots=True)
class KeyTotals:
    """Counts over a key's finished requests. `num_drafts`: verifications of drafted nodes."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    def add(self, stats: SpecStats) -> None:
        """Count one finished sequence."""
        self.num_drafts += stats.drafted_by_depth[0] if stats.drafted_by_depth else 0
        self.num_draft_tokens += stats.num_draft_tokens
        self.num_accepted_tokens += stats.num_accepted_draft_tokens
