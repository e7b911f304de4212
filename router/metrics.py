"""Prometheus collectors, in a registry of our own."""

import itertools
import platform
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from router import __version__
from router.core.bounds import conflicts
from router.core.types import NodeView
from router.tally import SECONDS, Tally

# A pool whose nodes agree on nothing shall not become as many series as it has models.
_CONFLICTS_MAX = 100
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """What ollamux exports. `nodes` gives the pool's snapshot at each scrape."""

    def __init__(self, nodes: Callable[[], Sequence[NodeView]]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second gauge for every counter, which nobody asked for
        self.registry = CollectorRegistry()
        self.registry.register(_Nodes(nodes))
        self.requests = Tally()
        self.registry.register(self.requests)
        self._node_metrics()
        self._config_metrics()

    def _node_metrics(self) -> None:
        self.probe_duration = self._seconds(
            "node_probe_duration", "Probes by what was asked.", "node", "probe"
        )
        self.probe_failures = self._counter(
            "node_probe_failures", "Probes without a usable answer.", "node", "probe"
        )

    def _config_metrics(self) -> None:
        self.generation = self._gauge("config_generation", "Number of the configuration in force.")
        self.reloads = self._counter("config_reloads", "Reloads by result.", "result")
        self.reload_ok = self._gauge(
            "config_last_reload_successful", "0 while the file on disk is one that was refused."
        )
        self.last_success = self._gauge(
            "config_last_success_timestamp_seconds",
            "When the file was last read and had no mistake.",
        )
        info = Gauge(
            "ollamux_build_info", "Version in force.", ("version", "python"), registry=self.registry
        )
        info.labels(__version__, platform.python_version()).set(1)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"ollamux_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"ollamux_{name}", text, registry=self.registry)

    def _seconds(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(
            f"ollamux_{name}_seconds", text, labels, registry=self.registry, buckets=SECONDS
        )

    def probe(self, node: str, what: str, seconds: float, *, usable: bool) -> None:
        self.probe_duration.labels(node, what).observe(seconds)
        failures = self.probe_failures.labels(node, what)
        if not usable:
            failures.inc()

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)


class _Nodes(Collector):
    """Gauges of the nodes as they are now, so that one that is removed leaves nothing behind."""

    def __init__(self, nodes: Callable[[], Sequence[NodeView]]) -> None:
        self._nodes = nodes

    def describe(self) -> Iterable[Metric]:
        return self._families([])

    def collect(self) -> Iterable[Metric]:
        return self._families(self._nodes())

    @staticmethod
    def _families(nodes: Sequence[NodeView]) -> Iterable[Metric]:
        up = GaugeMetricFamily("ollamux_node_up", "1 while probes answer.", labels=["node"])
        busy = GaugeMetricFamily("ollamux_node_in_flight", "Leases held.", labels=["node"])
        slots = GaugeMetricFamily("ollamux_node_slots", "Slots per model.", labels=["node"])
        present = GaugeMetricFamily(
            "ollamux_node_models_present", "Models on disk that may be used.", labels=["node"]
        )
        resident = GaugeMetricFamily(
            "ollamux_node_model_resident", "1 per model in memory.", labels=["node", "model"]
        )
        conflict = GaugeMetricFamily(
            "ollamux_model_digest_conflict",
            "1 while nodes that are up have different models of this name.",
            labels=["model"],
        )
        up_now = ((node.spec.name, node.present) for node in nodes if node.up and not node.leaving)
        for key in itertools.islice(conflicts(up_now), _CONFLICTS_MAX):
            conflict.add_metric([key], 1)
        for node in nodes:
            name = [node.spec.name]
            up.add_metric(name, node.up)
            busy.add_metric(name, node.in_flight)
            slots.add_metric(name, node.spec.slots)
            present.add_metric(name, len(node.present))
            for key in node.resident:
                resident.add_metric([node.spec.name, key], 1)
        return [up, busy, slots, present, resident, conflict]
