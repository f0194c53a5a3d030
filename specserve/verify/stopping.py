"""Decides when a request is finished: EOS, stop tokens, stop strings, max_tokens.

Stop strings are searched in the text that the client sees; `text/output_text.py` cuts it there.
"""

from collections.abc import Sequence

from specserve.step import FinishInfo
from specserve.text import IncrementalDecoder, StopChecker, Tokenizer
from specserve.types import Request


class StopRule:
    """The stop conditions of one request. `feed` takes every emitted token, in order."""

    def __init__(
        self, request: Request, eos_ids: Sequence[int], tokenizer: Tokenizer | None
    ) -> None:
        self._params = params = request.sampling
        self._eos_ids = frozenset() if params.ignore_eos else frozenset(eos_ids)
        self._stop_ids = frozenset(params.stop_token_ids)
        self._num_tokens = 0
        self._text: IncrementalDecoder | None = None
        if params.stop:
            assert tokenizer is not None, "stop strings are refused without a tokenizer"
            self._text = IncrementalDecoder(
                tokenizer, prompt=request.prompt_ids, skip_special=params.skip_special_tokens
            )
            self._checker = StopChecker(params.stop)

    def feed(self, token: int) -> FinishInfo | None:
        """Return the finish info if `token` ends the request, else None.

        A stop string takes precedence, so that the text does not contain one when something else
        ends the request at the same token. Those complete before `min_tokens` tokens are ignored.
        """
        self._num_tokens += 1
        finish = self._token_finish(token)
        if self._text is not None:
            hidden = token in self._eos_ids and self._params.skip_special_tokens
            text = self._text.feed(() if hidden else (token,))
            if finish is not None:
                text += self._text.flush()
            match = self._checker.feed(text)
            if match is not None and self._num_tokens >= self._params.min_tokens:
                return FinishInfo("stop", self._params.stop[match])
        return finish

    def _token_finish(self, token: int) -> FinishInfo | None:
        if token in self._eos_ids:
            return FinishInfo("stop")
        if token in self._stop_ids:
            return FinishInfo("stop", token)
        return FinishInfo("length") if self._num_tokens >= self._params.max_tokens else None
