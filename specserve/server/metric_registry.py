"""Prometheus metrics that carry the model's name and cannot grow without bound.

Owns a registry of its own, so that several servers fit into one process. Knows no metric by name.
A family never holds more than `MAX_SERIES` series: what comes later is counted as "other".
"""

from typing import Final, Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics import MetricWrapperBase

MAX_SERIES: Final = 256
OTHER: Final = "other"
OPENMETRICS: Final = "application/openmetrics-text"
# With any other escaping the library turns the colons of our names into underscores.
OPENMETRICS_ACCEPTED: Final = f"{OPENMETRICS};version=1.0.0;escaping=allow-utf-8"
LABELS: Final = ("model_name", "engine")

M = TypeVar("M", bound=MetricWrapperBase)


class Family(Generic[M]):
    """One metric with labels; called with their values it gives the series."""

    def __init__(self, metric: M, constant: tuple[str, ...]) -> None:
        self._metric = metric
        self._constant = constant
        self._series: dict[tuple[str, ...], M] = {}

    def __call__(self, *values: str) -> M:
        series = self._series.get(values)
        if series is None:
            if len(self._series) >= MAX_SERIES - 1:
                values = (OTHER,) * len(values)
            series = self._metric.labels(*self._constant, *map(printable, values))
            self._series[values] = series
        return series

    def clear(self) -> None:
        self._series.clear()
        self._metric.clear()


class MetricRegistry:
    """Every metric has the labels `model_name` and `engine`, as vLLM's have."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._constant = (printable(model_name), "0")

    def counters(self, name: str, help: str, *labels: str) -> Family[Counter]:
        metric = Counter(name, help, (*LABELS, *labels), registry=self._registry)
        return Family(metric, self._constant)

    def gauges(self, name: str, help: str, *labels: str) -> Family[Gauge]:
        metric = Gauge(name, help, (*LABELS, *labels), registry=self._registry)
        return Family(metric, self._constant)

    def counter(self, name: str, help: str) -> Counter:
        return self.counters(name, help)()

    def gauge(self, name: str, help: str) -> Gauge:
        return self.gauges(name, help)()

    def histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(name, help, LABELS, registry=self._registry, buckets=buckets)
        return metric.labels(*self._constant)

    def render(self, accept: str) -> tuple[bytes, str]:
        """All metrics and their content type: OpenMetrics if the Accept header asks for it."""
        encode, content_type = choose_encoder(OPENMETRICS_ACCEPTED if OPENMETRICS in accept else "")
        return encode(self._registry), content_type


def printable(text: str) -> str:
    """Text that UTF-8 can spell."""
    return text.encode(errors="replace").decode()
