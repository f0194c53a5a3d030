"""Groups the tokens of a sequence into token chunks: one chunk per streamed event.

With one event per forward pass, packet sizes reveal how many tokens each forward pass accepted, and
so something about the text (arXiv 2411.01076). Chunks of a fixed number of tokens hide it.
"""

from collections.abc import Iterator
from typing import Final

from msgspec.structs import replace

from specserve.types import StepOutput

_MAX_SCORES: Final = 64  # entries of `prompt_logprobs` per output: formatting them takes time


class TokenChunker:
    """Splits the outputs of a sequence into ones of `size` tokens; the last may have fewer.

    With `size` 0, the outputs stay as they are, except those without tokens, which are left out.
    Logprobs of the prompt are outputs of their own, as soon as they arrive.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._rest = StepOutput("")  # tokens of earlier outputs

    def feed(self, output: StepOutput) -> Iterator[StepOutput]:
        scores, empty = output.prompt_logprobs, _part(output, slice(0))
        for start in range(0, len(scores), _MAX_SCORES):
            part = scores[start : start + _MAX_SCORES]
            yield replace(empty, prompt_logprobs=part, finish=None, stop_reason=None, stats=None)
        rest = replace(
            output,
            prompt_logprobs=(),
            ids=self._rest.ids + output.ids,
            drafter_ids=self._rest.drafter_ids + output.drafter_ids,
            logprobs=self._rest.logprobs + output.logprobs,
        )
        size = self._size
        while size and len(rest.ids) > size:
            yield replace(_part(rest, slice(size)), finish=None, stop_reason=None, stats=None)
            rest = _part(rest, slice(size, None))
        if rest.finish is not None or len(rest.ids) >= max(size, 1):
            yield rest
            rest = StepOutput("")
        self._rest = rest


def _part(output: StepOutput, part: slice) -> StepOutput:
    """`output` with a part of its tokens."""
    ids, drafter_ids = output.ids[part], output.drafter_ids[part]
    return replace(output, ids=ids, drafter_ids=drafter_ids, logprobs=output.logprobs[part])
