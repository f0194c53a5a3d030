"""The search of `suffix`: finds earlier occurrences of the last tokens and grows a tree from what
followed them.

A compiled version is used where it is built, see `specserve_kernels.host`. This file has the
reference implementation and all constants.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Protocol

from specserve.tree import DraftTree
from specserve_drafts.best_first import grow_best_first
from specserve_drafts.suffix.token_log import END, TokenLog
from specserve_kernels.dispatch import native_host

if TYPE_CHECKING:
    from specserve_kernels.host import _native

_MAX_MATCHES: Final = 32  # matches used per proposal; also positions checked per n-gram and log
_MAX_MATCHED: Final = 64  # the search stops once its matches have this many matched tokens in all
_WEIGHT_BASE: Final = 4.0  # factor in the weight of a match for each matched token
_PSEUDO_COUNT: Final = 1.0  # m matched tokens scale a probability by m / (m + _PSEUDO_COUNT)

_Match = tuple[float, int, Sequence[int]]  # weight, number of matched tokens, tokens that followed


class Log(Protocol):
    """Text that a `SuffixSearch` can search; made by its `new_log`."""

    def __len__(self) -> int: ...

    def extend(self, tokens: Sequence[int], /) -> None: ...


class SuffixSearch:
    """Searches logs for occurrences of a text's last tokens.

    sizes: lengths of the n-grams by which matches are found, descending; the last one is the
    shortest match. Nodes of a path probability below `min_probability` are not proposed.
    """

    def __init__(self, sizes: Sequence[int], min_probability: float) -> None:
        self._sizes = sizes
        self._min_probability = min_probability
        self._host = native_host()
        self._native: _native.SuffixSearch | None = None
        if self._host is not None:
            self._native = self._host.SuffixSearch(
                sizes,
                max_matches=_MAX_MATCHES,
                enough=_MAX_MATCHED,
                longer=_WEIGHT_BASE,
                doubt=_PSEUDO_COUNT,
                min_probability=min_probability,
            )

    def new_log(self) -> Log:
        """An empty log for this search: compiled if the search is, else a `TokenLog`."""
        log: Log = TokenLog(self._sizes) if self._host is None else self._host.TokenLog(self._sizes)
        return log

    def tree(
        self, logs: Sequence[Any], recent: Sequence[int], max_nodes: int, drafter_id: int
    ) -> DraftTree:
        """The tree of at most `max_nodes` nodes, root included.

        logs: made by `new_log`, in order of preference. recent: the text's last tokens, as many as
        may match; the last one is the root.
        """
        if self._native is not None:
            return DraftTree(*self._native.tree(logs, recent, max_nodes, drafter_id))
        matches = self._matches(logs, recent, max_nodes - 1)
        floor = self._min_probability
        return grow_best_first(recent[-1], matches, _branches, max_nodes, floor, drafter_id)

    def _matches(self, logs: Sequence[Any], recent: Sequence[int], length: int) -> list[_Match]:
        """Matches with the `length` tokens that followed them, those of long n-grams first."""
        found: list[_Match] = []
        # Matches of `limit` or more tokens were found by longer n-grams.
        backwards, limit, num_matched = recent[::-1], len(recent) + 1, 0
        for size in self._sizes:
            if size > len(recent):
                continue
            for log in logs:
                for position in islice(log.positions(recent[-size:]), _MAX_MATCHES):
                    matched = log.num_common(position, backwards)
                    if size <= matched < limit:
                        following = log.continuation(position, length)
                        found.append((_WEIGHT_BASE**matched, matched, following))
                        num_matched += matched
                        if num_matched >= _MAX_MATCHED or len(found) == _MAX_MATCHES:
                            return found
            limit = size
        return found


def _branches(matches: list[_Match], depth: int) -> Iterator[tuple[int, float, list[_Match]]]:
    """The tokens that follow at `depth`: token, conditional probability, the matches that have it.

    The probability is the token's fraction of the matches' weight, times m / (m + _PSEUDO_COUNT)
    with m the matched tokens of its matches, each of which has matched `depth` tokens more by now.
    """
    by_token: dict[int, list[_Match]] = {}
    for match in matches:
        by_token.setdefault(match[2][depth], []).append(match)
    by_token.pop(END, None)
    weights = [sum(match[0] for match in some) for some in by_token.values()]
    total = sum(weights)
    for (token, some), weight in zip(by_token.items(), weights, strict=True):
        num_matched = sum(match[1] + depth for match in some)
        yield token, weight * num_matched / (num_matched + _PSEUDO_COUNT) / total, some
