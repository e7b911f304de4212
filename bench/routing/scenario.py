"""What may happen during a run, beside the trace."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bench.routing.fleet import CARDS, MODELS, Weights
from bench.routing.trace import Row, Trace, own
from bench.routing.workload import Request, Source, workload

FLOOD = "flood"  # the team that floods
_FLOOD_AT_S, _FLOOD_S, _FLOOD_JOBS = 1200.0, 60.0, 300
_FLOOD_PROMPT, _FLOOD_ANSWER = 500, 800
_SLOW_AT_S, _SLOW_S, _SLOW_PACE = 1200.0, 1200.0, 6.0
_SLOW_NODE = "c-48"
_ONE_MODEL = "llama3.1:8b"
# From when to when there is trouble, in seconds.
TROUBLE: Mapping[str, tuple[float, float]] = {
    "flood": (_FLOOD_AT_S, _FLOOD_AT_S + _FLOOD_S),
    "slow": (_SLOW_AT_S, _SLOW_AT_S + _SLOW_S),
}
# Sessions of the flood, far from those of any trace.
_FAR = 10**9


@dataclass(frozen=True, slots=True)
class Change:
    """From `at` on everything that starts on `node` takes `pace` times as long."""

    at: float
    node: int
    pace: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """`one_model`: all requests are for one that every node has. `slow`: one node is six times
    slower for 20 minutes. `flood`: one team sends 300 jobs of 800 tokens within a minute."""

    flood: bool = False
    slow: bool = False
    one_model: bool = False

    @property
    def models(self) -> Sequence[Weights]:
        """What the nodes have."""
        if not self.one_model:
            return MODELS
        return [model for model in MODELS if model.name == _ONE_MODEL]

    @property
    def changes(self) -> Sequence[Change]:
        """In order of time."""
        if not self.slow:
            return ()
        node = next(place for place, card in enumerate(CARDS) if card.name == _SLOW_NODE)
        end = _SLOW_AT_S + _SLOW_S
        return (Change(_SLOW_AT_S, node, _SLOW_PACE), Change(end, node, 1.0))

    def requests(self, trace: Trace, seed: int) -> Sequence[Request]:
        """All that arrives, in order of time, numbered from 0."""
        found = list(workload(trace, seed, self.models))
        if self.flood:
            found += _flood(len(found), seed, self.models)
            found.sort(key=lambda one: one.ask.at)
        return [
            Request(replace(one.ask, number=number), one.row) for number, one in enumerate(found)
        ]


def _flood(first: int, seed: int, models: Sequence[Weights]) -> Sequence[Request]:
    """Jobs for several models, in the proportions in which everybody asks for these."""
    source = Source(seed, models)
    chance = random.Random(seed)
    found = []
    for number in range(_FLOOD_JOBS):
        at = _FLOOD_AT_S + chance.random() * _FLOOD_S
        session = _FAR + number
        row = Row(at, session, _FLOOD_PROMPT, _FLOOD_ANSWER, own(session, _FLOOD_PROMPT))
        found.append(source.of(first + number, row, FLOOD, source.model()))
    return found


SCENARIOS: Mapping[str, Scenario] = {
    "plain": Scenario(),
    "flood": Scenario(flood=True),
    "slow": Scenario(slow=True),
    "one-model": Scenario(one_model=True),
}
