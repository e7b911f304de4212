"""How honest the product is: what its core expected of a request, beside what came."""

from collections.abc import Sequence
from typing import NamedTuple

from bench.routing.experiment import Case, requests
from bench.routing.fleet import fleet, view
from bench.routing.ours import Ours, Outturn
from bench.routing.scenario import SCENARIOS
from bench.routing.world import World
from router.core.types import Policy


class Foreseen(NamedTuple):
    """Of a load: of all requests that had to wait in the router, how long, and of all that were
    sent, when their answer began."""

    case: Case
    waits: Sequence[Outturn]
    firsts: Sequence[Outturn]


def foreseen(case: Case, seeds: Sequence[int]) -> Foreseen:
    """Of all seeds, under the default policy."""
    waits: list[Outturn] = []
    firsts: list[Outturn] = []
    scenario = SCENARIOS[case.scenario]
    for seed in seeds:
        specs = fleet(case.layout, seed, scenario.models)
        ours = Ours(view(specs), seed, Policy.EXPECTED_DELAY)
        World(specs, ours, requests(case, seed), scenario.changes).run()
        waits += ours.waits
        firsts += ours.firsts
    return Foreseen(case, waits, firsts)


def within(found: Sequence[Outturn], factor: float, least_s: float) -> float:
    """The share of those that took as long as expected, up to a factor or so many seconds."""
    good = sum(
        abs(one.actual_s - one.expected_s) <= least_s
        or 1 / factor <= one.actual_s / max(one.expected_s, 1e-9) <= factor
        for one in found
    )
    return good / len(found)
