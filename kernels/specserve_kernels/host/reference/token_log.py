"""An append-only text with an index of its n-grams: hash chains as in LZ77."""

from array import array
from collections.abc import Iterator, Sequence

from specserve_kernels.host.interface import END


class TokenLog:
    """An append-only text, and the positions after each occurrence of its n-grams, latest first.

    sizes: the n-gram lengths to index. An occurrence is indexed once a token follows it.
    """

    def __init__(self, sizes: Sequence[int], /) -> None:
        self._text = array("i", [END])  # the first END stops every match at the text's beginning
        # By n-gram length: hash -> latest position, and position -> previous one of the same hash,
        # 0: none. Hashes may collide; callers compare the tokens with `num_common`.
        self._chains: dict[int, tuple[dict[int, int], array[int]]] = {
            size: ({}, array("i", [0] * size)) for size in sizes
        }

    def __len__(self) -> int:
        return len(self._text) - 1

    def extend(self, tokens: Sequence[int], /) -> None:
        """Append tokens."""
        self._text.extend(tokens)
        for size, (latest, earlier) in self._chains.items():
            recent = self._text[len(earlier) - size : -1].tolist()
            grams = zip(*(recent[start:] for start in range(size)), strict=False)
            for position, gram in enumerate(grams, start=len(earlier)):
                key = hash(gram)
                earlier.append(latest.get(key, 0))
                latest[key] = position

    def positions(self, ngram: Sequence[int]) -> Iterator[int]:
        """Positions after occurrences of `ngram`, and, rarely, of an n-gram of the same hash."""
        latest, earlier = self._chains[len(ngram)]
        position = latest.get(hash(tuple(ngram)), 0)
        while position:
            yield position
            position = earlier[position]

    def num_common(self, position: int, backwards: Sequence[int]) -> int:
        """How many tokens before `position`, going back, equal those of `backwards`."""
        text, length = self._text, 0
        for token in backwards:
            length += 1
            if text[position - length] != token:
                return length - 1
        return length

    def continuation(self, position: int, length: int) -> Sequence[int]:
        """The `length` tokens from `position`; if the text ends before, they repeat cyclically."""
        text = self._text[position : position + length]
        while len(text) < length:
            text.extend(text[: length - len(text)])
        return text
