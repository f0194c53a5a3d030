"""The search of `suffix`: finds earlier occurrences of the last tokens and grows a tree from what
followed them.
"""

from collections.abc import Sequence
from typing import Final

from specserve.tree import DraftTree
from specserve_kernels.host import HOST, HostCode
from specserve_kernels.host.reference import TokenLog

_MAX_MATCHES: Final = 32  # matches used per proposal; also positions checked per n-gram and log
_MAX_MATCHED: Final = 64  # the search stops once its matches have this many matched tokens in all
_WEIGHT_BASE: Final = 4.0  # factor in the weight of a match for each matched token
_PSEUDO_COUNT: Final = 1.0  # m matched tokens scale a probability by m / (m + _PSEUDO_COUNT)


class SuffixSearch:
    """Searches logs for occurrences of a text's last tokens.

    sizes: lengths of the n-grams by which matches are found, descending; the last one is the
    shortest match. Nodes of a path probability below `min_probability` are not proposed.
    """

    def __init__(self, sizes: Sequence[int], min_probability: float, host: HostCode = HOST) -> None:
        self._sizes = sizes
        self._host = host
        self._search = host.SuffixSearch(
            sizes,
            max_matches=_MAX_MATCHES,
            max_matched=_MAX_MATCHED,
            weight_base=_WEIGHT_BASE,
            pseudo_count=_PSEUDO_COUNT,
            min_probability=min_probability,
        )

    def new_log(self) -> TokenLog:
        """An empty log for this search."""
        return self._host.TokenLog(self._sizes)

    def tree(self, logs: Sequence[TokenLog], recent: Sequence[int], max_nodes: int) -> DraftTree:
        """The tree of at most `max_nodes` nodes, root included.

        logs: made by `new_log`, in order of preference. recent: the text's last tokens, as many as
        may match; the last one is the root.
        """
        return DraftTree(*self._search.tree(logs, recent, max_nodes))
