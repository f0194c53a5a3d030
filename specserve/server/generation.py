"""Runs one generation request: its choices run concurrently and yield text deltas.

It uses admission, the engine and the detokenizer; it does not know HTTP or the wire format. Closing
the generator `GenerationRun.text_deltas` ends the request and releases its slots.
"""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec import UNSET, UnsetType

from specserve.server.admission import QueueFull
from specserve.server.prediction_usage import PredictionUsage
from specserve.server.protocol.usage import (
    CompletionDetails,
    Metrics,
    PromptDetails,
    Usage,
    speculative_decoding,
)
from specserve.server.token_chunk import TokenChunk, TokenChunker
from specserve.text import Tokenizer
from specserve.text.output_text import OutputText
from specserve.types import (
    MAX_SEED,
    FinishReason,
    Request,
    SamplingParams,
    SpecStats,
    SpeculationParams,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from specserve.server.service import Service


class GenerationFailed(Exception):
    """The engine ended this request with an error; the message says why."""


class DeadlineExceeded(Exception):
    """The request's deadline passed, in the queue or while running.

    `by_client`: the client set the deadline (`request_timeout`); otherwise the server did.
    """

    def __init__(self, message: str, by_client: bool) -> None:
        super().__init__(message)
        self.by_client = by_client


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationJob:
    """A checked generation request. It becomes `sampling.n` engine requests per prompt."""

    id: str
    prompts: list[tuple[int, ...]]
    sampling: SamplingParams
    speculation: SpeculationParams
    key: str  # name of the API key that is charged
    cache_salt: str
    priority: int
    deadline: float  # time.monotonic() seconds
    deadline_by_client: bool


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The text and the tokens that one event carries for one choice.

    `logprobs` are those of the tokens whose start in the text is final, and `offsets` are these
    starts, in characters of the choice's text. Both may lag behind `tokens`.
    """

    choice: int
    text: str
    tokens: TokenChunk
    logprobs: tuple[TokenLogprobs, ...] = ()
    offsets: tuple[int, ...] = ()


class _TextDeltas:
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


@dataclass(slots=True)
class _Times:
    """time.monotonic() seconds: arrival, first admission, first and last token chunk."""

    arrived: float = field(default_factory=time.monotonic)
    scheduled: float | None = None
    first: float | None = None
    last: float | None = None


class GenerationRun:
    """One running request. `usage` and `metrics` are final once `text_deltas` ends."""

    def __init__(self, service: "Service", job: GenerationJob) -> None:
        self.job = job
        self._service = service
        self._suffix = secrets.token_hex(4)  # makes ids unique: clients choose job ids
        self._stats: list[SpecStats] = []
        self._num_tokens = 0
        self._num_chunks = 0
        self._predictions: dict[int, PredictionUsage] = {}  # by choice
        self._max_nodes = min(job.speculation.max_nodes or 64, service.engine_info().max_nodes)
        self._cached: dict[int, int] = {}  # prompt index -> tokens found in the prefix cache
        self._times = _Times()
        self._timer = service.metrics.request(
            num_prompt_tokens=sum(map(len, job.prompts)),
            max_tokens=job.sampling.max_tokens,
            n=job.sampling.n,
        )

    async def text_deltas(self) -> AsyncGenerator[TextDelta, None]:
        """The text deltas of all choices as they arrive. Choice p * n + i is sample i of prompt p.

        Raises RequestError, QueueFull, EngineUnavailable, GenerationFailed or DeadlineExceeded,
        which ends all choices. Use with `contextlib.aclosing`.
        """
        queue: asyncio.Queue[TextDelta | BaseException | None] = asyncio.Queue()
        seed = self.job.sampling.seed
        samples = self.job.sampling.samples(secrets.randbelow(MAX_SEED) if seed is None else seed)
        tasks = [
            asyncio.create_task(self._run(prompt * len(samples) + i, prompt, sampling, queue))
            for prompt in range(len(self.job.prompts))
            for i, sampling in enumerate(samples)
        ]
        reason: FinishReason = "abort"  # until every choice has ended: the consumer may close this
        try:
            num_running = num_unfinished = len(tasks)
            while num_running:
                item = await queue.get()
                if item is None:
                    num_running -= 1
                elif isinstance(item, TextDelta):
                    num_unfinished -= item.tokens.finish is not None
                    if item.tokens.finish is not None and not num_unfinished:
                        reason = item.tokens.finish
                    yield item
                else:
                    reason = "error"
                    if isinstance(item, QueueFull):
                        self._timer.rejected(item.reason)
                    raise item
        finally:
            for task in tasks:
                task.cancel()
            self._timer.finish(reason)  # first, as the wait below may be cancelled
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(
        self,
        choice: int,
        prompt: int,
        sampling: SamplingParams,
        queue: "asyncio.Queue[TextDelta | BaseException | None]",
    ) -> None:
        job = self.job
        request = Request(
            f"{job.id}-{self._suffix}-{choice}",
            job.prompts[prompt],
            sampling,
            job.speculation,
            job.deadline,
            job.priority,
            job.cache_salt,
            self._times.arrived,
            job.key,
        )
        try:
            # The engine enforces the deadline too, but not for the wait in the queue.
            async with asyncio.timeout(job.deadline - time.monotonic()):
                await self._run_admitted(request, queue, choice, prompt)
            queue.put_nowait(None)
        except TimeoutError:
            queue.put_nowait(
                DeadlineExceeded("the request ran out of time", job.deadline_by_client)
            )
        except Exception as error:
            queue.put_nowait(error)

    async def _run_admitted(
        self,
        request: Request,
        queue: "asyncio.Queue[TextDelta | BaseException | None]",
        choice: int,
        prompt: int,
    ) -> None:
        job, service = self.job, self._service
        deltas = _TextDeltas(choice, request, service.tokenizer)
        chunker = TokenChunker(service.config.server.stream_interval)
        async with service.admission.slot(job.key, len(request.prompt_ids), job.priority):
            self._record_admission()
            async with aclosing(service.engine.stream(request)) as outputs:
                async for output in outputs:
                    if output.error is not None:
                        if output.finish == "abort":
                            raise DeadlineExceeded(output.error, job.deadline_by_client)
                        raise GenerationFailed(output.error)
                    self._cached.setdefault(prompt, output.num_cached_tokens)
                    if output.stats is not None:
                        self._stats.append(output.stats)
                        service.key_speculation.add(job.key, output.stats)
                    for tokens in chunker.feed(output):
                        self._record_tokens(choice, tokens)
                        queue.put_nowait(deltas.feed(tokens))

    def _record_admission(self) -> None:
        if self._times.scheduled is None:
            self._times.scheduled = time.monotonic()
            self._timer.scheduled()

    def _record_tokens(self, choice: int, tokens: TokenChunk) -> None:
        if not tokens.ids:
            return
        self._num_tokens += len(tokens.ids)
        self._num_chunks += 1
        if prediction := self.job.speculation.prediction:
            predicted = self._predictions.setdefault(choice, PredictionUsage(prediction))
            predicted.feed(tokens.ids, tokens.drafter_ids)
        self._times.last = time.monotonic()
        if self._times.first is None:
            self._times.first = self._times.last
        self._timer.tokens(len(tokens.ids), choice)
        self._service.admission.charge(self.job.key, len(tokens.ids))

    def usage(self) -> Usage:
        num_prompt = sum(map(len, self.job.prompts))
        details: CompletionDetails | UnsetType = UNSET
        if prediction := self.job.speculation.prediction:
            # The best of several choices, so that accepted + rejected = the prediction's length.
            accepted = max((used.num_accepted for used in self._predictions.values()), default=0)
            details = CompletionDetails(accepted, len(prediction) - accepted)
        return Usage(
            num_prompt,
            self._num_tokens,
            num_prompt + self._num_tokens,
            PromptDetails(sum(self._cached.values())),
            details,
        )

    def metrics(self) -> Metrics:
        times = self._times
        first_after = generating = rate = gap = None
        if times.first is not None and times.last is not None:
            first_after = 1000 * (times.first - times.arrived)
            generating = 1000 * (times.last - times.first)
            if generating > 0:
                rate = 1000 * self._num_tokens / (generating + first_after)
                gap = generating / max(self._num_chunks - 1, 1)
        queued = None if times.scheduled is None else 1000 * (times.scheduled - times.arrived)
        return Metrics(
            time_to_first_token_ms=first_after,
            generation_time_ms=generating,
            queue_time_ms=queued,
            mean_itl_ms=gap,
            tokens_per_second=rate,
            speculative_decoding=speculative_decoding(self._stats, self._max_nodes),
        )
