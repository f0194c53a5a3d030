"""Groups the tokens of a sequence into token chunks: one chunk per streamed event.

With one event per forward pass, packet sizes reveal how many tokens each forward pass accepted, and
so something about the text (arXiv 2411.01076). Chunks of a fixed number of tokens hide it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from specserve.types import FinishReason, SpecStats, StepOutput, TokenLogprobs


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Consecutive tokens of one sequence that are sent in one event.

    The fields are those of `StepOutput`. All but the first three are those of the whole sequence;
    `finish`, `stop_reason` and `stats` are set on its last chunk only.
    """

    ids: tuple[int, ...]
    drafter_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    stats: SpecStats | None = None


class TokenChunker:
    """Splits a sequence's outputs into token chunks of `size` tokens; the last may be smaller.

    With `size` 0, a chunk holds what one forward pass emitted.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._rest = TokenChunk((), (), ())

    def feed(self, output: StepOutput) -> Iterator[TokenChunk]:
        rest = TokenChunk(
            self._rest.ids + output.new_ids,
            self._rest.drafter_ids + output.drafter_ids,
            self._rest.logprobs + output.logprobs,
            output.finish,
            output.stop_reason,
            output.num_cached_tokens,
            output.stats,
        )
        size = self._size
        while size and len(rest.ids) > size:
            yield TokenChunk(
                rest.ids[:size],
                rest.drafter_ids[:size],
                rest.logprobs[:size],
                num_cached_tokens=rest.num_cached_tokens,
            )
            rest = replace(
                rest,
                ids=rest.ids[size:],
                drafter_ids=rest.drafter_ids[size:],
                logprobs=rest.logprobs[size:],
            )
        if rest.finish is not None or len(rest.ids) >= max(size, 1):
            yield rest
            rest = TokenChunk((), (), ())
        self._rest = rest
