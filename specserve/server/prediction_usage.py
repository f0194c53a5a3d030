"""Counts how much of a request's `prediction` the answer contains, for OpenAI's `usage`."""

from collections.abc import Sequence

from specserve.tree import PREDICTION_ID


class PredictionUsage:
    """Counts the tokens of the prediction that one answer contains.

    A token counts if it equals the prediction's token at the current position, whatever its drafter
    id: the target itself emits the last token of every forward pass. A token drafted from another
    position of the prediction counts too. The current position moves past the counted token.
    """

    def __init__(self, prediction: tuple[int, ...]) -> None:
        self._prediction = prediction
        self._next = 0  # the current position in the prediction
        self._num_matched = 0

    @property
    def num_accepted(self) -> int:
        """Counted tokens; at most the length of the prediction, even if parts are repeated."""
        return min(self._num_matched, len(self._prediction))

    def feed(self, ids: Sequence[int], drafter_ids: Sequence[int]) -> None:
        """Count the next tokens of the answer; `drafter_ids` are their drafter ids."""
        for token, drafter_id in zip(ids, drafter_ids, strict=True):
            if self._next < len(self._prediction) and self._prediction[self._next] == token:
                position = self._next
            elif drafter_id == PREDICTION_ID:  # drafted from another place of the prediction
                # Its first position from the current one on, else the first of all.
                begin = self._next if token in self._prediction[self._next :] else 0
                position = self._prediction.index(token, begin)
            else:
                continue
            self._num_matched += 1
            self._next = position + 1
