"""What a finished draft gains: loaded as by a server, it is compared with plain decoding."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from specserve.cli.prompts import Messages
from specserve.completion import Completion
from specserve.config import TargetConfig
from specserve.llm import LLM
from specserve.types import RequestError, SamplingParams, SpeculationParams

_ANSWER: Final = 64  # most tokens of an answer
_MOST: Final = 8  # prompts, if no time is given


class Gain(Struct, frozen=True):
    """Of greedy answers to held-out prompts, one at a time."""

    num_prompts: int
    tokens_per_pass: float  # without a draft: 1
    tokens_per_s: float
    plain_tokens_per_s: float  # of the same answers without the draft

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_pass:.2f} tokens per forward pass instead of 1 and "
            f"{self.tokens_per_s:.0f} tokens/s instead of {self.plain_tokens_per_s:.0f} on "
            f"{self.num_prompts} held-out prompt{'s' * (self.num_prompts > 1)}, one at a time"
        )


def measure_gain(
    target: TargetConfig,
    draft: Path,
    prompts: Sequence[Messages],
    until: float,
    tick: Callable[[], None],
) -> Gain:
    """Answer each prompt with and without the draft, until there is no time for a further one.

    until: `time.monotonic()` seconds; infinity: for a few prompts. `tick` is called as the answers
    grow. Raises ValueError if no prompt can be answered.
    """
    settings = msgspec.structs.asdict(target)
    num_prompts = num_tokens = num_passes = 0
    seconds, plain_seconds, longest, error = 0.0, 0.0, 0.0, None
    with LLM(draft=[str(draft)], prefix_caching=False, **settings) as llm:
        for prompt in prompts if until < math.inf else prompts[:_MOST]:
            started = time.monotonic()
            if num_prompts and started + longest > until:
                break
            drafted, plain = (
                _answer(llm, prompt, SpeculationParams(enabled=enabled), tick)
                for enabled in (True, False)
            )
            longest = max(longest, time.monotonic() - started)
            if error := drafted.error or plain.error:
                continue
            num_prompts += 1
            num_tokens += drafted.stats.num_emitted_tokens
            num_passes += drafted.stats.num_spec_steps
            seconds += drafted.timing.total_s
            plain_seconds += plain.timing.total_s
    if not num_prompts:
        raise ValueError(f"prompts: none of those held out was answered: {error}")
    return Gain(
        num_prompts,
        num_tokens / max(num_passes, 1),
        num_tokens / seconds,
        num_tokens / plain_seconds,
    )


def _answer(
    llm: LLM, prompt: Messages, speculation: SpeculationParams, tick: Callable[[], None]
) -> Completion:
    try:
        room = llm.engine.limits.max_model_len - len(llm.encode(prompt))
    except RequestError:
        room = 0  # `generate` says why
    greedy = SamplingParams(temperature=0.0, max_tokens=max(1, min(_ANSWER, room)))
    (answer,) = llm.generate([prompt], greedy, speculation=speculation, on_text=lambda *_: tick())
    return answer.completions[0]
