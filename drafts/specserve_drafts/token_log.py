"""Text that only grows, and where each of its n-grams occurred: hash chains as in LZ77.

The twin of `TokenLog` in kernels/specserve_kernels/host.
"""

from array import array
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Final

END: Final = -1  # closes a text in a log of several; no token, so nothing matches across it


class TokenLog:
    """Text that only grows, and where each of its n-grams occurred, latest first.

    A position is that after an n-gram; it is known as soon as something follows.
    """

    def __init__(self, sizes: Seq[int]) -> None:
        self._text = array("i", [END])  # nothing matches across it, so no match starts before it
        # By n-gram length: hash -> latest position, and per position the one before it. Hashes
        # may collide; `common` tells.
        self._chains: dict[int, tuple[dict[int, int], array[int]]] = {
            size: ({}, array("i", [0] * size)) for size in sizes
        }

    def __len__(self) -> int:
        return len(self._text) - 1

    def extend(self, tokens: Seq[int]) -> None:
        self._text.extend(tokens)
        for size, (latest, earlier) in self._chains.items():
            recent = self._text[len(earlier) - size : -1].tolist()
            grams = zip(*(recent[start:] for start in range(size)), strict=False)
            for position, gram in enumerate(grams, start=len(earlier)):
                key = hash(gram)
                earlier.append(latest.get(key, 0))
                latest[key] = position

    def positions(self, ngram: Seq[int]) -> Iterator[int]:
        """Where `ngram` occurred; rarely one where it did not."""
        latest, earlier = self._chains[len(ngram)]
        position = latest.get(hash(tuple(ngram)), 0)
        while position:
            yield position
            position = earlier[position]

    def common(self, position: int, backwards: Seq[int]) -> int:
        """How many tokens before `position` are the first ones of `backwards`."""
        text, length = self._text, 0
        for token in backwards:
            length += 1
            if text[position - length] != token:
                return length - 1
        return length

    def follow(self, position: int, length: int) -> Seq[int]:
        """The text from `position`; where it ends it goes on with what has just been read."""
        text = self._text[position : position + length]
        while len(text) < length:
            text.extend(text[: length - len(text)])
        return text
