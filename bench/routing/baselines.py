"""The routers to compare with. All bind a request to a node the moment it arrives."""

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from bench.routing.routers import Ask, Decision, Final, FleetView, Loaded, Make, Router


@dataclass(slots=True)
class Seen:
    """What these routers know of the pool: what they sent and has not ended, per node, and what
    the last `/api/ps` of each node showed."""

    view: FleetView
    in_flight: list[int] = field(init=False)
    loaded: list[Collection[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.in_flight = [0] * len(self.view)
        self.loaded = [()] * len(self.view)

    def free(self, node: int) -> bool:
        return self.in_flight[node] < self.view[node].slots

    def warm(self, node: int, model: str) -> bool:
        return model in self.loaded[node]

    def used(self, node: int) -> float:
        """In flight per slot."""
        return self.in_flight[node] / self.view[node].slots


# Which of the nodes that have the model. Never called without any.
Choose = Callable[[Ask, Sequence[int], Seen], int]


class Bound:
    """Sends each request on at once, to the node that `choose` says."""

    def __init__(self, view: FleetView, choose: Choose) -> None:
        self._seen = Seen(view)
        self._choose = choose
        self._have: dict[str, list[int]] = {}
        for node, one in enumerate(view):
            for model in one.models:
                self._have.setdefault(model.name, []).append(node)
        self._node: dict[int, int] = {}
        self._ready: list[Decision] = []

    def arrive(self, ask: Ask, now: float) -> None:
        nodes = self._have.get(ask.model)
        node = self._choose(ask, nodes, self._seen) if nodes else None
        if node is not None:
            self._seen.in_flight[node] += 1
            self._node[ask.number] = node
        self._ready.append(Decision(ask, node))

    def first(self, ask: Ask, now: float) -> None:
        """Nothing follows from it."""

    def ended(self, ask: Ask, final: Final, now: float) -> None:
        self._seen.in_flight[self._node.pop(ask.number)] -= 1

    def looked(self, node: int, loaded: Sequence[Loaded], now: float) -> None:
        self._seen.loaded[node] = {one.model for one in loaded}

    def take(self, now: float) -> Sequence[Decision]:
        ready, self._ready = self._ready, []
        return ready

    def wake_at(self) -> float | None:
        return None


class _LeastUsed:
    """The lowest in-flight per slot; the nodes take turns where several have it."""

    def __init__(self) -> None:
        self._last = -1

    def __call__(self, ask: Ask, nodes: Sequence[int], seen: Seen) -> int:
        least = min(seen.used(node) for node in nodes)
        equal = [node for node in nodes if seen.used(node) == least]
        self._last = min(equal, key=lambda node: (node <= self._last, node))
        return self._last


class _RoundRobin:
    """The next of the model's nodes, whatever they do."""

    def __init__(self) -> None:
        self._turns: dict[str, int] = {}

    def __call__(self, ask: Ask, nodes: Sequence[int], seen: Seen) -> int:
        turn = self._turns.get(ask.model, -1) + 1
        self._turns[ask.model] = turn
        return nodes[turn % len(nodes)]


def least_in_flight(view: FleetView, seed: int) -> Router:
    return Bound(view, _LeastUsed())


def round_robin(view: FleetView, seed: int) -> Router:
    return Bound(view, _RoundRobin())


def at_random(view: FleetView, seed: int) -> Router:
    chance = random.Random(seed)
    return Bound(view, lambda ask, nodes, seen: chance.choice(nodes))


def warm_first(view: FleetView, seed: int) -> Router:
    """Where the model is loaded, however long the queue is there; else the least used."""
    least = _LeastUsed()

    def choose(ask: Ask, nodes: Sequence[int], seen: Seen) -> int:
        warm = [node for node in nodes if seen.warm(node, ask.model)]
        return least(ask, warm or nodes, seen)

    return Bound(view, choose)


def warm_and_free(view: FleetView, seed: int) -> Router:
    """Where it is loaded and a slot is free; else where a slot is free; else the least used."""
    least = _LeastUsed()

    def choose(ask: Ask, nodes: Sequence[int], seen: Seen) -> int:
        free = [node for node in nodes if seen.free(node)]
        warm = [node for node in free if seen.warm(node, ask.model)]
        return least(ask, warm or free or nodes, seen)

    return Bound(view, choose)


def tiers(view: FleetView, seed: int) -> Router:
    """The fastest node with a free slot, in a fixed order; else the least used."""
    least = _LeastUsed()

    def choose(ask: Ask, nodes: Sequence[int], seen: Seen) -> int:
        free = [node for node in nodes if seen.free(node)]
        if not free:
            return least(ask, nodes, seen)
        return min(free, key=lambda node: seen.view[node].priority)

    return Bound(view, choose)


BASELINES: Mapping[str, Make] = {
    "random": at_random,
    "round-robin": round_robin,
    "least-in-flight": least_in_flight,
    "warm-first": warm_first,
    "warm-and-free": warm_and_free,
    "tiers": tiers,
}
