"""One cell of the report: a router on a load, once for each seed, and what came out, pooled."""

import importlib
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from bench.routing import ours
from bench.routing.baselines import BASELINES
from bench.routing.fleet import CLASSES, Layout, class_of, fleet, view
from bench.routing.generate import TRACES, generate
from bench.routing.routers import Make
from bench.routing.scenario import FLOOD, SCENARIOS
from bench.routing.trace import Trace, read, thin
from bench.routing.workload import Request
from bench.routing.world import PATIENCE_S, Outcome, World

SEEDS: Mapping[str, Sequence[int]] = {"tuning": range(1, 6), "reporting": range(101, 106)}
# What there is by name; the last two are the policies of this project.
ROUTERS: Mapping[str, Make] = {
    **BASELINES,
    "ollamux-least-in-flight": ours.least_in_flight,
    "ollamux": ours.expected_delay,
}
SOON_S = 10.0
STEPS = 200  # of the whole distribution
_MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class Case:
    """What is run. `source` is the path of a trace, or the name of generated statistics; `router`
    one of `ROUTERS`, or `module:function` of one's own `Make`. Of the arrivals, only those of the
    first so many `minutes` are sent."""

    source: str
    per_hour: float
    layout: Layout = Layout.EVERYWHERE
    scenario: str = "plain"
    router: str = "least-in-flight"
    minutes: float = math.inf


class Served(NamedTuple):
    """One request, as the report needs it; infinite times for one that was refused. `at` is when
    it came, in seconds since the first one."""

    flow: str
    model: str
    first_s: float
    total_s: float
    at: float = 0.0


class Sample(NamedTuple):
    """One run of a case."""

    served: Sequence[Served]
    loads: int
    seconds: float
    decisions: int
    router_s: float


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Seconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What a case came to over all its seeds. `first` and `total` are the times to the first
    token and to the end, `soon` is the share with its first token within 10 s, `classes` the
    times to the first token by size of model, `curve` what each half percent of these times is
    below, `minutes` the p90 of those that came in each minute of the run, None where nobody did. In
    a flood all this is of the other teams only."""

    case: Case
    requests: int
    first: Quantiles
    total: Quantiles
    soon: float
    loads_per_hour: float
    refused: int
    decision_us: float
    classes: Mapping[str, Quantiles]
    curve: Sequence[float] = ()
    minutes: Sequence[float | None] = ()
    goodput_per_hour: float | None = None


def make(router: str) -> Make:
    """Raises KeyError, ImportError or AttributeError for one that does not exist."""
    module, _, function = router.partition(":")
    if not function:
        return ROUTERS[router]
    found: Make = getattr(importlib.import_module(module), function)
    return found


def run(case: Case, seed: int, patience_s: float = PATIENCE_S) -> Sample:
    """One run. The seed thins the trace, deals out the models, and is the router's too. What has
    not begun so long after the last arrival never does."""
    scenario = SCENARIOS[case.scenario]
    specs = fleet(case.layout, seed, scenario.models)
    router = make(case.router)(view(specs), seed)
    done = World(specs, router, requests(case, seed), scenario.changes, patience_s).run()
    begin = done.outcomes[0].request.ask.at
    served = [_served(one, begin) for one in done.outcomes]
    return Sample(served, done.loads, done.seconds, done.decisions, done.router_s)


def requests(case: Case, seed: int) -> Sequence[Request]:
    """What arrives, in order of time, numbered from 0."""
    found = SCENARIOS[case.scenario].requests(_arrivals(case, seed), seed)
    end = found[0].ask.at + 60 * case.minutes
    return [one for one in found if one.ask.at < end]


def measure(case: Case, seeds: Sequence[int], jobs: int) -> Figures:
    """All seeds of a case, in so many processes."""
    if jobs == 1:
        return figures(case, [run(case, seed) for seed in seeds])
    with ProcessPoolExecutor(jobs) as pool:
        return figures(case, list(pool.map(partial(run, case), seeds)))


def figures(case: Case, samples: Sequence[Sample]) -> Figures:
    """The samples pooled: quantiles are of all requests of all runs."""
    served = [one for sample in samples for one in sample.served if one.flow != FLOOD]
    first = [one.first_s for one in served]
    by_class = {
        name: [s.first_s for s in served if class_of(s.model) == name] for name, _ in CLASSES
    }
    decisions = sum(sample.decisions for sample in samples)
    return Figures(
        case,
        len(served),
        quantiles(first),
        quantiles([one.total_s for one in served]),
        sum(time_s <= SOON_S for time_s in first) / len(first),
        3600 * sum(s.loads for s in samples) / sum(s.seconds for s in samples),
        sum(time_s == math.inf for time_s in first),
        1e6 * sum(sample.router_s for sample in samples) / max(decisions, 1),
        {name: quantiles(times) for name, times in by_class.items() if times},
        curve(first),
        _minutes(served),
    )


def quantiles(times: Sequence[float]) -> Quantiles:
    """Of at least one time."""
    ordered = sorted(times)
    at = [ordered[min(int(len(ordered) * share), len(ordered) - 1)] for share in (0.5, 0.9, 0.99)]
    return Quantiles(*at)


def curve(times: Sequence[float]) -> Sequence[float]:
    """What each of `STEPS` equal shares of the times ends with."""
    ordered = sorted(times)
    return [ordered[(len(ordered) - 1) * step // STEPS] for step in range(STEPS + 1)]


def _minutes(served: Sequence[Served]) -> Sequence[float | None]:
    by_minute: dict[int, list[float]] = {}
    for one in served:
        by_minute.setdefault(int(one.at // _MINUTE_S), []).append(one.first_s)
    return [
        quantiles(by_minute[minute]).p90 if minute in by_minute else None
        for minute in range(max(by_minute) + 1)
    ]


def _arrivals(case: Case, seed: int) -> Trace:
    if case.source in TRACES:
        return generate(TRACES[case.source], case.per_hour, seed)
    return thin(_recorded(case.source), case.per_hour, seed)


@lru_cache(maxsize=2)
def _recorded(path: str) -> Trace:
    return read(Path(path))


def _served(one: Outcome, begin: float) -> Served:
    ask = one.request.ask
    first_s = math.inf if one.first_s is None else one.first_s
    total_s = math.inf if one.total_s is None else one.total_s
    return Served(ask.flow, ask.model, first_s, total_s, ask.at - begin)
