"""Suffix search: a tree of the tokens that followed earlier occurrences of a text's last tokens."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice

from specserve_kernels.host.interface import END, TreeFields
from specserve_kernels.host.reference.token_log import TokenLog
from specserve_kernels.host.reference.tree import grow_best_first

_Match = tuple[float, int, Sequence[int]]  # weight, number of matched tokens, tokens that followed


class SuffixSearch:
    """Finds earlier occurrences of a text's last tokens.

    sizes: n-gram lengths, descending. max_matches: matches used per proposal; also positions
    checked per n-gram and log. The search stops once its matches have `max_matched` matched tokens
    in all. A match of n tokens has the weight weight_base ** n. m matched tokens scale a
    probability by m / (m + pseudo_count).
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        max_matches: int,
        max_matched: int,
        weight_base: float,
        pseudo_count: float,
        min_probability: float,
    ) -> None:
        self._sizes = sizes
        self._max_matches = max_matches
        self._max_matched = max_matched
        self._weight_base = weight_base
        self._pseudo_count = pseudo_count
        self._min_probability = min_probability

    def tree(
        self, logs: Sequence[TokenLog], recent: Sequence[int], max_nodes: int, /
    ) -> TreeFields:
        """A tree of the tokens that followed `recent` in `logs`: at most `max_nodes` nodes.

        logs: of the same host code, in order of preference. recent: the text's last tokens, as many
        as may match; the last one is the root.
        """
        matches = self._matches(logs, recent, max_nodes - 1)
        expand = partial(_branches, self._pseudo_count)
        return grow_best_first(recent[-1], matches, expand, max_nodes, self._min_probability)

    def _matches(
        self, logs: Sequence[TokenLog], recent: Sequence[int], length: int
    ) -> list[_Match]:
        """Matches with the `length` tokens that followed them, those of long n-grams first."""
        found: list[_Match] = []
        # Matches of `limit` or more tokens were found by longer n-grams.
        backwards, limit, num_matched = recent[::-1], len(recent) + 1, 0
        for size in self._sizes:
            if size > len(recent):
                continue
            for log in logs:
                for position in islice(log.positions(recent[-size:]), self._max_matches):
                    matched = log.num_common(position, backwards)
                    if size <= matched < limit:
                        following = log.continuation(position, length)
                        found.append((self._weight_base**matched, matched, following))
                        num_matched += matched
                        if num_matched >= self._max_matched or len(found) == self._max_matches:
                            return found
            limit = size
        return found


def _branches(
    pseudo_count: float, matches: list[_Match], depth: int
) -> Iterator[tuple[int, float, list[_Match]]]:
    """The tokens that follow at `depth`: token, conditional probability, the matches that have it.

    The probability is the token's fraction of the matches' weight, times m / (m + pseudo_count)
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
        yield token, weight * num_matched / (num_matched + pseudo_count) / total, some
