"""One cell of the report: a router on a load, once for each seed, and what came out, pooled."""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
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
from bench.routing.world import Outcome, World

SEEDS: Mapping[str, Sequence[int]] = {"tuning": range(1, 6), "reporting": range(101, 106)}
# What there is by name; the last two are the policies of this project.
ROUTERS: Mapping[str, Make] = {
    **BASELINES,
    "ollamux-least-in-flight": ours.least_in_flight,
    "ollamux": ours.expected_delay,
}
SOON_S = 10.0
_GOOD_SHARE = 0.9
_GOODPUT_RATES = (250.0, 8000.0)
_GOODPUT_FACTOR = 1.5
_GOODPUT_HALVINGS = 3


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
    """One request, as the report needs it; infinite times for one that was refused."""

    flow: str
    model: str
    first_s: float
    total_s: float


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
    times to the first token by size of model. In a flood all this is of the other teams only."""

    case: Case
    requests: int
    first: Quantiles
    total: Quantiles
    soon: float
    loads_per_hour: float
    refused: int
    decision_us: float
    classes: Mapping[str, Quantiles]
    goodput_per_hour: float | None = None


def make(router: str) -> Make:
    """Raises KeyError, ImportError or AttributeError for one that does not exist."""
    module, _, function = router.partition(":")
    if not function:
        return ROUTERS[router]
    found: Make = getattr(importlib.import_module(module), function)
    return found


def run(case: Case, seed: int) -> Sample:
    """One run. The seed thins the trace, deals out the models, and is the router's too."""
    scenario = SCENARIOS[case.scenario]
    specs = fleet(case.layout, seed, scenario.models)
    router = make(case.router)(view(specs), seed)
    done = World(specs, router, requests(case, seed), scenario.changes).run()
    served = [_served(one) for one in done.outcomes]
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
    )


def quantiles(times: Sequence[float]) -> Quantiles:
    """Of at least one time."""
    ordered = sorted(times)
    at = [ordered[min(int(len(ordered) * share), len(ordered) - 1)] for share in (0.5, 0.9, 0.99)]
    return Quantiles(*at)


def goodput(case: Case, seeds: Sequence[int], jobs: int) -> float:
    """The highest rate at which 90 % have their first token within 10 s, in requests an hour."""
    return highest(lambda rate: measure(replace(case, per_hour=rate), seeds, jobs).soon)


def highest(soon: Callable[[float], float]) -> float:
    """Searched from above, as few requests an hour are no help: models go cold between them. Then
    halves the factor to the next rate that is not good enough; 0 where none is good enough."""
    low, high = _GOODPUT_RATES[1], math.inf
    while soon(low) < _GOOD_SHARE:
        low, high = low / _GOODPUT_FACTOR, low
        if low < _GOODPUT_RATES[0]:
            return 0.0
    for _ in range(_GOODPUT_HALVINGS if high < math.inf else 0):
        middle = math.sqrt(low * high)
        if soon(middle) >= _GOOD_SHARE:
            low = middle
        else:
            high = middle
    return low


def _arrivals(case: Case, seed: int) -> Trace:
    if case.source in TRACES:
        return generate(TRACES[case.source], case.per_hour, seed)
    return thin(_recorded(case.source), case.per_hour, seed)


@lru_cache(maxsize=2)
def _recorded(path: str) -> Trace:
    return read(Path(path))


def _served(one: Outcome) -> Served:
    ask = one.request.ask
    if one.first_s is None or one.total_s is None:
        return Served(ask.flow, ask.model, math.inf, math.inf)
    return Served(ask.flow, ask.model, one.first_s, one.total_s)
