"""Text as it grows: ids to text piece by piece, and watching it for stop strings.

Both give the same answer however the stream is cut into pieces, so that the number of tokens a
step accepts never shows in the text.
"""

from collections.abc import Sequence

from specserve.text.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"  # how a decoder shows bytes that are no character, or not yet
_CONTEXT = 8  # ids kept: more than the 4 bytes of a character, and what a decoder looks back at
_WINDOW = 4 * _CONTEXT
_MAX_HELD = 3  # bytes of a character that is not complete


class IncrementalDecoder:
    """Turns ids into text as they come, without ever showing half a character.

    Only the last few ids are decoded again, so a token costs the same at any length.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._window: list[int] = []
        self._num_shown = 0  # characters of the window's text that were given out

    def feed(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete."""
        self._window += [index for index in ids if index not in self._skipped]
        text = self._tokenizer.decode(self._window, skip_special=False)
        # The end may be the start of a character whose bytes are still to come. Some decoders show
        # it as one U+FFFD, some as one per byte, so a whole run is held back, but not for ever.
        num_held = len(text) - len(text.rstrip(_INCOMPLETE))
        if len(self._window) > _WINDOW:
            num_held = min(num_held, _MAX_HELD)
        complete = len(text) - num_held
        piece = text[self._num_shown : complete]
        self._num_shown = max(self._num_shown, complete)
        if len(self._window) > _WINDOW:
            num_left = len(text) - self._num_shown
            del self._window[:-_CONTEXT]
            text = self._tokenizer.decode(self._window, skip_special=False)
            self._num_shown = max(0, len(text) - num_left)
        return piece

    def flush(self) -> str:
        """The rest, at the end: bytes that never became a character."""
        text = self._tokenizer.decode(self._window, skip_special=False)
        piece = text[self._num_shown :]
        self._num_shown = len(text)
        return piece


class StopChecker:
    """Finds the first of several strings in a growing text (Knuth, Morris, Pratt 1977).

    First means ending first; of those that end together, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # how much of each the text ends with

    def feed(self, text: str) -> int | None:
        """Watch more text; the index of the stop string found in it, or None."""
        found = None
        for character in text:
            self._matched = [
                _advance(stop, borders, matched, character)
                for stop, borders, matched in zip(
                    self._stops, self._borders, self._matched, strict=True
                )
            ]
            complete = [i for i, stop in enumerate(self._stops) if self._matched[i] == len(stop)]
            if complete and found is None:
                found = max(complete, key=lambda i: len(self._stops[i]))
        return found

    def safe_length(self, text: str) -> int:
        """How much of `text` can be shown: all but an end that may grow into a stop string."""
        held = 0
        for stop, borders in zip(self._stops, self._borders, strict=True):
            matched = 0
            for character in text[len(text) - min(len(text), len(stop) - 1) :]:
                matched = _advance(stop, borders, matched, character)
            held = max(held, matched)
        return len(text) - held


def _borders(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that also ends it."""
    borders = [0] * (len(stop) + 1)
    for end in range(1, len(stop)):
        borders[end + 1] = _advance(stop, borders, borders[end], stop[end])
    return borders


def _advance(stop: str, borders: list[int], matched: int, character: str) -> int:
    while matched and (matched == len(stop) or stop[matched] != character):
        matched = borders[matched]
    return matched + (stop[matched] == character)
