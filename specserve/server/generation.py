"""Runs one generation request: its choices run concurrently and yield text deltas.

It uses admission and the engine; it does not know HTTP or the wire format. Closing the generator
`GenerationRun.text_deltas` ends the request and releases its slots.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from msgspec import UNSET, UnsetType, structs

from specserve.async_engine import merge
from specserve.server.admission import QueueFull
from specserve.server.deadline import Deadline
from specserve.server.prediction_usage import PredictionUsage
from specserve.server.protocol.usage import (
    CompletionDetails,
    Metrics,
    PromptDetails,
    Usage,
    speculative_decoding,
)
from specserve.server.service import Service
from specserve.text.text_delta import TextDelta
from specserve.types import FinishReason, Request, SamplingParams, SpecStats


@dataclass(slots=True)
class _PromptScores:
    """The logprobs of one prompt, which its first sample brings, for the other samples."""

    deltas: list[TextDelta] = field(default_factory=list)
    complete: asyncio.Event = field(default_factory=asyncio.Event)

    def record(self, delta: TextDelta) -> None:
        if delta.tokens.prompt_logprobs:
            self.deltas.append(delta)
        else:
            self.complete.set()


class GenerationRun:
    """One running request. `usage` and `metrics` are final once `text_deltas` ends.

    `requests`: one per prompt, all with the id of the whole request and with `sampling.n`, the
    number of choices per prompt; they differ in the prompt only, and have been checked.
    """

    def __init__(self, service: Service, requests: list[Request], deadline: Deadline) -> None:
        request = requests[0]
        self.id = request.id
        self.num_choices = len(requests) * request.sampling.n
        self._service = service
        self._requests = requests
        self._deadline = deadline
        self._key = request.tenant
        self._prediction = request.speculation.prediction
        self._num_prompt = sum(len(each.prompt_ids) for each in requests)
        self._suffix = secrets.token_hex(4)  # makes ids unique: clients choose request ids
        self._scores = [_PromptScores() for _ in requests]
        self._stats: list[SpecStats] = []
        self._predictions: dict[int, PredictionUsage] = {}  # by choice
        self._max_nodes = min(request.speculation.max_nodes or 64, service.engine_info().max_nodes)
        self._cached: dict[int, int] = {}  # prompt index -> tokens found in the prefix cache
        self._timer = service.metrics.request(
            num_prompt_tokens=self._num_prompt,
            max_tokens=request.sampling.max_tokens,
            n=request.sampling.n,
        )

    async def text_deltas(self) -> AsyncGenerator[TextDelta, None]:
        """The text deltas of all choices as they arrive. Choice p * n + i is sample i of prompt p.

        Raises RequestError, QueueFull, EngineUnavailable, GenerationFailed, or APIError after the
        deadline, which ends all choices. Use with `contextlib.aclosing`.
        """
        sampling = self._requests[0].sampling
        samples = list(enumerate(sampling.samples()))
        choices = [
            self._choice(prompt, prompt * sampling.n + i, sample)
            for prompt in range(len(self._requests))
            for i, sample in samples
        ]
        num_unfinished = self.num_choices
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
        self, prompt: int, choice: int, sampling: SamplingParams
    ) -> AsyncGenerator[TextDelta, None]:
        """The text deltas of one choice, once it is admitted to the engine."""
        request = structs.replace(
            self._requests[prompt], id=f"{self.id}-{self._suffix}-{choice}", sampling=sampling
        )
        scores = self._scores[prompt]
        # The engine enforces the deadline too, but not for the wait in the queue.
        async with self._deadline.enforced():
            if sampling.prompt_logprobs != self._requests[prompt].sampling.prompt_logprobs:
                await scores.complete.wait()  # the first sample of the prompt computes them
                for delta in scores.deltas:
                    yield replace(delta, choice=choice)
            async with self._service.admission.slot(
                self._key, len(request.prompt_ids), request.priority
            ):
                self._timer.scheduled()
                async with aclosing(self._service.engine.stream(request, choice)) as deltas:
                    async for delta in deltas:
                        scores.record(delta)
                        self._record(prompt, delta)
                        yield delta

    def _record(self, prompt: int, delta: TextDelta) -> None:
        tokens, choice = delta.tokens, delta.choice
        self._cached.setdefault(prompt, tokens.num_cached_tokens)
        if tokens.stats is not None:
            self._stats.append(tokens.stats)
            self._service.key_totals[self._key].add(tokens.stats)
        self._service.admission.charge(self._key, len(tokens.ids) + len(tokens.prompt_logprobs))
        if not tokens.ids:
            return
        if prediction := self._prediction:
            predicted = self._predictions.setdefault(choice, PredictionUsage(prediction))
            predicted.feed(tokens.ids, tokens.drafter_ids)
        self._timer.tokens(len(tokens.ids), choice)

    def usage(self) -> Usage:
        num_tokens = self._timer.num_tokens
        details: CompletionDetails | UnsetType = UNSET
        if prediction := self._prediction:
            # The best of several choices, so that accepted + rejected = the prediction's length.
            accepted = max((used.num_accepted for used in self._predictions.values()), default=0)
            details = CompletionDetails(accepted, len(prediction) - accepted)
        return Usage(
            self._num_prompt,
            num_tokens,
            self._num_prompt + num_tokens,
            PromptDetails(sum(self._cached.values())),
            details,
        )

    def metrics(self) -> Metrics:
        timer = self._timer
        first_after = generating = rate = gap = None
        if timer.first is not None:
            first_after = 1000 * (timer.first - timer.arrived)
            generating = 1000 * (timer.last - timer.first)
            if generating > 0:
                rate = 1000 * timer.num_tokens / (generating + first_after)
                gap = generating / max(timer.num_chunks - 1, 1)
        queued = None if timer.admitted is None else 1000 * (timer.admitted - timer.arrived)
        return Metrics(
            time_to_first_token_ms=first_after,
            generation_time_ms=generating,
            queue_time_ms=queued,
            mean_itl_ms=gap,
            tokens_per_second=rate,
            speculative_decoding=speculative_decoding(self._stats, self._max_nodes),
        )
