"""Metrics: values and names, counters that never decrease, and a bounded number of series."""

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from specserve.engine.limits import Limits
from specserve.engine.metrics import DrafterStats, EngineInfo, EngineStats
from specserve.process.engine_process import EngineProcess
from specserve.server import metrics as server_metrics
from specserve.server.event_loop_lag import watch_lag
from specserve.server.metric_registry import MAX_SERIES
from specserve.server.metrics import MAX_POSITIONS, ServerMetrics
from specserve.server.status_line import format_status
from specserve.types import SpecStats

INFO = EngineInfo(
    Limits(97, 512, 512, 4096, True, ("ngram",)), 16, 8, 8, "cpu", "int8", "float32", True
)
GRAFANA = Path(server_metrics.__file__).with_name("grafana.json")
METRIC_NAME = re.compile(r"\b(?:vllm|specserve):\w+")

# The library's strict parser has no types.
parse_openmetrics: Callable[[str], Iterable[Metric]] = openmetrics.text_string_to_metric_families

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@dataclass
class FakeEngine:
    """The attributes of an engine process that the metrics read."""

    state: str = "ready"
    info: EngineInfo | None = INFO
    num_restarts: int = 0
    num_open_streams: int = 0


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def snapshot(scale: int = 1, **changes: object) -> EngineStats:
    """A plausible snapshot; totals grow with `scale`."""
    ngram = DrafterStats("ngram", True, 9 * scale, (4 * scale, 2 * scale), (3 * scale, scale))
    predictions = DrafterStats("prediction", True, 2 * scale, (scale,), (0,))
    stats = EngineStats(
        num_steps=5 * scale,
        num_running=2,
        num_waiting=1,
        num_preemptions=scale,
        prompt_tokens=30 * scale,
        prefix_cache_queries=30 * scale,
        prefix_cache_hits=12 * scale,
        kv_slots_total=4096,
        kv_slots_allocated=1024,
        kv_slots_used=1000,
        kv_blocks_idle=3,
        draft_seconds=0.5 * scale,
        forward_seconds=2.0 * scale,
        sample_seconds=0.25 * scale,
        commit_seconds=0.125 * scale,
        speculation=SpecStats(
            num_spec_steps=6 * scale,
            num_draft_tokens=7 * scale,
            num_accepted_draft_tokens=4 * scale,
            num_emitted_tokens=10 * scale,
            acceptance_histogram=(3 * scale, 2 * scale, scale),
            drafted_by_depth=(4 * scale, 2 * scale),
            accepted_by_depth=(3 * scale, scale),
        ),
        drafters=(ngram,),
        predictions=predictions,
    )
    return msgspec.structs.replace(stats, **changes)


def samples(metrics: ServerMetrics) -> Samples:
    """Every sample except the creation times, by name and own labels."""
    found: Samples = {}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "toy"
            assert labels.pop("engine") == "0"
            if not sample.name.endswith("_created"):
                found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


def value(metrics: ServerMetrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, tuple(sorted(labels.items()))]


def observed(metrics: ServerMetrics, name: str) -> tuple[float, float]:
    """Count and sum of a histogram."""
    return value(metrics, f"{name}_count"), value(metrics, f"{name}_sum")


def watched() -> tuple[ServerMetrics, FakeEngine]:
    metrics, engine = ServerMetrics("toy"), FakeEngine()
    metrics.watch(cast(EngineProcess, engine), lambda: 3)
    return metrics, engine


def test_engine_metrics() -> None:
    metrics, engine = watched()
    engine.num_open_streams = 4
    metrics.on_stats(snapshot(1))
    metrics.on_stats(snapshot(3))
    found = samples(metrics)
    expected = {
        "vllm:num_requests_running": 2,
        "vllm:num_requests_waiting": 1 + 3,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:prompt_tokens_total": 90,
        "vllm:generation_tokens_total": 30,
        "vllm:prefix_cache_queries_total": 90,
        "vllm:prefix_cache_hits_total": 36,
        "vllm:num_preemptions_total": 3,
        "vllm:spec_decode_num_drafts_total": 12,
        "vllm:spec_decode_num_draft_tokens_total": 21,
        "vllm:spec_decode_num_accepted_tokens_total": 12,
        "specserve:steps_total": 15,
        "specserve:draft_seconds_total": 1.5,
        "specserve:forward_seconds_total": 6.0,
        "specserve:sample_seconds_total": 0.75,
        "specserve:commit_seconds_total": 0.375,
        "specserve:kv_slots_used": 1000,
        "specserve:kv_slots_allocated": 1024,
        "specserve:kv_slots_total": 4096,
        "specserve:open_streams": 4,
        "specserve:engine_up": 1,
    }
    assert {name: found[name, ()] for name in expected} == expected
    by_label = {
        ("vllm:spec_decode_num_accepted_tokens_per_pos_total", "position", "0"): 9,
        ("vllm:spec_decode_num_accepted_tokens_per_pos_total", "position", "1"): 3,
        ("specserve:spec_decode_num_drafts_per_pos_total", "position", "1"): 6,
        ("specserve:nodes_proposed_total", "drafter", "ngram"): 27,
        ("specserve:nodes_verified_total", "drafter", "ngram"): 18,
        ("specserve:nodes_accepted_total", "drafter", "ngram"): 12,
        ("specserve:nodes_proposed_total", "drafter", "prediction"): 6,
        ("specserve:drafter_active", "drafter", "ngram"): 1,
    }
    for (name, label, text), number in by_label.items():
        assert found[name, ((label, text),)] == number
    assert found["vllm:cache_config_info", (("block_size", "16"), ("num_gpu_blocks", "256"))] == 1


def test_tokens_per_step_are_observed() -> None:
    metrics, _ = watched()
    first = snapshot(1)
    metrics.on_stats(first)
    metrics.on_stats(msgspec.structs.replace(first, num_steps=6, prompt_tokens=37))
    metrics.on_stats(msgspec.structs.replace(first, num_steps=6, prompt_tokens=37))  # a heartbeat
    assert observed(metrics, "vllm:iteration_tokens_total") == (1, 7)


def test_gauges_are_zero_without_a_ready_engine() -> None:
    metrics, engine = watched()
    metrics.on_stats(snapshot(1))
    engine.state = "restarting"
    assert value(metrics, "specserve:engine_up") == 0
    assert value(metrics, "vllm:num_requests_running") == 0
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0
    assert value(metrics, "vllm:num_requests_waiting") == 3
    assert value(metrics, "vllm:prompt_tokens_total") == 30


def test_a_restart_is_counted_once_and_totals_continue() -> None:
    metrics, engine = watched()
    metrics.on_stats(snapshot(2))
    engine.num_restarts = 1
    assert value(metrics, "specserve:engine_restarts_total") == 1
    metrics.on_stats(snapshot(3))  # more than before: only the restart tells that it began at 0
    assert value(metrics, "specserve:engine_restarts_total") == 1
    assert value(metrics, "vllm:prompt_tokens_total") == 30 * 5
    assert observed(metrics, "vllm:iteration_tokens_total") == (0, 0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), max_size=6).map(sorted), min_size=1, max_size=5))
def test_counters_never_decrease_and_add_up_over_restarts(engines: list[list[int]]) -> None:
    """`engines`: the totals in the snapshots of each engine process in turn."""
    metrics, engine = watched()
    before: dict[str, float] = {}
    for number, scales in enumerate(engines):
        engine.num_restarts = number
        for scale in scales:
            metrics.on_stats(snapshot(scale))
            lines = metrics.render()[0].decode().splitlines()
            pairs = (line.rsplit(" ", 1) for line in lines if "_total{" in line)
            now = {series: float(number) for series, number in pairs}
            assert [series for series in before if now[series] < before[series]] == []
            before = now
    total = sum(scales[-1] for scales in engines if scales)
    found = samples(metrics)
    if any(engines):
        assert found["vllm:prompt_tokens_total", ()] == 30 * total
        assert found["specserve:nodes_accepted_total", (("drafter", "ngram"),)] == 4 * total
    assert found["specserve:engine_restarts_total", ()] == len(engines) - 1


def test_request_times() -> None:
    clock = Clock()
    metrics = ServerMetrics("toy", clock)
    timer = metrics.request(num_prompt_tokens=7, max_tokens=20, n=1)
    for wait, count in ((3.0, 1), (0.25, 4), (0.75, 2)):
        clock.now += wait
        if count == 1:
            timer.scheduled()
            clock.now += 1.0
            timer.scheduled()  # another choice: the first has its place since a second
        timer.tokens(count)
    clock.now += 0.5
    timer.finish("stop")
    timer.finish("abort")  # what cleans up says it again
    assert observed(metrics, "vllm:time_to_first_token_seconds") == (1, 4.0)
    assert observed(metrics, "vllm:inter_token_latency_seconds") == (2, 1.0)
    assert observed(metrics, "vllm:request_time_per_output_token_seconds") == (1, 1.0 / 6)
    assert observed(metrics, "vllm:request_queue_time_seconds") == (1, 3.0)
    assert observed(metrics, "vllm:request_prefill_time_seconds") == (1, 1.0)
    assert observed(metrics, "vllm:request_decode_time_seconds") == (1, 1.0)
    assert observed(metrics, "vllm:request_inference_time_seconds") == (1, 2.0)
    assert observed(metrics, "vllm:e2e_request_latency_seconds") == (1, 5.5)
    assert observed(metrics, "vllm:request_prompt_tokens") == (1, 7)
    assert observed(metrics, "vllm:request_generation_tokens") == (1, 7)
    assert observed(metrics, "vllm:request_params_max_tokens") == (1, 20)
    assert observed(metrics, "vllm:request_params_n") == (1, 1)
    assert value(metrics, "vllm:request_success_total", finished_reason="stop") == 1
    assert value(metrics, "vllm:request_success_total", finished_reason="abort") == 0


def test_inter_token_latency_is_measured_per_choice() -> None:
    clock = Clock()
    metrics = ServerMetrics("toy", clock)
    timer = metrics.request(num_prompt_tokens=3, max_tokens=9, n=2)
    timer.scheduled()
    for choice in (0, 1, 0, 1):
        clock.now += 1.0
        timer.tokens(1, choice)
    timer.finish("length")
    assert observed(metrics, "vllm:time_to_first_token_seconds") == (1, 1.0)
    assert observed(metrics, "vllm:inter_token_latency_seconds") == (2, 4.0)
    assert observed(metrics, "vllm:request_time_per_output_token_seconds") == (2, 4.0)
    assert observed(metrics, "vllm:request_generation_tokens") == (2, 4)
    assert observed(metrics, "vllm:request_decode_time_seconds") == (1, 3.0)


def test_a_request_aborted_in_the_queue_has_no_engine_times() -> None:
    metrics = ServerMetrics("toy")
    metrics.request(num_prompt_tokens=3, max_tokens=9, n=1).finish("abort")
    assert value(metrics, "vllm:request_success_total", finished_reason="abort") == 1
    assert value(metrics, "vllm:e2e_request_latency_seconds_count") == 1
    for name in ("queue", "prefill", "decode", "inference"):
        assert value(metrics, f"vllm:request_{name}_time_seconds_count") == 0
    assert value(metrics, "vllm:time_to_first_token_seconds_count") == 0


def test_a_rejected_request_does_not_count_as_finished() -> None:
    metrics = ServerMetrics("toy")
    timer = metrics.request(num_prompt_tokens=3, max_tokens=9, n=1)
    timer.rejected("max_queued_tokens")
    timer.finish("error")
    found = samples(metrics)
    admission = "vllm:admission_rejections_total"
    assert found[admission, (("reason", "max_num_queued_tokens"),)] == 1
    assert found[admission, (("reason", "max_num_queued_reqs"),)] == 0
    assert sum(v for (name, _), v in found.items() if name == "vllm:request_success_total") == 0
    assert found["vllm:e2e_request_latency_seconds_count", ()] == 0


def test_the_number_of_series_is_bounded() -> None:
    metrics = ServerMetrics("toy")
    for number in range(2 * MAX_SERIES):
        metrics.answered(f"/{number}\ud800", 200, 0.1)
    deep = tuple(range(200, 0, -1))
    speculation = SpecStats(accepted_by_depth=deep, drafted_by_depth=deep)
    metrics.on_stats(snapshot(1, speculation=speculation))
    found = samples(metrics)
    series = Counter(name for name, _ in found)
    assert series["specserve:http_requests_total"] == MAX_SERIES
    others = (("route", "other"), ("status", "other"))
    assert found["specserve:http_requests_total", others] == MAX_SERIES + 1
    positions = {
        int(dict(labels)["position"])
        for name, labels in found
        if name == "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    }
    assert positions == set(range(MAX_POSITIONS))


def test_two_servers_in_one_process_do_not_mix() -> None:
    first, second = ServerMetrics("toy"), ServerMetrics("toy")
    first.answered("/v1/models", 200, 0.1)
    first.connections.inc()
    assert value(first, "specserve:connections") == 1
    assert value(second, "specserve:connections") == 0
    assert "specserve:http_requests_total" not in {name for name, _ in samples(second)}


@pytest.mark.parametrize("accept", ["", "*/*", "text/plain", "nonsense;;q=,", "text/html;q=0.9"])
def test_plain_text_by_default(accept: str) -> None:
    body, content_type = everything().render(accept)
    assert content_type.startswith("text/plain; version=0.0.4")
    assert not body.endswith(b"# EOF\n")
    assert list(text_string_to_metric_families(body.decode()))


@pytest.mark.parametrize("parameters", ["", ";version=1.0.0;q=0.5", ";version=1.0.0;escaping=dots"])
def test_openmetrics_on_request(parameters: str) -> None:
    metrics = everything()
    accept = f"application/openmetrics-text{parameters},text/plain;version=0.0.4;q=0.2"
    body, content_type = metrics.render(accept)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    found = {s.name for family in parse_openmetrics(body.decode()) for s in family.samples}
    assert {name for name, _ in samples(metrics)} <= found


def everything() -> ServerMetrics:
    """Metrics with at least one series of each."""
    metrics, _ = watched()
    metrics.on_stats(snapshot(1))
    metrics.answered("/v1/models", 200, 0.1)
    return metrics


def expressions(node: object) -> Iterator[str]:
    """Every PromQL expression and query of a dashboard."""
    match node:
        case dict():
            for key, child in node.items():
                if key in ("expr", "query") and isinstance(child, str):
                    yield child
                yield from expressions(child)
        case list():
            for child in node:
                yield from expressions(child)


def test_the_dashboard_uses_existing_metrics() -> None:
    found = list(expressions(json.loads(GRAFANA.read_text())))
    asked = {name for text in found for name in METRIC_NAME.findall(text)}
    served = {name for name, _ in samples(everything())}
    assert asked - served == set()
    family = re.compile(r"_(bucket|sum|count)$")
    assert {family.sub("", name) for name in served} - {family.sub("", n) for n in asked} == set()


def test_every_panel_selects_a_model_and_overlaps_no_other() -> None:
    panels = json.loads(GRAFANA.read_text())["panels"]
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Traffic", "Latency", "Speculation", "Engine", "Health"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}) == len(panels)
    for panel in panels:
        for text in expressions(panel):
            assert text.count("(") == text.count(")")
            names = METRIC_NAME.findall(text)
            assert text.count('{model_name=~"$model_name"}') == len(names) > 0


def test_the_lag_of_a_blocked_loop() -> None:
    metrics = ServerMetrics("toy")

    async def scenario() -> None:
        task = asyncio.create_task(watch_lag(metrics))
        await asyncio.sleep(0)
        time.sleep(0.4)  # nobody else gets a turn
        await asyncio.sleep(0.15)
        task.cancel()
        assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], BaseException)

    asyncio.run(scenario())
    count, seconds = observed(metrics, "specserve:event_loop_lag_seconds")
    assert count >= 1
    assert seconds >= 0.25


def test_the_status_line() -> None:
    assert format_status(snapshot(1), snapshot(3), 2.0, num_queued=4) == (
        "Avg prompt throughput: 30.0 tokens/s, Avg generation throughput: 10.0 tokens/s, "
        "Running: 2 reqs, Waiting: 5 reqs, KV cache usage: 25.0%, Prefix cache hit rate: 40.0%, "
        "SpecDecoding metrics: Mean acceptance length: 2.00, "
        "Accepted throughput: 4.00 tokens/s, Drafted throughput: 7.00 tokens/s, "
        "Accepted: 8 tokens, Drafted: 14 tokens, Per-position acceptance rate: 0.750, 0.250, "
        "Avg Draft acceptance rate: 57.1%"
    )


def test_no_status_line_while_idle() -> None:
    idle = snapshot(1, num_running=0, num_waiting=0)
    assert format_status(idle, idle, 10.0) is None
    assert format_status(idle, idle, 10.0, num_queued=1) is not None
    stuck = format_status(snapshot(1), snapshot(1), 10.0)
    assert stuck is not None
    assert "generation throughput: 0.0 tokens/s, Running: 2" in stuck
    assert "SpecDecoding" not in stuck


@pytest.mark.parametrize("before", [None, snapshot(9)])
def test_the_status_after_a_restart_counts_from_zero(before: EngineStats | None) -> None:
    line = format_status(before, snapshot(2), 10.0)
    assert line is not None
    assert line.startswith("Avg prompt throughput: 6.0 tokens/s")
    assert "Accepted: 8 tokens" in line
