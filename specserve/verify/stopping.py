"""When a request is over: EOS, stop tokens, stop strings, max_tokens. Fed every emitted token."""

from collections.abc import Sequence

from specserve.step import Ending
from specserve.text import IncrementalDecoder, StopChecker, Tokenizer
from specserve.types import Request


class StopRule:
    """The end of one request, token by token, in the order they are emitted."""

    def __init__(
        self, request: Request, eos_ids: Sequence[int], tokenizer: Tokenizer | None
    ) -> None:
        params = request.sampling
        self._eos_ids = frozenset() if params.ignore_eos else frozenset(eos_ids)
        self._stop_ids = frozenset(params.stop_token_ids)
        self._min_tokens = params.min_tokens
        self._max_tokens = params.max_tokens
        self._num_tokens = 0
        self._stop_strings = params.stop
        self._decoder: IncrementalDecoder | None = None
        if params.stop:
            assert tokenizer is not None, "stop strings are refused without a tokenizer"
            self._decoder = IncrementalDecoder(tokenizer)
            self._checker = StopChecker(params.stop)

    def feed(self, token: int) -> Ending | None:
        """The ending that `token` brings, or None to go on."""
        self._num_tokens += 1
        if token in self._eos_ids:
            return Ending("stop")
        if token in self._stop_ids:
            return Ending("stop", token)
        if self._decoder is not None:
            match = self._checker.feed(self._decoder.feed([token]))
            if match is not None and self._num_tokens >= self._min_tokens:
                return Ending("stop", self._stop_strings[match])
        if self._num_tokens >= self._max_tokens:
            return Ending("length")
        return None
