"""Prometheus metrics that carry the model's name and have a bounded number of series.

It owns its own registry, so that several servers fit into one process, and knows no metric by name.
A family holds at most `MAX_SERIES` series: further label values are counted under "other".
"""

from typing import Final, Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics import MetricWrapperBase

MAX_SERIES: Final = 256
OTHER: Final = "other"
OPENMETRICS: Final = "application/openmetrics-text"
# With any other escaping the library replaces the colons in metric names by underscores.
OPENMETRICS_ACCEPTED: Final = f"{OPENMETRICS};version=1.0.0;escaping=allow-utf-8"
LABELS: Final = ("model_name", "engine")

M = TypeVar("M", bound=MetricWrapperBase)


class Family(Generic[M]):
    """One metric with labels; calling it with label values returns the series."""

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
    """Creates metrics. Each has the labels `model_name` and `engine`, as in vLLM."""

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
    """`text` with characters that UTF-8 cannot encode replaced by "?"."""
    return text.encode(errors="replace").decode()
