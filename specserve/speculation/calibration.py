"""Turns the acceptance probabilities that drafters estimate into observed acceptance rates.

The quality of the estimates differs between drafters, so observed rates replace them before trees
are merged: of all proposed nodes whose parent was emitted, verified or not.
"""

from typing import Final

from specserve_kernels.host import HOST, HostCode
from specserve_kernels.host.reference import Calibration

_MAX_DEPTH: Final = 4  # nodes at this depth or deeper share their counts
_PRIOR_RATIO: Final = 0.5  # acceptances per estimated acceptance, before anything was observed
_PRIOR_WEIGHT: Final = 4.0  # observations that a prior counts for
_MEMORY: Final = 256.0  # observations after which counts are halved, so that old ones fade


def new_calibration(host: HostCode = HOST) -> Calibration:
    """Rates of all drafters, without observations; greedy and sampled requests count apart.

    The prior of a rate is the drafter's estimate, times how often its nodes were accepted in
    relation to its estimates.
    """
    return host.Calibration(
        max_depth=_MAX_DEPTH,
        prior_ratio=_PRIOR_RATIO,
        prior_weight=_PRIOR_WEIGHT,
        memory=_MEMORY,
    )
