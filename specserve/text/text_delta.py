"""From the token chunks of a sequence to text deltas, with the logprobs whose place is final."""

from collections import deque
from dataclasses import dataclass, replace

from specserve.text.output_text import OutputText
from specserve.text.token_chunk import TokenChunk
from specserve.text.tokenizer import Tokenizer
from specserve.types import Request, TokenLogprobs


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The text and the tokens that one event carries for one choice.

    `choice` is the index of the sequence among those of the same request. `logprobs` are those of
    the tokens whose start in the text is final, and `offsets` are these starts, in characters of
    the choice's text. Both may lag behind `tokens`.
    """

    choice: int
    text: str
    tokens: TokenChunk
    logprobs: tuple[TokenLogprobs, ...] = ()
    offsets: tuple[int, ...] = ()

    def without_logprobs(self) -> "TextDelta":
        """The same, without `logprobs`, `offsets` and the logprobs of `tokens`."""
        return replace(self, tokens=replace(self.tokens, logprobs=()), logprobs=(), offsets=())


class TextDeltas:
    """Turns the token chunks of one choice into text deltas."""

    def __init__(self, choice: int, request: Request, tokenizer: Tokenizer) -> None:
        params = request.sampling
        self._choice = choice
        self._logprobs: deque[TokenLogprobs] = deque()  # of tokens that a stop string may still cut
        self._text = OutputText(
            tokenizer,
            params.stop,
            prompt=request.prompt_ids,
            skip_special=params.skip_special_tokens,
            keep_stop=params.include_stop_str_in_output,
        )

    def feed(self, tokens: TokenChunk) -> TextDelta:
        text = self._text.feed(
            tokens.ids,
            last=tokens.finish is not None,
            stop_reason=tokens.stop_reason,
            end_token=tokens.finish == "stop" and tokens.stop_reason is None,
        )
        offsets = self._text.pop_final_offsets()
        self._logprobs += tokens.logprobs
        logprobs = tuple(self._logprobs.popleft() for _ in offsets) if self._logprobs else ()
        return TextDelta(self._choice, text, tokens, logprobs, tuple(offsets))
