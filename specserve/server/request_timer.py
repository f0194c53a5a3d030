"""Measures the times and sizes of one request in the HTTP process.

Queue time lasts from the arrival until `scheduled`, prefill until the first token (waiting inside
the engine included) and decoding until the last token. Tokens arrive in token chunks: with
speculation the gap between chunks is not the time per token, so both are measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from specserve.server.metric_registry import MetricRegistry
from specserve.types import FinishReason

# Bucket bounds in seconds: from a tiny model on a CPU to a long answer of a large model.
SECONDS: Final = tuple(digit * 10.0**power for power in range(-3, 3) for digit in (1.0, 2.5, 5.0))
SIZES: Final = tuple(digit * 10.0**power for power in range(6) for digit in (1.0, 2.0, 5.0))
CHOICES: Final = tuple(2.0**power for power in range(8))
FINISH_REASONS: Final[tuple[FinishReason, ...]] = ("stop", "length", "abort", "error")
# Why a full queue refuses a request: `FullReason` of `admission.py` to vLLM's label value.
QUEUE_REASONS: Final = {
    "max_queued_requests": "max_num_queued_reqs",
    "max_queued_tokens": "max_num_queued_tokens",
}


class RequestMetrics:
    """The metrics that all requests share."""

    def __init__(self, registry: MetricRegistry) -> None:
        def seconds(name: str, help: str) -> Callable[[float], None]:
            return registry.histogram(f"vllm:{name}_seconds", help, SECONDS).observe

        def sizes(name: str, help: str, buckets: tuple[float, ...]) -> Callable[[float], None]:
            return registry.histogram(f"vllm:{name}", help, buckets).observe

        self.first_token = seconds("time_to_first_token", "Arrival to the first token.")
        self.inter_token = seconds("inter_token_latency", "Between two token chunks of one choice.")
        self.per_token = seconds(
            "request_time_per_output_token", "Decoding time of a choice per token after its first."
        )
        self.end_to_end = seconds("e2e_request_latency", "Arrival to the end.")
        self.queue = seconds("request_queue_time", "Arrival until the engine had the request.")
        self.prefill = seconds("request_prefill_time", "In the engine until the first token.")
        self.decode = seconds("request_decode_time", "First token to last token.")
        self.inference = seconds("request_inference_time", "In the engine until the last token.")
        self.prompt_tokens = sizes("request_prompt_tokens", "Prompt tokens per request.", SIZES)
        self.generation_tokens = sizes(
            "request_generation_tokens", "Generated tokens per choice.", SIZES
        )
        self.max_tokens = sizes("request_params_max_tokens", "max_tokens of the request.", SIZES)
        self.n = sizes("request_params_n", "n of the request.", CHOICES)
        self.finished = registry.counters(
            "vllm:request_success", "Requests that ended, by reason.", "finished_reason"
        )
        for outcome in FINISH_REASONS:
            self.finished(outcome)
        self._queue_full = registry.counters(
            "vllm:admission_rejections", "Requests refused by a full queue.", "reason"
        )
        for reason in QUEUE_REASONS.values():
            self._queue_full(reason)

    def rejected(self, reason: str) -> None:
        self._queue_full(QUEUE_REASONS[reason]).inc()


@dataclass(slots=True)
class _Choice:
    first: float
    last: float
    num_tokens: int


class RequestTimer:
    """Records the events of one request as they happen. Calls after its end have no effect."""

    def __init__(
        self,
        metrics: RequestMetrics,
        clock: Callable[[], float],
        num_prompt_tokens: int,
        max_tokens: int,
        n: int,
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._num_prompt_tokens = num_prompt_tokens
        self._max_tokens = max_tokens
        self._n = n
        self._choices: dict[int, _Choice] = {}
        self._finished = False
        self.num_chunks = 0
        self.num_tokens = 0
        # Times by `clock`: the first admission of a choice, the first and the last token chunk.
        self.arrived = self.last = clock()
        self.admitted: float | None = None
        self.first: float | None = None

    def scheduled(self) -> None:
        """The request was admitted to the engine; only the first call counts."""
        if self.admitted is None:
            self.admitted = self._clock()

    def tokens(self, count: int, choice: int = 0) -> None:
        """A token chunk of `count` > 0 tokens of one choice is sent."""
        self.last = now = self._clock()
        self.num_chunks += 1
        self.num_tokens += count
        if self.first is None:
            self.first = now
            self._metrics.first_token(now - self.arrived)
        seen = self._choices.get(choice)
        if seen is not None:
            self._metrics.inter_token(now - seen.last)
            seen.last = now
            seen.num_tokens += count
        else:
            self._choices[choice] = _Choice(now, now, count)

    def finish(self, reason: FinishReason) -> None:
        """The request is over, with all its choices; only the first call counts."""
        if self._finished:
            return
        self._finished = True
        metrics = self._metrics
        metrics.finished(reason).inc()
        metrics.end_to_end(self._clock() - self.arrived)
        metrics.prompt_tokens(self._num_prompt_tokens)
        metrics.max_tokens(self._max_tokens)
        metrics.n(self._n)
        if self.admitted is not None:
            metrics.queue(self.admitted - self.arrived)
        for each in self._choices.values():
            metrics.generation_tokens(each.num_tokens)
            if each.num_tokens > 1:
                metrics.per_token((each.last - each.first) / (each.num_tokens - 1))
        if self.admitted is not None and self.first is not None:
            metrics.prefill(self.first - self.admitted)
            metrics.decode(self.last - self.first)
            metrics.inference(self.last - self.admitted)

    def rejected(self, reason: str) -> None:
        """A full queue refused the request: it counts as rejected and not as finished."""
        if not self._finished:
            self._finished = True
            self._metrics.rejected(reason)
