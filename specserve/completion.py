"""What `LLM` and `AsyncLLM` return: completions, and the deltas of streamed ones."""

import time
from collections.abc import Sequence
from itertools import chain

from msgspec import Struct

from specserve.types import (
    FinishReason,
    PromptLogprobs,
    RequestError,
    SamplingParams,
    SpecStats,
    StepOutput,
    TokenLogprobs,
)


class GenerationFailed(Exception):
    """The engine ended this request with an error; the message says why."""


class Timing(Struct, frozen=True):
    """Wall-clock seconds. A time is None if there were too few tokens to measure it."""

    ttft_s: float | None  # from submission to the first token
    tpot_s: float | None  # per token after those of the first step
    total_s: float  # from submission to the end


class Completion(Struct, frozen=True):
    """One generated sequence. `error` is the reason if it failed or was aborted."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: SpecStats
    timing: Timing
    drafter_ids: tuple[int, ...] = ()  # drafter id per token, see `StepOutput.drafter_ids`
    logprobs: tuple[TokenLogprobs, ...] | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    error: str | None = None


class Generation(Struct, frozen=True):
    """The `n` completions of one prompt. Properties are those of the first one, but for `error`."""

    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    prompt_logprobs: PromptLogprobs | None = None  # one per prompt token; None for the first

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.completions[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        return self.completions[0].logprobs

    @property
    def stats(self) -> SpecStats:
        return self.completions[0].stats

    @property
    def error(self) -> str | None:
        """The first error of any completion."""
        return next((c.error for c in self.completions if c.error is not None), None)


class Delta(Struct, frozen=True):
    """The next tokens of a completion, and the next text, which may lag behind the tokens.

    The text of an incomplete character, or of what may become a stop string, is held back. The last
    delta of a completion has `finish_reason` and `stats`. Logprobs of the prompt, if requested, are
    in the first deltas of index 0.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    drafter_ids: tuple[int, ...] = ()  # drafter id per token, see `StepOutput.drafter_ids`
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: PromptLogprobs = ()  # of the next prompt tokens; None for the first token
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    index: int = 0  # of the completion among the `n` of the prompt
    stats: SpecStats | None = None
    num_cached_tokens: int = 0
    error: str | None = None

    @classmethod
    def of(cls, text: str, output: StepOutput, index: int) -> "Delta":
        return cls(
            text=text,
            token_ids=output.ids,
            drafter_ids=output.drafter_ids,
            logprobs=output.logprobs,
            prompt_logprobs=output.prompt_logprobs,
            finish_reason=output.finish,
            stop_reason=output.stop_reason,
            index=index,
            stats=output.stats,
            num_cached_tokens=output.num_cached_tokens,
            error=output.error,
        )


class DeltaCollector:
    """Makes one completion of its deltas, and measures when they arrive."""

    def __init__(self, sampling: SamplingParams) -> None:
        self._deltas: list[Delta] = []
        self._sampling = sampling
        self._started = time.perf_counter()
        self._first: tuple[float, int] | None = None  # time and number of the first tokens
        self._last = self._started

    def add(self, delta: Delta) -> None:
        self._deltas.append(delta)
        self._last = time.perf_counter()
        if delta.token_ids and self._first is None:
            self._first = self._last, len(delta.token_ids)

    def completion(self) -> Completion:
        """The whole completion; the last delta must have been added."""
        deltas, last = self._deltas, self._deltas[-1]
        assert last.finish_reason is not None
        ids = tuple(chain.from_iterable(delta.token_ids for delta in deltas))
        logprobs = tuple(chain.from_iterable(delta.logprobs for delta in deltas))
        return Completion(
            text="".join(delta.text for delta in deltas),
            token_ids=ids,
            finish_reason=last.finish_reason,
            stats=last.stats or SpecStats(),
            timing=self._timing(len(ids)),
            drafter_ids=tuple(chain.from_iterable(delta.drafter_ids for delta in deltas)),
            logprobs=None if self._sampling.logprobs is None else logprobs,
            stop_reason=last.stop_reason,
            num_cached_tokens=last.num_cached_tokens,
            error=last.error,
        )

    def prompt_logprobs(self) -> PromptLogprobs | None:
        """Of the whole prompt, or None if they were not requested."""
        if self._sampling.prompt_logprobs is None:
            return None
        return tuple(chain.from_iterable(delta.prompt_logprobs for delta in self._deltas))

    def _timing(self, num_tokens: int) -> Timing:
        ttft = tpot = None
        if self._first is not None:
            ttft = self._first[0] - self._started
            if num_tokens > self._first[1]:
                tpot = (self._last - self._first[0]) / (num_tokens - self._first[1])
        return Timing(ttft, tpot, self._last - self._started)


def generation(prompt_ids: tuple[int, ...], parts: Sequence[DeltaCollector]) -> Generation:
    """The result of a prompt whose `n` completions are finished."""
    completions = tuple(part.completion() for part in parts)
    return Generation(prompt_ids, completions, parts[0].prompt_logprobs())


def failed(
    prompt_ids: tuple[int, ...], error: RequestError | GenerationFailed, sampling: SamplingParams
) -> Generation:
    """The result of a request that was refused or that failed as a whole."""
    return Generation(
        prompt_ids,
        (
            Completion(
                text="",
                token_ids=(),
                finish_reason="error",
                stats=SpecStats(),
                timing=Timing(None, None, 0.0),
                logprobs=None if sampling.logprobs is None else (),
                error=str(error),
            ),
        ),
    )
