"""Incremental decoding of token ids, and incremental search for stop strings.

Invariant: the result does not depend on how the ids are split into calls, so the number of tokens
accepted per step never affects the text.
"""

from codecs import utf_8_decode
from collections.abc import Sequence
from functools import lru_cache

from specserve.text.tokenizer import Tokenizer

_LONGEST = 4  # bytes of the longest UTF-8 character


class IncrementalDecoder:
    """Decodes a stream of ids to text; incomplete characters are held back.

    `prompt` has the ids before the stream. After a prompt, a space at the beginning of the stream
    is kept, and a character that the prompt begins is completed.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, prompt: Sequence[int] = (), skip_special: bool = True
    ) -> None:
        self._detokenizer = tokenizer.detokenizer
        self._skipped = tokenizer.hidden_ids if skip_special else frozenset()
        self._begins = True  # whether the text has no bytes yet
        self._held = b""  # bytes of an incomplete character
        self._follow(prompt)

    def feed(self, ids: Sequence[int]) -> str:
        """Append `ids`; returns the text of all characters that are complete now."""
        shown = [index for index in ids if index not in self._skipped]
        data = self._detokenizer.join(shown, begins=self._begins)
        if self._begins:
            self._begins = not any(map(self._detokenizer.bytes_of, shown))
        return self._complete(data)

    def flush(self) -> str:
        """The text of the bytes still held back, as U+FFFD; call it at the end."""
        text, self._held = self._held.decode(errors="replace"), b""
        return text

    def num_given_up(self, token_id: int) -> int:
        """The number of U+FFFD that appear before the text of `token_id` if it comes next.

        The bytes held back become U+FFFD unless the token continues their character.
        """
        data = self._detokenizer.bytes_of(token_id) if self._held else b""
        if not data or token_id in self._skipped:
            return 0
        text, used = utf_8_decode(self._held + data[:1], "replace", False)
        completes = len(text) == 1 and used > len(self._held)
        return 0 if completes or not text else len(self._held.decode(errors="replace"))

    def _complete(self, data: bytes) -> str:
        data = self._held + data
        text, used = utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text

    def _follow(self, prompt: Sequence[int]) -> None:
        tail = b""
        for index in reversed(prompt):
            if index not in self._skipped:
                tail = self._detokenizer.bytes_of(index) + tail
            if len(tail) >= _LONGEST:
                break
        self._begins = not tail
        self._complete(tail)


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
