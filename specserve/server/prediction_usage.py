"""How much of a request's `prediction` came true, for OpenAI's `usage`."""

from collections.abc import Sequence

from specserve.tree import PREDICTION


class PredictionUsage:
    """Counts the tokens of the prediction that one answer took over.

    A token counts if it is the one that the prediction goes on with, whoever proposed it: the
    target itself emits the last token of every forward pass.
    """

    def __init__(self, prediction: tuple[int, ...]) -> None:
        self._prediction = prediction
        self._next = 0  # the prediction's token that comes next
        self._num_matched = 0

    @property
    def num_accepted(self) -> int:
        """At most the length of the prediction, also if an answer repeats parts of it."""
        return min(self._num_matched, len(self._prediction))

    def feed(self, ids: Sequence[int], sources: Sequence[int]) -> None:
        """The next tokens of the answer and who proposed each."""
        for token, source in zip(ids, sources, strict=True):
            if self._next < len(self._prediction) and self._prediction[self._next] == token:
                position = self._next
            elif source == PREDICTION:  # drafted from another place of the prediction
                position = self._find(token)
            else:
                continue
            self._num_matched += 1
            self._next = position + 1

    def _find(self, token: int) -> int:
        """The first place at or after the current one that holds `token`, else before it."""
        try:
            return self._prediction.index(token, self._next)
        except ValueError:
            return self._prediction.index(token)
