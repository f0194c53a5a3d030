"""Groups the tokens of a sequence into token chunks: one chunk per streamed event.

With one event per forward pass, packet sizes reveal how many tokens each forward pass accepted, and
so something about the text (arXiv 2411.01076). Chunks of a fixed number of tokens hide it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from specserve.types import FinishReason, StepOutput, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Bundle:
    """A token chunk: consecutive tokens of one sequence that are sent in one event."""

    ids: tuple[int, ...]
    drafter_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: FinishReason | None = None
    stop_reason: str | int | None = None


class Bundler:
    """Splits a sequence's outputs into token chunks of `size` tokens; the last may be smaller.

    With `size` 0, a chunk holds what one forward pass emitted.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._held = Bundle((), (), ())

    def feed(self, output: StepOutput) -> Iterator[Bundle]:
        held = Bundle(
            self._held.ids + output.new_ids,
            self._held.drafter_ids + output.drafter_ids,
            self._held.logprobs + output.logprobs,
            output.finish,
            output.stop_reason,
        )
        while self._size and len(held.ids) > self._size:
            cut = self._size
            yield Bundle(held.ids[:cut], held.drafter_ids[:cut], held.logprobs[:cut])
            held = Bundle(
                held.ids[cut:],
                held.drafter_ids[cut:],
                held.logprobs[cut:],
                held.finish,
                held.stop_reason,
            )
        if held.finish is not None or len(held.ids) >= max(self._size, 1):
            yield held
            held = Bundle((), (), ())
        self._held = held
