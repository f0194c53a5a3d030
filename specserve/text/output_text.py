"""The growing text of one generated sequence as text deltas, cut at its stop string."""

from collections import deque
from collections.abc import Sequence

from specserve.text.incremental_decoder import IncrementalDecoder
from specserve.text.stop_checker import StopChecker
from specserve.text.tokenizer import Tokenizer
from specserve.types import FinishReason, Request


class OutputText:
    """Converts generated token ids to text deltas.

    Text that may be the beginning of a stop string is held back, so that a returned delta is
    final. `prompt` has the ids before the generated ones. `skip_special` hides control tokens.
    `keep_stop` leaves the stop string itself in the text, and then nothing is held back.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        prompt: Sequence[int] = (),
        skip_special: bool = True,
        keep_stop: bool = False,
    ) -> None:
        self.text = ""
        self._decoder = IncrementalDecoder(tokenizer, prompt=prompt, skip_special=skip_special)
        self._checker = StopChecker(stops)
        self._skip_special = skip_special
        self._keep_stop = keep_stop
        self._hides_stop = bool(stops) and not keep_stop
        self._num_shown = 0
        self._offsets: deque[int] = deque()  # per id, the offset in `text` where its text begins
        self._is_last = False

    @classmethod
    def of(cls, request: Request, tokenizer: Tokenizer) -> "OutputText":
        """The text of the answer to `request`."""
        params = request.sampling
        return cls(
            tokenizer,
            params.stop,
            prompt=request.prompt_ids,
            skip_special=params.skip_special_tokens,
            keep_stop=params.include_stop_str_in_output,
        )

    def feed(
        self,
        ids: Sequence[int],
        finish: FinishReason | None = None,
        stop_reason: str | int | None = None,
    ) -> str:
        """Append `ids`; returns the next text delta.

        `finish`: why no ids follow, or None. If `stop_reason` is a string, the text ends at it. If
        `finish` is "stop" without a `stop_reason`, the last id is an end token; it is hidden if
        control tokens are, even if it is not one of them.
        """
        self._is_last = finish is not None
        end_token = finish == "stop" and stop_reason is None
        shown = ids[:-1] if end_token and self._skip_special else ids
        num_seen = num_before = len(self.text)
        for index in shown:
            num_before = len(self.text)
            self._offsets.append(num_before + self._decoder.num_replacements_before(index))
            self.text += self._decoder.feed((index,))
        self._offsets += [len(self.text)] * (len(ids) - len(shown))
        if self._is_last:
            self.text += self._decoder.flush()
            if isinstance(stop_reason, str):
                # The last token completed it; min_tokens may have let an earlier one pass.
                start = self.text.index(stop_reason, max(0, num_before - len(stop_reason) + 1))
                self.text = self.text[: start + len(stop_reason) * self._keep_stop]
        end = len(self.text)
        if self._hides_stop and not self._is_last:
            self._checker.feed(self.text[num_seen:])
            end -= self._checker.num_held
        delta = self.text[self._num_shown : end]
        self._num_shown = max(self._num_shown, end)
        return delta

    def pop_final_offsets(self) -> list[int]:
        """The offsets in `text` of the next ids, in characters; each offset is returned once.

        Those that a stop string may still cut off are withheld.
        """
        final = []
        while self._offsets and (self._is_last or self._offsets[0] <= self._num_shown):
            final.append(min(self._offsets.popleft(), self._num_shown))
        return final
