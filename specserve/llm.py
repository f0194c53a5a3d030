"""The offline API: an engine in this process, and `generate`."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
from msgspec import Struct

from specserve.config import llm_config
from specserve.engine.engine import Engine
from specserve.engine.measure import measure_costs
from specserve.engine.parts import load_parts
from specserve.hub import resolve
from specserve.text import Tokenizer
from specserve.text.output_text import OutputText
from specserve.types import (
    FinishReason,
    Prompt,
    PromptLogprobs,
    Request,
    RequestError,
    SamplingParams,
    SpecStats,
    SpeculationParams,
    StepOutput,
    TokenLogprobs,
    read_prompt,
)

T = TypeVar("T")


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


class LLM:
    """A model and an engine, loaded into this process.

    `settings` are fields of the sections of `EngineConfig`, by field name. `draft` is one drafter
    or several. `progress(stage, fraction)` reports on the download of models. Raises ConfigError,
    DraftError, HubError, ModelError or TokenizerError, all subclasses of ValueError, with the fix
    in the message.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        draft: str | Sequence[str] | None = None,
        config_file: Path | None = None,
        progress: Callable[[str, float], None] | None = None,
        **settings: Any,
    ) -> None:
        self.config = llm_config(target, draft, config_file, settings)
        find = partial(resolve, progress=progress)
        directory = find(self.config.target.target)
        self.tokenizer = Tokenizer(directory)
        self.tokenizer.prepare()
        parts = load_parts(self.config, directory, self.tokenizer, find)
        measure_costs(parts)
        self.engine = Engine(parts)
        self._numbers = count(1)  # of requests

    @property
    def default_sampling_params(self) -> SamplingParams:
        """The sampling parameters of a prompt for which none are given.

        temperature, top_k, top_p, min_p and repetition_penalty are those that the model's
        generation_config.json recommends, the others those of `SamplingParams()`.
        """
        return self.engine.parts.default_sampling

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        speculation: SpeculationParams | None = None,
        predictions: Sequence[str | None] | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Generation]:
        """Generate completions. Returns one Generation per prompt, in order.

        A prompt is text, token ids or chat messages. `sampling` is one value for all prompts or a
        list with one per prompt; None: `default_sampling_params`. `predictions` has an expected
        output text or None per prompt; it affects speed, never the output. `on_text(index, delta)`
        is called with each text delta of the first completion of prompt `index`. A request that
        cannot be served has finish_reason "error"; other requests are not affected. Raises
        ValueError if a list has the wrong length.
        """
        batch = _as_batch(prompts)
        params = _per_prompt("sampling", sampling or self.default_sampling_params, len(batch))
        expected: list[str | None] = _per_prompt("predictions", predictions, len(batch))
        jobs = [
            self._start(prompt, param, speculation or SpeculationParams(), prediction)
            for prompt, param, prediction in zip(batch, params, expected, strict=True)
        ]
        running: dict[str, _RunningSequence] = {}  # by request id
        for index, job in enumerate(jobs):
            if not isinstance(job, Generation):
                running |= {seq.request.id: seq for seq in job}
                job[0].on_text = partial(on_text, index) if on_text else None
        try:
            with _gc_frozen():
                while running:
                    for output in self.engine.step():
                        if output.id in running and running[output.id].take(output):
                            del running[output.id]
        finally:
            for request_id in running:  # not empty only after an exception
                self.engine.abort(request_id)
        return [job if isinstance(job, Generation) else _generation(job) for job in jobs]

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The token ids of a prompt. Raises RequestError if it cannot be encoded."""
        match read_prompt(prompt):
            case str(text):
                return tuple(self.tokenizer.encode(text))
            case list(messages):
                return tuple(self.tokenizer.chat(messages))
            case ids:
                return ids

    def _start(
        self,
        prompt: Prompt,
        params: SamplingParams,
        speculation: SpeculationParams,
        prediction: str | None,
    ) -> "list[_RunningSequence] | Generation":
        """Submit the `n` sequences of one prompt. If it cannot be served, return the error."""
        prompt_ids: tuple[int, ...] = ()
        try:
            prompt_ids = self.encode(prompt)
            params.validate(self.engine.shape.vocab_size)
            if prediction is not None:
                expected = tuple(self.tokenizer.encode(prediction, add_special=False))
                speculation = msgspec.structs.replace(speculation, prediction=expected)
            now = time.monotonic()
            requests = [
                Request(f"request-{number}", prompt_ids, own, speculation, arrived_at=now)
                for own, number in zip(params.samples(), self._numbers, strict=False)
            ]
            for request in requests:
                self.engine.submit(request)
        except RequestError as error:
            logprobs, timing = None if params.logprobs is None else (), Timing(None, None, 0.0)
            failed = Completion(
                "", (), "error", SpecStats(), timing, logprobs=logprobs, error=str(error)
            )
            return Generation(prompt_ids, (failed,))
        return [_RunningSequence(request, self.tokenizer) for request in requests]


@contextmanager
def _gc_frozen() -> Iterator[None]:
    """Exclude what exists now from garbage collection, which would take 2 to 20 % of the time."""
    if gc.get_freeze_count():  # other code has frozen objects, and `unfreeze` would release those
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _RunningSequence:
    """One sequence in progress: its outputs, text and times."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request = request
        self.on_text: Callable[[str], None] | None = None
        self._text = OutputText.of(request, tokenizer)
        self._outputs: list[StepOutput] = []
        self._started = time.perf_counter()
        self._first: tuple[float, int] | None = None  # time and number of the first tokens
        self._last = self._started

    def take(self, output: StepOutput) -> bool:
        """Add the output of a step. Returns whether it is the last one."""
        self._outputs.append(output)
        delta = self._text.feed(output.ids, output.finish, output.stop_reason)
        self._last = time.perf_counter()
        if output.ids and self._first is None:
            self._first = self._last, len(output.ids)
        if delta and self.on_text is not None:
            self.on_text(delta)
        return output.finish is not None

    def prompt_logprobs(self) -> PromptLogprobs | None:
        """Of the whole prompt, or None if they were not requested."""
        if self.request.sampling.prompt_logprobs is None:
            return None
        return tuple(chain.from_iterable(output.prompt_logprobs for output in self._outputs))

    def completion(self) -> Completion:
        last = self._outputs[-1]
        assert last.finish is not None
        ids = tuple(chain.from_iterable(output.ids for output in self._outputs))
        logprobs = tuple(chain.from_iterable(output.logprobs for output in self._outputs))
        return Completion(
            text=self._text.text,
            token_ids=ids,
            finish_reason=last.finish,
            stats=last.stats or SpecStats(),
            timing=self._timing(len(ids)),
            drafter_ids=tuple(chain.from_iterable(output.drafter_ids for output in self._outputs)),
            logprobs=None if self.request.sampling.logprobs is None else logprobs,
            stop_reason=last.stop_reason,
            num_cached_tokens=last.num_cached_tokens,
            error=last.error,
        )

    def _timing(self, num_tokens: int) -> Timing:
        ttft = tpot = None
        if self._first is not None:
            ttft = self._first[0] - self._started
            if num_tokens > self._first[1]:
                tpot = (self._last - self._first[0]) / (num_tokens - self._first[1])
        return Timing(ttft, tpot, self._last - self._started)


def _generation(seqs: list[_RunningSequence]) -> Generation:
    completions = tuple(seq.completion() for seq in seqs)
    return Generation(seqs[0].request.prompt_ids, completions, seqs[0].prompt_logprobs())


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Wrap a single prompt into a list; a list of prompts is copied."""
    if isinstance(prompts, str) or any(isinstance(item, int | dict) for item in prompts):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))


def _per_prompt(name: str, value: T | Sequence[T], count: int) -> list[T]:
    """One value per prompt. Raises ValueError for a list that has not `count` values."""
    if not isinstance(value, list | tuple):
        return [cast(T, value)] * count
    if len(value) != count:
        raise ValueError(f"{name}: {len(value)} given for {count} prompts; give one per prompt")
    return list(value)
