"""Finds the last tokens of one text in another text, and drafts what follows them there."""

from collections.abc import Sequence

from specserve.tree import DRAFTED_ID, DraftTree, chain_tree


class TextIndex:
    """For each n-gram of a text, the position after its latest occurrence with a successor."""

    def __init__(self, min_match: int, max_match: int) -> None:
        self._sizes = range(max_match, min_match - 1, -1)
        self._next: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Index the n-grams that end before the last token of a growing text."""
        first = max(self._num_indexed, 1)
        start = max(first - self._sizes[0], 0)
        text = tuple(tokens[start:])
        for end in range(first, len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._next[text[end - start - size : end - start]] = end
        self._num_indexed = len(tokens)

    def find(self, context: Sequence[int]) -> tuple[int, int] | None:
        """(match length, position of the continuation) for the longest suffix of `context`."""
        for size in self._sizes:
            if size <= len(context):
                position = self._next.get(tuple(context[len(context) - size :]))
                if position is not None:
                    return size, position
        return None


def copied_text(
    root: int,
    text: Sequence[int],
    position: int,
    match: int,
    budget: int,
    drafter_id: int = DRAFTED_ID,
) -> DraftTree:
    """A chain of the tokens of `text` from `position` on, where `match` tokens before it agree.

    At the end of the text it repeats what it has drafted. The conditional acceptance probability of
    each token is estimated as 1 - 0.5^(match + 1).
    """
    drafted = list(text[position : position + budget - 1])
    for index in range(budget - 1 - len(drafted)):
        drafted.append(drafted[index])
    per_token = 1.0 - 0.5 ** (match + 1)
    probs = [per_token ** (depth + 1) for depth in range(len(drafted))]
    return chain_tree(root, drafted, probs, drafter_id)
