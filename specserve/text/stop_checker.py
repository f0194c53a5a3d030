"""Incremental search for stop strings. How the text is split into calls does not matter."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat


class StopChecker:
    """Finds the first of several strings in a growing text (Knuth, Morris, Pratt 1977).

    The first is the one that ends first; of several that end together it is the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # characters of each that the text ends with

    def feed(self, text: str) -> int | None:
        """Append `text`; returns the index of the first stop string that ends in it, or None."""
        found = None
        for character in text:
            matched = map(_advance, self._stops, self._borders, self._matched, repeat(character))
            self._matched = list(matched)
            complete = [i for i, stop in enumerate(self._stops) if self._matched[i] == len(stop)]
            if complete and found is None:
                found = max(complete, key=lambda i: len(self._stops[i]))
        return found

    @property
    def num_held(self) -> int:
        """The number of characters at the end of the text that may begin a stop string."""
        rows = zip(self._stops, self._borders, self._matched, strict=True)
        return max((borders[n] if n == len(stop) else n for stop, borders, n in rows), default=0)


@lru_cache(maxsize=512)  # all choices of a request, up to 128, share the stop strings
def _borders(stop: str) -> tuple[int, ...]:
    """For each prefix of `stop`, the length of its longest proper prefix that also ends it."""
    borders = [0] * (len(stop) + 1)
    for end in range(1, len(stop)):
        borders[end + 1] = _advance(stop, borders, borders[end], stop[end])
    return tuple(borders)


def _advance(stop: str, borders: Sequence[int], matched: int, character: str) -> int:
    while matched and (matched == len(stop) or stop[matched] != character):
        matched = borders[matched]
    return matched + (stop[matched] == character)
