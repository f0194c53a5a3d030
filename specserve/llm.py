"""The offline API: a model, an engine in this process, `generate`.

llm = LLM("smollm2-135m")
for result in llm.generate(["Once upon a time"], SamplingParams(temperature=0)):
    print(result.text)
"""

import gc
import secrets
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
from msgspec import Struct

from specserve.config import load_config
from specserve.engine.engine import Engine
from specserve.hub import resolve
from specserve.text import Tokenizer
from specserve.text.output import OutputText
from specserve.types import (
    MAX_SEED,
    FinishReason,
    Request,
    RequestError,
    SamplingParams,
    SpecStats,
    SpeculationParams,
    StepOutput,
    TokenLogprobs,
)

T = TypeVar("T")
Message = dict[str, str]  # {"role": ..., "content": ...}
Prompt = str | Seq[int] | Seq[Message]


class Timing(Struct, frozen=True):
    """Wall-clock seconds. TTFT and TPOT are None without the tokens to measure them."""

    ttft_s: float | None  # from submission to the first token
    tpot_s: float | None  # per token after the first
    total_s: float


class Completion(Struct, frozen=True):
    """One generated sequence. `error` says what was wrong when finish_reason is "error"."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: SpecStats
    timing: Timing
    sources: tuple[int, ...] = ()  # per token: 0 the target, else 1 + index of the drafter
    logprobs: tuple[TokenLogprobs, ...] | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    error: str | None = None


class Generation(Struct, frozen=True):
    """The answer to one prompt: `n` completions. The properties speak of the first."""

    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]

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
        return next((c.error for c in self.completions if c.error is not None), None)


class LLM:
    """`settings` are the fields of `EngineConfig`, flat; an unknown one is an error.

    Raises ConfigError, DraftError, HubError or ModelError, all ValueErrors, with the fix.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        draft: str | Seq[str] | None = None,
        config_file: Path | None = None,
        progress: Callable[[str, float], None] | None = None,
        **settings: Any,
    ) -> None:
        if target is not None:
            settings["target"] = target
        if draft is not None:
            settings["draft"] = [draft] if isinstance(draft, str) else list(draft)
        self.config = load_config(settings, config_file)
        find = partial(resolve, progress=progress)
        directory = find(self.config.target.target)
        self.tokenizer = Tokenizer(directory)
        self.tokenizer.prepare()
        self.engine = Engine(self.config, directory, self.tokenizer, find)
        self.engine.measure_costs()
        self._num_requests = 0

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        speculation: SpeculationParams | None = None,
        predictions: Seq[str | None] | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Generation]:
        """One Generation per prompt, in order; a prompt is text, token ids or chat messages.

        `predictions` are texts expected as answers: they only make it faster. `on_text(index,
        piece)` is called as text of a prompt's first completion appears. A request that cannot be
        served comes back with finish_reason "error"; the others are untouched.
        """
        batch = _as_batch(prompts)
        params = _per_prompt("sampling", sampling or SamplingParams(), len(batch))
        expected: list[str | None] = _per_prompt("predictions", predictions, len(batch))
        jobs = [
            self._start(prompt, param, speculation or SpeculationParams(), prediction)
            for prompt, param, prediction in zip(batch, params, expected, strict=True)
        ]
        if on_text is not None:
            for index, job in enumerate(jobs):
                job.tracks[0].on_text = partial(on_text, index)
        running = {track.id: track for job in jobs for track in job.tracks if not track.finish}
        try:
            with _old_objects_left_alone():
                while running:
                    for output in self.engine.step():
                        if output.id in running and running[output.id].take(output):
                            del running[output.id]
        finally:
            for request_id in running:  # only after an exception: leave nothing behind
                self.engine.abort(request_id)
        return [job.generation() for job in jobs]

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt. Raises RequestError."""
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt))
        if any(isinstance(item, dict) for item in prompt):
            return tuple(self.tokenizer.chat(cast(list[Message], list(prompt))))
        for token in prompt:
            if isinstance(token, bool) or not isinstance(token, int):
                raise RequestError("prompt", f"{token!r} is not a token id; give integers")
        return tuple(cast(Seq[int], prompt))

    def _start(
        self,
        prompt: Prompt,
        params: SamplingParams,
        speculation: SpeculationParams,
        prediction: str | None,
    ) -> "_Job":
        """Submit the `n` sequences of one prompt; what cannot be served ends right here."""
        tracks = [_Track("", self.tokenizer, params, ())]
        prompt_ids: tuple[int, ...] = ()
        try:
            prompt_ids = self.encode(prompt)
            params.validate(self.engine.shape.vocab_size)
            if prediction is not None:
                expected = tuple(self.tokenizer.encode(prediction, add_special=False))
                speculation = msgspec.structs.replace(speculation, prediction=expected)
            seed = secrets.randbelow(MAX_SEED) if params.seed is None else params.seed
            requests = [
                Request(self._next_id(), prompt_ids, own, speculation, arrived_at=time.monotonic())
                for own in params.samples(seed)
            ]
            for request in requests:
                self.engine.submit(request)
            tracks = [_Track(each.id, self.tokenizer, params, prompt_ids) for each in requests]
        except RequestError as error:
            for track in tracks:
                track.fail(str(error))
        return _Job(prompt_ids, tracks)

    def _next_id(self) -> str:
        self._num_requests += 1
        return f"request-{self._num_requests}"


@contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """Going through what a model is made of again and again takes 2 % of the time for one sequence
    and a fifth for hundreds. Afterwards they are collected as ever."""
    if gc.get_freeze_count():  # somebody else's
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Track:
    """One sequence on its way: text so far, ids, times."""

    def __init__(
        self,
        request_id: str,
        tokenizer: Tokenizer,
        params: SamplingParams,
        prompt_ids: tuple[int, ...],
    ) -> None:
        self.id = request_id
        self.finish: FinishReason | None = None
        self.on_text: Callable[[str], None] | None = None
        self._params = params
        self._text = OutputText(
            tokenizer,
            params.stop,
            prompt=prompt_ids,
            skip_special=params.skip_special_tokens,
            keep_stop=params.include_stop_str_in_output,
        )
        self._outputs: list[StepOutput] = []
        self._started = time.perf_counter()
        self._first: tuple[float, int] | None = None  # when the first tokens came, and how many
        self._last = self._started

    def take(self, output: StepOutput) -> bool:
        """Add a step's output; True when it was the last."""
        self._outputs.append(output)
        if output.new_ids:
            self._last = time.perf_counter()
            self._first = self._first or (self._last, len(output.new_ids))
        self.finish = output.finish
        piece = self._text.feed(
            output.new_ids,
            last=self.finish is not None,
            stop_reason=output.stop_reason,
            end_token=self.finish == "stop" and output.stop_reason is None,
        )
        if self.finish is not None:
            self._last = time.perf_counter()
        if piece and self.on_text is not None:
            self.on_text(piece)
        return self.finish is not None

    def fail(self, error: str) -> None:
        """End it before it began."""
        self.take(StepOutput(self.id, finish="error", error=error, stats=SpecStats()))

    def completion(self) -> Completion:
        assert self.finish is not None
        last = self._outputs[-1]
        ids = tuple(chain.from_iterable(output.new_ids for output in self._outputs))
        logprobs = tuple(chain.from_iterable(output.logprobs for output in self._outputs))
        return Completion(
            text=self._text.text,
            token_ids=ids,
            finish_reason=self.finish,
            stats=last.stats or SpecStats(),
            timing=self._timing(len(ids)),
            sources=tuple(chain.from_iterable(output.sources for output in self._outputs)),
            logprobs=logprobs if self._params.logprobs is not None else None,
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


class _Job:
    """One prompt and its n sequences."""

    def __init__(self, prompt_ids: tuple[int, ...], tracks: list[_Track]) -> None:
        self.prompt_ids = prompt_ids
        self.tracks = tracks

    def generation(self) -> Generation:
        return Generation(self.prompt_ids, tuple(track.completion() for track in self.tracks))


def _as_batch(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    """A list of prompts from one prompt or several."""
    if isinstance(prompts, str) or any(isinstance(item, int | dict) for item in prompts):
        return [cast(Prompt, prompts)]
    return list(cast(Seq[Prompt], prompts))


def _per_prompt(name: str, value: T | Seq[T], count: int) -> list[T]:
    """One value per prompt: the same for all, or a list of the right length."""
    if not isinstance(value, list | tuple):
        return [cast(T, value)] * count
    if len(value) != count:
        raise ValueError(f"{name}: {len(value)} given for {count} prompts; give one per prompt")
    return list(value)
