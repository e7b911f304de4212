"""Prometheus collectors, in a registry of our own."""

import platform
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from router import __version__
from router.core.pool import NodeView
from router.log import Ending, Report

_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600,
)  # fmt: skip
_FINE_SECONDS = (0.0001, 0.00025, 0.0005, *_SECONDS)
_WHERE = ("endpoint", "model", "node")
# load_duration of a warm model is a few milliseconds; anything longer had to load.
_COLD_LOAD_S = 0.1
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """What ollamux exports. `nodes` gives the pool's snapshot at each scrape."""

    def __init__(self, nodes: Callable[[], Sequence[NodeView]]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Nodes(nodes))
        self._request_metrics()
        self._node_metrics()
        self._config_metrics()
        self._children: dict[tuple[str, str, str], _Children] = {}

    def _request_metrics(self) -> None:
        self.requests = self._counter("requests", "Requests by how they ended.", *_WHERE, "outcome")
        self.duration = self._seconds("request_duration", "From arrival to the end.", *_WHERE)
        self.ttft = self._seconds(
            "time_to_first_token", "From arrival to the first record sent.", *_WHERE
        )
        self.tpot = self._seconds(
            "time_per_output_token", "Mean time between the tokens of an answer.", *_WHERE
        )
        self.load = self._seconds(
            "model_load", "Cold loads, as the node's final record tells.", "model", "node"
        )
        self.overhead = Histogram(
            "ollamux_router_overhead_seconds",
            "The router's own time before the upstream request is written.",
            registry=self.registry,
            buckets=_FINE_SECONDS,
        )
        self.prompt = self._counter("prompt_tokens", "Prompt tokens, as counted by nodes.", *_WHERE)
        self.completion = self._counter(
            "completion_tokens", "Completion tokens, as counted by nodes.", *_WHERE
        )
        self.retries = self._counter("retries", "Attempts after the first.", "endpoint")
        self.decisions = self._counter("decisions", "Why a node was chosen, or none.", "reason")

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
            "config_last_success_timestamp_seconds", "When a configuration was last taken."
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
            f"ollamux_{name}_seconds", text, labels, registry=self.registry, buckets=_SECONDS
        )

    def request(self, report: Report, ended: float) -> None:
        """Count a request that has ended."""
        model = report.model if report.known or not report.model else "unknown"
        where = (report.endpoint, model, report.node)
        children = self._children.get(where)
        if children is None:
            children = self._children[where] = _Children(self, where)
        children.count(report, ended)
        if report.reason:
            self.decisions.labels(report.reason).inc()
        if report.attempts > 1:
            self.retries.labels(report.endpoint).inc(report.attempts - 1)
        if report.overhead_s is not None:
            self.overhead.observe(report.overhead_s)
        load_s = report.usage.load_s
        if load_s is not None and load_s >= _COLD_LOAD_S:
            self.load.labels(model, report.node).observe(load_s)

    def probe(self, node: str, what: str, seconds: float, *, usable: bool) -> None:
        self.probe_duration.labels(node, what).observe(seconds)
        failures = self.probe_failures.labels(node, what)
        if not usable:
            failures.inc()

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)


class _Children:
    """The labelled children of one (endpoint, model, node), looked up once."""

    __slots__ = ("_completion", "_duration", "_outcomes", "_prompt", "_tpot", "_ttft")

    def __init__(self, metrics: Metrics, where: tuple[str, str, str]) -> None:
        self._outcomes = {e: metrics.requests.labels(*where, e.value) for e in Ending}
        self._duration = metrics.duration.labels(*where)
        self._ttft = metrics.ttft.labels(*where)
        self._tpot = metrics.tpot.labels(*where)
        self._prompt = metrics.prompt.labels(*where)
        self._completion = metrics.completion.labels(*where)

    def count(self, report: Report, ended: float) -> None:
        usage = report.usage
        self._outcomes[report.ending].inc()
        self._duration.observe(ended - report.started)
        if report.first_at is not None and report.ending is Ending.OK:
            self._ttft.observe(report.first_at - report.started)
        if usage.prompt_tokens:
            self._prompt.inc(usage.prompt_tokens)
        if usage.completion_tokens:
            self._completion.inc(usage.completion_tokens)
        pace = _pace(report, ended)
        if pace is not None:
            self._tpot.observe(pace)


def _pace(report: Report, ended: float) -> float | None:
    """Seconds per output token: between the records of a stream, else as the node says."""
    usage = report.usage
    tokens = usage.completion_tokens or 0
    if report.streamed and report.first_at is not None and tokens > 1:
        return (ended - report.first_at) / (tokens - 1)
    return usage.eval_s / tokens if usage.eval_s is not None and tokens else None


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
        for node in nodes:
            name = [node.spec.name]
            up.add_metric(name, node.up)
            busy.add_metric(name, node.in_flight)
            slots.add_metric(name, node.spec.slots)
            present.add_metric(name, len(node.present))
            for key in node.resident:
                resident.add_metric([node.spec.name, key], 1)
        return [up, busy, slots, present, resident]
