"""What requests have come to, cheap to add to; Prometheus families are made of it at a scrape.

A request touches ten series. prometheus_client's own children take a lock for each of them and
walk the buckets one by one; here samples are collected, and sorted into buckets some hundred at a
time, in the one thread there is.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from router.core.usage import NOTHING, Source
from router.log import Continued, Ending, Report

SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600,
)  # fmt: skip
_FINE_SECONDS = (0.0001, 0.00025, 0.0005, *SECONDS)
_WHERE = ("endpoint", "model", "node")
# load_duration of a warm model is a few milliseconds; anything longer had to load.
_COLD_LOAD_S = 0.1
_SETTLED = 256  # so many requests at a time
_SEVERAL = "several"  # the node of a request that went to more than one
# A look-up in the module is a third of the price of one in the enum.
_OK, _NODE = Ending.OK, Source.NODE


class Spread:
    """A histogram: how many samples lie up to each bound, and their sum. `add` takes a sample."""

    __slots__ = ("_bounds", "_counts", "_new", "_sum", "add")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._new: list[float] = []  # samples that are not sorted in yet
        self.add = self._new.append

    def settle(self) -> None:
        """Sort in what was added."""
        new, done = self._new, 0
        if not new:
            return
        new.sort()
        self._sum += sum(new)
        for place, bound in enumerate((*self._bounds, inf)):
            up_to = bisect_right(new, bound, done)
            self._counts[place] += up_to - done
            done = up_to
        new.clear()

    def fill(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Put it into a family, with counts that add up as Prometheus wants them."""
        self.settle()
        buckets, total = [], 0
        for bound, count in zip((*self._bounds, inf), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == inf else str(float(bound)), total))
        family.add_metric(labels, buckets, self._sum)


class _Place:
    """The sums of one (endpoint, model, node)."""

    __slots__ = ("chunks", "completion", "duration", "endings", "prompt", "tpot", "ttft")

    def __init__(self) -> None:
        self.endings = dict.fromkeys(Ending, 0)
        self.duration = Spread()
        self.ttft = Spread()
        self.tpot = Spread()
        self.prompt = 0
        self.completion = 0
        self.chunks = 0

    def count(self, report: Report, ended: float) -> None:
        ending = report.ending
        self.endings[ending] += 1
        self.duration.add(ended - report.started)
        first_at = report.first_at
        if first_at is not None and ending is _OK:
            self.ttft.add(first_at - report.started)
        usage = report.usage
        if usage is NOTHING:
            return
        self.prompt += usage.prompt_tokens or 0
        if usage.source is _NODE:
            self.completion += usage.completion_tokens or 0
        else:
            self.chunks += usage.completion_tokens or 0
        pace = _pace(report, ended) if ending is _OK else None
        if pace is not None:
            self.tpot.add(pace)


class Tally(Collector):
    """All requests so far."""

    def __init__(self) -> None:
        self._places: dict[tuple[str, str, str], _Place] = {}
        self._loads: dict[tuple[str, str], Spread] = {}
        self._overhead = Spread(_FINE_SECONDS)
        self._retries: Counter[str] = Counter()
        self._decisions: Counter[str] = Counter()
        self._begins: dict[str, tuple[Spread, Spread]] = {}  # as they were, and as expected
        self._continuations: Counter[Continued] = Counter()
        self._unsettled = 0

    def count(self, report: Report, ended: float) -> None:
        """Add a request that ended at `ended` (monotonic seconds)."""
        self._unsettled += 1
        if self._unsettled >= _SETTLED:
            self._settle()
        model = report.model if report.known or not report.model else "unknown"
        # Sets of nodes would be as many label values as there are sets.
        node = report.node if "," not in report.node else _SEVERAL
        where = (report.endpoint, model, node)
        place = self._places.get(where)
        if place is None:
            place = self._places[where] = _Place()
        place.count(report, ended)
        if report.reason:
            self._decisions[report.reason] += 1
        if report.streamed and report.expected_s is not None:
            self._begin(report, report.expected_s)
        if report.attempts > 1:
            self._retries[report.endpoint] += report.attempts - 1
        if report.continuations:
            self._continuations.update(report.continuations)
        if report.overhead_s is not None:
            self._overhead.add(report.overhead_s)
        load_s = report.usage.load_s
        if load_s is not None and load_s >= _COLD_LOAD_S:
            self._loads.setdefault((model, report.node), Spread()).add(load_s)

    def _settle(self) -> None:
        """Samples take memory until they are sorted in."""
        self._unsettled = 0
        for spread in self._all():
            spread.settle()

    def _all(self) -> Iterator[Spread]:
        for place in self._places.values():
            yield from (place.duration, place.ttft, place.tpot)
        for begins in self._begins.values():
            yield from begins
        yield from self._loads.values()
        yield self._overhead

    def _begin(self, report: Report, expected_s: float) -> None:
        """Add when a stream began, beside when it was to. What is none begins when it is over."""
        first_at = report.first_at
        if first_at is None or report.ending is not _OK:
            return
        if report.continuations:
            return  # the node that it began on is not the last
        spreads = self._begins.get(report.reason)
        if spreads is None:
            spreads = self._begins[report.reason] = (Spread(), Spread())
        spreads[0].add(first_at - report.sent_at)
        spreads[1].add(expected_s)

    def collect(self) -> Iterable[Metric]:
        yield from self._counters()
        yield from self._spreads()

    def _counters(self) -> Iterable[Metric]:
        requests = _counter("requests", "Requests by how they ended.", *_WHERE, "outcome")
        for where, place in self._places.items():
            for ending in Ending:
                requests.add_metric([*where, ending.value], place.endings[ending])
        yield requests
        prompt = _counter("prompt_tokens", "Prompt tokens, by who counted.", *_WHERE, "source")
        completion = _counter(
            "completion_tokens", "Completion tokens, by who counted.", *_WHERE, "source"
        )
        for where, place in self._places.items():
            prompt.add_metric([*where, _NODE.value], place.prompt)
            completion.add_metric([*where, _NODE.value], place.completion)
            completion.add_metric([*where, Source.CHUNKS.value], place.chunks)
        yield prompt
        yield completion
        retries = _counter("retries", "Attempts after the first.", "endpoint")
        for endpoint, count in self._retries.items():
            retries.add_metric([endpoint], count)
        yield retries
        decisions = _counter("decisions", "Why a node was chosen, or none.", "reason")
        for reason, count in self._decisions.items():
            decisions.add_metric([reason], count)
        yield decisions
        continued = _counter(
            "continuations", "Answers whose node failed in the midst, by what became of them.",
            "result",
        )  # fmt: skip
        for result in Continued:
            continued.add_metric([result.value], self._continuations[result])
        yield continued

    def _spreads(self) -> Iterable[Metric]:
        kinds: Sequence[tuple[str, str, Callable[[_Place], Spread]]] = (
            ("request_duration", "From arrival to the end.", lambda place: place.duration),
            (
                "time_to_first_token",
                "From arrival to the first record sent.",
                lambda place: place.ttft,
            ),
            (
                "time_per_output_token",
                "Mean time between the tokens of an answer.",
                lambda place: place.tpot,
            ),
        )
        for name, text, spread in kinds:
            family = _spread(name, text, *_WHERE)
            for where, place in self._places.items():
                spread(place).fill(family, where)
            yield family
        loads = _spread(
            "model_load", "Cold loads, as the node's final record tells.", "model", "node"
        )
        for labels, taken in self._loads.items():
            taken.fill(loads, labels)
        yield loads
        yield from self._first_bytes()
        overhead = _spread(
            "router_overhead", "The router's own time before the upstream request is written."
        )
        self._overhead.fill(overhead, [])
        yield overhead

    def _first_bytes(self) -> Iterable[Metric]:
        was = _spread("first_byte", "From the node's turn to a stream's first record.", "reason")
        expected = _spread(
            "first_byte_expected", "How long these were expected to take, then.", "reason"
        )
        for reason, spreads in self._begins.items():
            spreads[0].fill(was, [reason])
            spreads[1].fill(expected, [reason])
        return was, expected


def _counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"ollamux_{name}", text, labels=labels)


def _spread(name: str, text: str, *labels: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(f"ollamux_{name}_seconds", text, labels=labels)


def _pace(report: Report, ended: float) -> float | None:
    """Seconds per output token: between the records of a stream, else as the node says."""
    usage = report.usage
    tokens = usage.completion_tokens or 0
    if report.streamed and report.first_at is not None and tokens > 1:
        return (ended - report.first_at) / (tokens - 1)
    return usage.eval_s / tokens if usage.eval_s is not None and tokens else None
