"""Drafts from the `prediction` of a request: a text that its caller expects as the answer."""

from typing import Final

from specserve.sequence import SequenceView
from specserve.speculation.lookup import TextIndex, copied_text
from specserve.tree import PREDICTION_ID, DraftTree

_MAX_MATCH: Final = 4  # tokens


class PredictedTexts:
    """The predictions of all running requests. Host only."""

    def __init__(self) -> None:
        self._indexes: dict[str, TextIndex] = {}  # by sequence id

    def propose(self, seq: SequenceView, budget: int) -> DraftTree | None:
        """What follows the last tokens of the output in the prediction, at first its beginning.

        None if the request has no prediction, or these tokens are not in it.
        """
        text = seq.speculation.prediction
        if not text:
            return None
        if seq.num_output == 0:
            return copied_text(seq.tokens[-1], text, 0, _MAX_MATCH, budget, PREDICTION_ID)
        index = self._indexes.get(seq.id)
        if index is None:
            index = self._indexes[seq.id] = TextIndex(1, _MAX_MATCH)
            index.extend(text)
        found = index.find(seq.tokens[-min(_MAX_MATCH, seq.num_output) :])
        if found is None:
            return None
        match, position = found
        return copied_text(seq.tokens[-1], text, position, match, budget, PREDICTION_ID)

    def forget(self, seq_id: str) -> None:
        self._indexes.pop(seq_id, None)
