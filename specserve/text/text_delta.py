"""The text and the tokens that one event of a stream carries."""

from dataclasses import dataclass, replace

import msgspec

from specserve.types import StepOutput, TokenLogprobs


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next text and tokens of one choice.

    `choice` is the index of the sequence among those of the same request. `logprobs` are those of
    the tokens whose start in the text is final, and `offsets` are these starts, in characters of
    the choice's text. Both may lag behind `tokens`. Logprobs of the prompt are in `tokens`, in
    deltas of their own before the first text.
    """

    choice: int
    text: str
    tokens: StepOutput  # a token chunk
    logprobs: tuple[TokenLogprobs, ...] = ()
    offsets: tuple[int, ...] = ()

    def without_logprobs(self) -> "TextDelta":
        """The same, without `logprobs`, `offsets` and the logprobs of `tokens`."""
        tokens = msgspec.structs.replace(self.tokens, logprobs=(), prompt_logprobs=())
        return replace(self, tokens=tokens, logprobs=(), offsets=())
