"""Runs one generation request: its choices run concurrently and yield text deltas.

It uses admission and the engine; it does not know HTTP or the wire format. Closing the generator
`GenerationRun.text_deltas` ends the request and releases its slots.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec import UNSET, UnsetType

from specserve.async_engine import merge
from specserve.server.admission import QueueFull
from specserve.server.prediction_usage import PredictionUsage
from specserve.server.protocol.usage import (
    CompletionDetails,
    Metrics,
    PromptDetails,
    Usage,
    speculative_decoding,
)
from specserve.text.text_delta import TextDelta
from specserve.types import (
    MAX_SEED,
    FinishReason,
    Request,
    SamplingParams,
    SpecStats,
    SpeculationParams,
)

if TYPE_CHECKING:
    from specserve.server.service import Service


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
        seed = self.job.sampling.seed
        samples = self.job.sampling.samples(secrets.randbelow(MAX_SEED) if seed is None else seed)
        choices = [
            self._choice(prompt * len(samples) + i, prompt, sampling)
            for prompt in range(len(self.job.prompts))
            for i, sampling in enumerate(samples)
        ]
        num_unfinished = len(choices)
        reason: FinishReason = "abort"  # until every choice has ended: the consumer may close this
        try:
            async with aclosing(merge(choices)) as deltas:
                async for delta in deltas:
                    num_unfinished -= delta.tokens.finish is not None
                    if delta.tokens.finish is not None and not num_unfinished:
                        reason = delta.tokens.finish
                    yield delta
        except QueueFull as error:
            self._timer.rejected(error.reason)
            raise
        except Exception:
            reason = "error"
            raise
        finally:
            self._timer.finish(reason)

    async def _choice(
        self, choice: int, prompt: int, sampling: SamplingParams
    ) -> AsyncGenerator[TextDelta, None]:
        """The text deltas of one choice, once it is admitted to the engine."""
        job, service = self.job, self._service
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
            async with (
                asyncio.timeout(job.deadline - time.monotonic()),
                service.admission.slot(job.key, len(request.prompt_ids), job.priority),
            ):
                self._record_admission()
                async with aclosing(service.engine.stream(request, choice)) as deltas:
                    async for delta in deltas:
                        self._record(prompt, delta)
                        yield delta
        except TimeoutError:
            error = DeadlineExceeded("the request ran out of time", job.deadline_by_client)
            raise error from None

    def _record_admission(self) -> None:
        if self._times.scheduled is None:
            self._times.scheduled = time.monotonic()
            self._timer.scheduled()

    def _record(self, prompt: int, delta: TextDelta) -> None:
        tokens, choice = delta.tokens, delta.choice
        self._cached.setdefault(prompt, tokens.num_cached_tokens)
        if tokens.stats is not None:
            self._stats.append(tokens.stats)
            self._service.key_speculation.add(self.job.key, tokens.stats)
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
