"""Prometheus collectors, in a registry of our own."""

import itertools
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from typing import Generic, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from router import __version__
from router.core.bounds import conflicts
from router.core.lease import Queued
from router.core.pool import Learned
from router.core.types import Flip, Kept, NodeView
from router.tally import SECONDS, Tally

# A pool whose nodes agree on nothing shall not become as many series as it has models.
_CONFLICTS_MAX = 100
_T = TypeVar("_T")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """What ollamux exports. `nodes` gives the pool's snapshot at each scrape, `queued` how many
    wait, by priority, `learned` what nodes have shown, `kept` what is kept in memory; `refusals`
    are counts by cause."""

    def __init__(
        self,
        nodes: Callable[[], Sequence[NodeView]],
        queued: Callable[[], Mapping[str, int]],
        refusals: Mapping[str, int],
        learned: Callable[[], Sequence[Learned]],
        kept: Callable[[], Sequence[Kept]] = lambda: (),
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second gauge for every counter, which nobody asked for
        self.registry = CollectorRegistry()
        self.registry.register(_Gathered(nodes, _of_nodes))
        self.registry.register(_Gathered(refusals.items, _refused))
        self.registry.register(_Gathered(lambda: queued().items(), _depth))
        self.registry.register(_Gathered(learned, _of_learned))
        self.registry.register(_Gathered(kept, _replicas))
        self.requests = Tally()
        self.registry.register(self.requests)
        self._node_metrics()
        self._queue_metrics()
        self._config_metrics()

    def _node_metrics(self) -> None:
        self.probe_duration = self._seconds(
            "node_probe_duration", "Probes by what was asked.", "node", "probe"
        )
        self.probe_failures = self._counter(
            "node_probe_failures", "Probes without a usable answer.", "node", "probe"
        )
        self.breaker_flips = self._counter(
            "breaker_flips",
            "Changes of the breakers of nodes, and of models on them.",
            *("node", "scope", "to"),
        )

    def _queue_metrics(self) -> None:
        """A model of the pool is as good as what it expects is near to what comes."""
        self.queue_wait = self._seconds(
            "queue_wait", "Waits for a turn that ended with a node.", "priority"
        )
        self.queue_expected_wait = self._seconds(
            "queue_expected_wait", "How long these were expected to be at first.", "priority"
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

    def wait(self, queued: Queued, waited_s: float) -> None:
        priority = queued.attempt.work.priority.word
        self.queue_wait.labels(priority).observe(waited_s)
        if queued.expected_s < inf:
            self.queue_expected_wait.labels(priority).observe(queued.expected_s)

    def breaker(self, flip: Flip) -> None:
        scope = "model" if flip.model else "node"
        self.breaker_flips.labels(flip.node, scope, flip.now.value).inc()

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)


class _Gathered(Collector, Generic[_T]):
    """Families made at each scrape of what is so then: nothing that is gone leaves anything."""

    def __init__(
        self,
        read: Callable[[], Iterable[_T]],
        families: Callable[[Iterable[_T]], Iterable[Metric]],
    ) -> None:
        self._read = read
        self._families = families

    def describe(self) -> Iterable[Metric]:
        return self._families([])

    def collect(self) -> Iterable[Metric]:
        return self._families(self._read())


def _refused(counts: Iterable[tuple[str, int]]) -> Iterable[Metric]:
    refused = CounterMetricFamily(
        "ollamux_refused", "Refused for there was too much at once.", labels=["cause"]
    )
    for cause, count in counts:
        refused.add_metric([cause], count)
    return [refused]


def _depth(counts: Iterable[tuple[str, int]]) -> Iterable[Metric]:
    depth = _gauge("queue_depth", "Requests that wait for their turn.", "priority")
    for priority, count in counts:
        depth.add_metric([priority], count)
    return [depth]


def _of_learned(learned: Iterable[Learned]) -> Iterable[Metric]:
    """What the router plans with, and what its plans have cost; of nodes that are configured."""
    found = [*learned]
    return [*_speeds(found), *_loads(found)]


def _speeds(learned: Sequence[Learned]) -> Iterable[Metric]:
    prefill, decode, load = (
        _gauge(f"node_model_{name}", f"{text}, as learned.", "node", "model")
        for name, text in (
            ("prefill_tokens_per_second", "Prompt tokens read that were not cached"),
            ("decode_tokens_per_second", "Tokens of an answer"),
            ("load_seconds", "A cold load"),
        )
    )
    for one in learned:
        for key, speed in one.speeds.items():
            told = (prefill, speed.prefill_tps), (decode, speed.decode_tps), (load, speed.load_s)
            for family, value in told:
                if value is not None:
                    family.add_metric([one.node, key], value)
    return prefill, decode, load


def _loads(learned: Sequence[Learned]) -> Iterable[Metric]:
    cold = CounterMetricFamily(
        "ollamux_cold_loads", "Requests that a model was loaded for.", labels=["node", "cause"]
    )
    again = CounterMetricFamily(
        "ollamux_reloads", "Loaded models that got another context.", labels=["node", "cause"]
    )
    evicted = CounterMetricFamily(
        "ollamux_evictions", "Models that made room for others.", labels=["node"]
    )
    for one in learned:
        if one.loads is not None:
            cold.add_metric([one.node, "absent"], one.loads.absent)
            cold.add_metric([one.node, "reload"], one.loads.reloads)
            again.add_metric([one.node, "num_ctx"], one.loads.reloads)
            again.add_metric([one.node, "external"], one.loads.external)
            evicted.add_metric([one.node], one.loads.evicted)
    return cold, again, evicted


def _replicas(kept: Iterable[Kept]) -> Iterable[Metric]:
    replicas = _gauge(
        "warm_replicas",
        "Replicas that are to stay in memory, by routing.warm.",
        "model",
        "state",
    )
    for one in kept:
        replicas.add_metric([one.model, "wanted"], one.wanted)
        replicas.add_metric([one.model, "loaded"], len(one.nodes))
    return [replicas]


def _of_nodes(nodes: Iterable[NodeView]) -> Iterable[Metric]:
    found = [*nodes]
    return [*_states(found), *_sizes(found), *_models(found)]


def _states(nodes: Sequence[NodeView]) -> Iterable[Metric]:
    up = _gauge("node_up", "1 while probes answer.", "node")
    draining = _gauge("node_draining", "1 while it is given no new leases.", "node")
    ejected = _gauge(
        "node_ejected", "1 while real traffic is kept away, or but for one trial.", "node"
    )
    for node in nodes:
        name = [node.spec.name]
        up.add_metric(name, node.up)
        draining.add_metric(name, node.draining)
        ejected.add_metric(name, any(not one.model for one in node.ejected))
    return up, draining, ejected


def _sizes(nodes: Sequence[NodeView]) -> Iterable[Metric]:
    busy = _gauge("node_in_flight", "Leases held.", "node")
    slots = _gauge("node_slots", "Slots per model, where they are not learned.", "node")
    learned = _gauge("node_model_slots", "Slots that were learned.", "node", "model")
    present = _gauge("node_models_present", "Models on disk that may be used.", "node")
    for node in nodes:
        name = [node.spec.name]
        busy.add_metric(name, node.in_flight)
        if not node.spec.auto:
            slots.add_metric(name, node.spec.slots)
        for key, count in node.slots.items():
            learned.add_metric([node.spec.name, key], count)
        present.add_metric(name, len(node.present))
    return busy, slots, learned, present


def _models(nodes: Sequence[NodeView]) -> Iterable[Metric]:
    resident = _gauge("node_model_resident", "1 per model in memory.", "node", "model")
    ejected = _gauge(
        "node_model_ejected", "1 while this model's requests are kept away.", "node", "model"
    )
    conflict = _gauge(
        "model_digest_conflict",
        "1 while nodes that are up have different models of this name.",
        "model",
    )
    up_now = ((node.spec.name, node.present) for node in nodes if node.up and not node.leaving)
    for key in itertools.islice(conflicts(up_now), _CONFLICTS_MAX):
        conflict.add_metric([key], 1)
    known = {key for node in nodes for key in node.present}
    for node in nodes:
        for key in node.resident:
            resident.add_metric([node.spec.name, key], 1)
        # A cloud model may have any name that a client thinks of.
        kept = {one.model for one in node.ejected if one.model and not one.busy}
        for key in sorted({model if model in known else "unknown" for model in kept}):
            ejected.add_metric([node.spec.name, key], 1)
    return resident, ejected, conflict


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"ollamux_{name}", text, labels=labels)
