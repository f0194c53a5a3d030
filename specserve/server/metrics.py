"""The server's Prometheus metrics: vLLM's names, and further ones under `specserve:`.

It does not know HTTP or sockets: other modules report values, and engine gauges are read at each
scrape. An engine counts from 0 again after a restart; the counters here never decrease.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from specserve.engine.metrics import DrafterStats, EngineStats
from specserve.process.engine_process import EngineProcess
from specserve.server.metric_registry import MetricRegistry
from specserve.server.request_timer import SECONDS, SIZES, RequestMetrics, RequestTimer

MAX_POSITIONS: Final = 64  # depths of a tree that have series
LAG_SECONDS: Final = (0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.3, 1.0, 3.0, 10.0)

# The engine's counters: name, help, function that reads the total from a snapshot.
TOTALS: Final[tuple[tuple[str, str, Callable[[EngineStats], float]], ...]] = (
    ("vllm:prompt_tokens", "Prompt tokens of the requests started.", lambda s: s.prompt_tokens),
    ("vllm:generation_tokens", "Tokens generated.", lambda s: s.generation_tokens),
    (
        "vllm:prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
        lambda s: s.prefix_cache_queries,
    ),
    ("vllm:prefix_cache_hits", "Prompt tokens found in it.", lambda s: s.prefix_cache_hits),
    ("vllm:num_preemptions", "Sequences preempted.", lambda s: s.num_preemptions),
    ("vllm:spec_decode_num_drafts", "Drafts verified.", lambda s: s.num_drafts),
    ("vllm:spec_decode_num_draft_tokens", "Nodes verified.", lambda s: s.num_draft_tokens),
    ("vllm:spec_decode_num_accepted_tokens", "Nodes accepted.", lambda s: s.num_accepted_tokens),
    ("specserve:steps", "Passes of the target model over a batch.", lambda s: s.num_steps),
    ("specserve:draft_seconds", "Time spent drafting.", lambda s: s.draft_seconds),
    ("specserve:forward_seconds", "Time in the target model.", lambda s: s.forward_seconds),
    ("specserve:sample_seconds", "Time spent verifying.", lambda s: s.sample_seconds),
    ("specserve:commit_seconds", "Time spent on KV and results.", lambda s: s.commit_seconds),
)
TOTALS_BY_POSITION: Final[tuple[tuple[str, str, Callable[[EngineStats], Sequence[int]]], ...]] = (
    (
        "vllm:spec_decode_num_accepted_tokens_per_pos",
        "Drafts accepted to this depth, 0 first, or deeper.",
        lambda s: s.speculation.accepted_by_depth,
    ),
    (
        "specserve:spec_decode_num_drafts_per_pos",
        "Drafts that reached this depth, 0 first, or deeper.",
        lambda s: s.speculation.drafted_by_depth,
    ),
)
TOTALS_BY_DRAFTER: Final[tuple[tuple[str, str, Callable[[DrafterStats], int]], ...]] = (
    ("specserve:nodes_proposed", "Nodes, before trees are merged.", lambda d: d.num_proposed),
    ("specserve:nodes_verified", "Nodes of merged trees.", lambda d: d.num_verified),
    ("specserve:nodes_accepted", "Nodes accepted.", lambda d: d.num_accepted),
)
# Values of the latest snapshot of a ready engine, else 0.
GAUGES: Final[tuple[tuple[str, str, Callable[[EngineStats], float]], ...]] = (
    ("vllm:num_requests_running", "Sequences in the batch.", lambda s: s.num_running),
    (
        "vllm:kv_cache_usage_perc",
        "Share of the KV pool held by running sequences, 0 to 1.",
        lambda s: s.kv_slots_allocated / max(s.kv_slots_total, 1),
    ),
    ("specserve:kv_slots_total", "Token slots of the KV pool.", lambda s: s.kv_slots_total),
    (
        "specserve:kv_slots_allocated",
        "Slots in blocks held by running sequences.",
        lambda s: s.kv_slots_allocated,
    ),
    ("specserve:kv_slots_used", "Of those, with valid KV.", lambda s: s.kv_slots_used),
)
Totals = dict[tuple[str, tuple[str, ...]], float]  # by metric name and label values


class ServerMetrics:
    """All metrics of one server.

    Other modules set `connections`, `body_bytes`, `tokenizer_jobs_waiting`, `tokenize_seconds` and
    `event_loop_lag`.
    """

    def __init__(self, model_name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry = registry = MetricRegistry(model_name)
        self._clock = clock
        self._requests = RequestMetrics(registry)
        self._engine: EngineProcess | None = None
        self._num_queued: Callable[[], int] = lambda: 0
        self._num_restarts = 0  # engine restarts counted so far
        self._stats: EngineStats | None = None  # latest snapshot of this engine process
        self._totals: Totals = {}  # of that snapshot
        self._counters = {
            name: registry.counters(name, help, *labels)
            for labels, table in (
                ((), TOTALS),
                (("position",), TOTALS_BY_POSITION),
                (("drafter",), TOTALS_BY_DRAFTER),
            )
            for name, help, _ in table
        }
        self._restarts = registry.counter("specserve:engine_restarts", "Restarts of the engine.")
        self._iteration_tokens = registry.histogram(
            "vllm:iteration_tokens_total", "Prompt and generated tokens per step.", SIZES
        )
        self._cache_config = registry.gauges(
            "vllm:cache_config_info", "The KV pool.", "block_size", "num_gpu_blocks"
        )
        self._drafter_active = registry.gauges(
            "specserve:drafter_active", "0: it kept failing and was switched off.", "drafter"
        )
        self._add_gauges()
        self.connections = registry.gauge("specserve:connections", "Client connections.")
        self.body_bytes = registry.gauge(
            "specserve:body_bytes", "Bytes of the bodies of open requests."
        )
        self.tokenizer_jobs_waiting = registry.gauge(
            "specserve:tokenizer_jobs_waiting", "Jobs that wait for a tokenizer process."
        )
        self.tokenize_seconds = registry.histogram(
            "specserve:tokenize_seconds", "Duration of a tokenizer job, waiting included.", SECONDS
        )
        self.event_loop_lag = registry.histogram(
            "specserve:event_loop_lag_seconds", "How late a timer fires.", LAG_SECONDS
        )
        self._http_requests = registry.counters(
            "specserve:http_requests", "HTTP requests answered.", "route", "status"
        )
        self._http_seconds = registry.histogram(
            "specserve:http_request_seconds", "HTTP request to the end of its answer.", SECONDS
        )

    def _add_gauges(self) -> None:
        """Register the gauges that are read at each scrape."""
        gauge = self._registry.gauge
        for name, help, read in GAUGES:
            gauge(name, help).set_function(partial(self._now, read))
        gauge(
            "vllm:num_requests_waiting", "Sequences that wait, in the server or the engine."
        ).set_function(lambda: self._num_queued() + self._now(lambda s: s.num_waiting))
        gauge("specserve:engine_up", "1 while it takes requests.").set_function(self._is_up)
        gauge("specserve:open_streams", "Sequences whose engine stream is open.").set_function(
            lambda: self._engine.num_open_streams if self._engine else 0
        )
        gauge("specserve:tasks", "Tasks of the event loop.").set_function(_num_tasks)

    def _now(self, read: Callable[[EngineStats], float]) -> float:
        return read(self._stats) if self._stats is not None and self._is_up() else 0.0

    def watch(self, engine: EngineProcess, num_queued: Callable[[], int]) -> None:
        """Set the engine whose state and restarts are shown, and the length of the queue."""
        self._engine = engine
        self._num_queued = num_queued

    def on_stats(self, stats: EngineStats) -> None:
        """Record the latest snapshot. Counters grow by the difference to the one before."""
        self._notice_restarts()
        before, totals = self._stats, _totals(stats)
        for (name, labels), total in totals.items():
            if total != (known := self._totals.get((name, labels))):
                self._counters[name](*labels).inc(total - (known or 0.0))
        self._stats, self._totals = stats, totals
        for drafter in stats.drafters:
            self._drafter_active(drafter.name).set(drafter.active)
        if before is not None and stats.num_steps == before.num_steps + 1:
            self._iteration_tokens.observe(_num_tokens(stats) - _num_tokens(before))

    def request(self, num_prompt_tokens: int, max_tokens: int, n: int) -> RequestTimer:
        """A timer for a request that arrives now."""
        return RequestTimer(self._requests, self._clock, num_prompt_tokens, max_tokens, n)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count an answered HTTP request. `route` is the pattern of the route, never the path."""
        self._http_requests(route, str(status)).inc()
        self._http_seconds.observe(seconds)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """All metrics and their content type: OpenMetrics if the Accept header asks for it."""
        self._notice_restarts()
        if self._engine is not None and self._engine.info is not None:
            info = self._engine.info
            self._cache_config.clear()
            num_blocks = info.limits.num_kv_slots // info.block_size
            self._cache_config(str(info.block_size), str(num_blocks)).set(1)
        return self._registry.render(accept)

    def _notice_restarts(self) -> None:
        """Count the restarts since the last call; a new engine process counts from 0."""
        if self._engine is not None and self._engine.num_restarts > self._num_restarts:
            self._restarts.inc(self._engine.num_restarts - self._num_restarts)
            self._num_restarts = self._engine.num_restarts
            self._stats, self._totals = None, {}

    def _is_up(self) -> bool:
        return self._engine is None or self._engine.state == "ready"


def _totals(stats: EngineStats) -> Totals:
    """The totals of a snapshot by metric name. `drafter` is a drafter's name or "prediction"."""
    totals: Totals = {(name, ()): read(stats) for name, _, read in TOTALS}
    for name, _, read_depths in TOTALS_BY_POSITION:
        for position, total in enumerate(read_depths(stats)[:MAX_POSITIONS]):
            totals[name, (str(position),)] = total
    for name, _, read_drafter in TOTALS_BY_DRAFTER:
        for drafter in (*stats.drafters, stats.predictions):
            totals[name, (drafter.name,)] = read_drafter(drafter)
    return totals


def _num_tasks() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # no running event loop
        return 0


def _num_tokens(stats: EngineStats) -> int:
    return stats.prompt_tokens + stats.generation_tokens
