"""Turns the probabilities that drafters claim into observed acceptance rates.

A drafter estimates for each node how likely it is accepted once its parent is. These estimates
differ in quality between drafters, so they are replaced by rates observed so far before trees are
merged. All nodes of a proposal are counted whose parent was emitted, verified or not: the emitted
tokens tell what would have become of them. Knows no costs.
"""

from collections.abc import Sequence
from typing import Final

from specserve.tree import DraftTree
from specserve_kernels.host import HOST, HostCode

_MAX_DEPTH: Final = 4  # nodes at this depth or deeper share their counts
_PRIOR_RATIO: Final = 0.5  # acceptances per estimated acceptance, before anything was observed
_PRIOR_WEIGHT: Final = 4.0  # observations that a prior counts for
_MEMORY: Final = 256.0  # observations after which counts are halved, so that old ones fade


class Calibration:
    """Observed acceptance rates of all drafters.

    Every rate has the drafter's own estimate as its prior, times how often its nodes were accepted
    in relation to its estimates. Greedy and sampled requests are counted apart.
    """

    def __init__(self, host: HostCode = HOST) -> None:
        self._rates = host.Calibration(
            max_depth=_MAX_DEPTH,
            prior_ratio=_PRIOR_RATIO,
            prior_weight=_PRIOR_WEIGHT,
            memory=_MEMORY,
        )

    def merged(self, sampled: bool, trees: Sequence[DraftTree], max_nodes: int) -> DraftTree:
        """See `reference.Calibration.merged` of the host code."""
        return DraftTree(*self._rates.merged(sampled, trees, max_nodes))

    def record_outcome(
        self, sampled: bool, trees: Sequence[DraftTree], emitted: Sequence[int]
    ) -> None:
        """Count the nodes of the proposed `trees` whose parents were emitted."""
        self._rates.record_outcome(sampled, trees, emitted)
