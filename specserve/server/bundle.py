"""How many tokens an event carries.

One event per verification pass shows how many tokens each pass accepted, and so something about
the text, to whoever sees packet sizes (arXiv 2411.01076). Bundles of a fixed number hide it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from specserve.types import FinishReason, StepOutput, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Bundle:
    """Tokens of one sequence that are shown together."""

    ids: tuple[int, ...]
    sources: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: FinishReason | None = None
    stop_reason: str | int | None = None


class Bundler:
    """Cuts a sequence's outputs into bundles of `size` tokens, the last one smaller.

    0: a bundle is what one pass emitted.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._held = Bundle((), (), ())

    def feed(self, output: StepOutput) -> Iterator[Bundle]:
        held = Bundle(
            self._held.ids + output.new_ids,
            self._held.sources + output.sources,
            self._held.logprobs + output.logprobs,
            output.finish,
            output.stop_reason,
        )
        while self._size and len(held.ids) > self._size:
            cut = self._size
            yield Bundle(held.ids[:cut], held.sources[:cut], held.logprobs[:cut])
            held = Bundle(
                held.ids[cut:],
                held.sources[cut:],
                held.logprobs[cut:],
                held.finish,
                held.stop_reason,
            )
        if held.finish is not None or len(held.ids) >= max(self._size, 1):
            yield held
            held = Bundle((), (), ())
        self._held = held
