"""The text of one generated sequence as it grows, piece by piece, cut at its stop string."""

from collections.abc import Sequence

from specserve.text.stream import IncrementalDecoder, StopChecker
from specserve.text.tokenizer import Tokenizer


class OutputText:
    """Shows text once no stop string can take it back.

    `keep_stop` leaves the stop string itself in the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        skip_special: bool = True,
        keep_stop: bool = False,
    ) -> None:
        self.text = ""
        self._decoder = IncrementalDecoder(tokenizer, skip_special=skip_special)
        self._checker = StopChecker(stops)
        self._holds_back = bool(stops) and not keep_stop
        self._num_shown = 0

    def feed(
        self, ids: Sequence[int], *, last: bool = False, stop_reason: str | int | None = None
    ) -> str:
        """The text that may be shown now. `last`: no ids follow; `stop_reason`: why."""
        self.text += self._decoder.feed(ids[:-1])
        num_before = len(self.text)
        self.text += self._decoder.feed(ids[-1:])
        if last:
            self.text += self._decoder.flush()
            if isinstance(stop_reason, str) and self._holds_back:
                # The last token completed it; one before that may have been spared by min_tokens.
                start = self.text.index(stop_reason, max(0, num_before - len(stop_reason) + 1))
                self.text = self.text[:start]
        safe = len(self.text)
        if self._holds_back and not last:
            safe = self._checker.safe_length(self.text)
        piece = self.text[self._num_shown : safe]
        self._num_shown = max(self._num_shown, safe)
        return piece
