"""What followed the last tokens wherever they occurred before, as a tree.

Compiled where that is built, see `specserve_kernels.host`; the twin and all numbers are here.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Protocol

from specserve.tree import DraftTree
from specserve_drafts.best_first import grow_best_first
from specserve_drafts.token_log import END, TokenLog
from specserve_kernels.dispatch import native_host

if TYPE_CHECKING:
    from specserve_kernels.host import _native

_MAX_MATCHES: Final = 32  # counted per proposal, and looked at per n-gram and log
_ENOUGH: Final = 64  # tokens matched, over all matches, that tell what others would
_LONGER: Final = 4.0  # a match longer by a token weighs as much as this many
_DOUBT: Final = 1.0  # matched tokens that leave a continuation as likely right as wrong

_Match = tuple[float, int, Seq[int]]  # weight, matched tokens, what followed


class Log(Protocol):
    """What is searched; made by the search that reads it."""

    def __len__(self) -> int: ...

    def extend(self, tokens: Seq[int], /) -> None: ...


class SuffixSearch:
    """`sizes`: lengths of the n-grams matches are found by, falling; the last is what must match.

    Paths less likely than `min_probability` are left out.
    """

    def __init__(self, sizes: Seq[int], min_probability: float) -> None:
        self._sizes = sizes
        self._min_probability = min_probability
        self._host = native_host()
        self._native: _native.SuffixSearch | None = None
        if self._host is not None:
            self._native = self._host.SuffixSearch(
                sizes,
                max_matches=_MAX_MATCHES,
                enough=_ENOUGH,
                longer=_LONGER,
                doubt=_DOUBT,
                min_probability=min_probability,
            )

    def new_log(self) -> Log:
        """Of the kind that this search reads, compiled or not."""
        log: Log = TokenLog(self._sizes) if self._host is None else self._host.TokenLog(self._sizes)
        return log

    def tree(self, logs: Seq[Any], recent: Seq[int], max_nodes: int, source: int) -> DraftTree:
        """logs: made by `new_log`. recent: the text's last tokens, as many as may match; the very
        last is the root."""
        if self._native is not None:
            return DraftTree(*self._native.tree(logs, recent, max_nodes, source))
        matches = self._matches(logs, recent, max_nodes - 1)
        floor = self._min_probability
        return grow_best_first(recent[-1], matches, _branches, max_nodes, floor, source)

    def _matches(self, logs: Seq[Any], recent: Seq[int], length: int) -> list[_Match]:
        """Matches and the `length` tokens that followed, those by long n-grams first."""
        found: list[_Match] = []
        backwards, known, seen = recent[::-1], len(recent) + 1, 0
        for size in self._sizes:
            if size > len(recent):
                continue
            for log in logs:
                for position in islice(log.positions(recent[-size:]), _MAX_MATCHES):
                    matched = log.common(position, backwards)
                    if size <= matched < known:  # the others were found by longer n-grams
                        found.append((_LONGER**matched, matched, log.follow(position, length)))
                        seen += matched
                        if seen >= _ENOUGH or len(found) == _MAX_MATCHES:
                            return found
            known = size
        return found


def _branches(matches: list[_Match], depth: int) -> Iterator[tuple[int, float, list[_Match]]]:
    """Per token that the matches have at `depth`: how likely it is, and the matches that have it.

    The share of their weights, discounted for the little that may have been seen; whoever comes
    to this depth has matched `depth` tokens more.
    """
    followers: dict[int, list[_Match]] = {}
    for match in matches:
        followers.setdefault(match[2][depth], []).append(match)
    followers.pop(END, None)
    weights = [sum(match[0] for match in having) for having in followers.values()]
    total = sum(weights)
    for (token, having), weight in zip(followers.items(), weights, strict=True):
        seen = sum(match[1] + depth for match in having)
        yield token, weight * seen / (seen + _DOUBT) / total, having
