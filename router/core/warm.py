"""Which replicas are kept in memory, and what is to be done for that now.

A model is loaded where that costs least and drives out nothing that works; before it expires it is
asked for again, which begins its time anew. Nothing is unloaded: what is more than is wanted goes
by itself.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import msgspec

from router.core import names
from router.core.bounds import Terms
from router.core.memory import DISK_TO_MEMORY
from router.core.names import Name
from router.core.node import Node
from router.core.policy import Attempt, Target
from router.core.registry import Registry
from router.core.score import Scores
from router.core.types import Kept, Rejected

_AGAIN_S, _AGAIN_MAX_S = 5.0, 600.0  # between two loads of a model on a node: each time longer,
_FORGOTTEN_S = 1200.0  # unless the last one is so long ago
_SHARE = 0.5  # of its time, after which a model is asked for again: clocks differ


class Step(msgspec.Struct, frozen=True, eq=False):
    """A model is to be loaded on a node (`loads`), or else its time there to begin anew. `name`:
    as the node spells it; `num_ctx`: the context that it has there, where that is told."""

    attempt: Attempt
    node: Node
    key: str
    name: str
    loads: bool
    num_ctx: int | None


@dataclass(slots=True)
class _Care:
    """What is known of one replica. `expires`: by its node's clock; `due`: when it is to be asked
    for again; `again`: it is not to be loaded before, `wait_s` after the last time."""

    expires: float = 0.0
    due: float = inf
    again: float = 0.0
    wait_s: float = 0.0


class Warm:
    """What is wanted, by canonical name, and what was done for it. `next_at`: when something is due
    that no probe will tell of; `preloads`: the loads that have begun. Only the pool begins and
    ends what is done."""

    def __init__(self, registry: Registry, scores: Scores) -> None:
        self.wanted: Mapping[str, int] = {}
        self.next_at = inf
        self.preloads: set[Attempt] = set()
        self._registry = registry
        self._scores = scores
        self._cares: dict[tuple[str, str], _Care] = {}

    def __repr__(self) -> str:
        return f"<Warm {dict(self.wanted)}>"

    def configure(self, wanted: Mapping[str, int]) -> None:
        """Take a new configuration, and forget what it no longer speaks of."""
        self.wanted = self._scores.warm = wanted
        self.next_at = inf
        for url, key in list(self._cares):
            if url not in self._registry.nodes or key not in wanted:
                del self._cares[url, key]

    def see(self, node: Node, now: float, wall: float) -> None:
        """Take what the node has in memory; its times are of the same clock as `wall`."""
        for key in self.wanted:
            model, care = node.resides(key), self._care(node, key)
            expires = 0.0 if model is None else model.moment("expires_at").timestamp()
            if expires == care.expires:
                continue
            care.expires, care.due = expires, inf
            if expires > 0:
                left_s = expires - wall
                care.due = now + (left_s * _SHARE if left_s > 0 else _AGAIN_S)

    def begin(self, now: float) -> Step | None:
        """The next thing to do, as something that has begun: it is to be leased before the next
        one is asked for."""
        step = self._next(now)
        if step is None:
            return None
        self._begun(step, now)
        if step.loads:
            self.preloads.add(step.attempt)
            if step.node.schedules:
                self._scores.preload(step.attempt, step.node, step.key, now)
        return step

    def _next(self, now: float) -> Step | None:
        self.next_at = inf
        for key, count in self.wanted.items():
            left = count
            for nodes in self._homes(key):
                found = self._among(nodes, key, min(left, len(nodes)), now)
                if found is not None:
                    return found
                left -= min(left, len(nodes))
        return None

    def _among(self, nodes: Sequence[Node], key: str, count: int, now: float) -> Step | None:
        there = [node for node in nodes if node.resides(key) or _at_work(node, key)]
        there.sort(key=lambda node: -self._care(node, key).expires)
        for node in there[:count]:
            if self._is_due(node, key, now):
                return _step(node, key, loads=False)
        if len(there) >= count:
            return None
        able = [node for node in nodes if node not in there and self._may_load(node, key, now)]
        priced = [(cost, node) for node in able if (cost := self._cost(node, key, now)) is not None]
        if not priced:
            return None
        best = min(priced, key=lambda one: (one[0], len(one[1].resident)))
        return _step(best[1], key, loads=True)

    def _cost(self, node: Node, key: str, now: float) -> float | None:
        """What it takes to load a model there; None where that must not be now."""
        if node.schedules:
            return self._scores.preload_s(node, key, now)
        return _bytes_lost(node, key, self.wanted)

    def _is_due(self, node: Node, key: str, now: float) -> bool:
        """Whether it should be asked for again. What works there does that itself."""
        if _at_work(node, key):
            return False
        due = self._care(node, key).due
        if due > now:
            self.next_at = min(self.next_at, due)
        return due <= now

    def _may_load(self, node: Node, key: str, now: float) -> bool:
        return now >= self._care(node, key).again and not _loads(node)

    def _begun(self, step: Step, now: float) -> None:
        """It is being done. A model that goes soon after each load is loaded less and less often:
        others need the room."""
        care = self._care(step.node, step.key)
        if not step.loads:
            care.due = now + _AGAIN_S
        elif now - care.again >= _FORGOTTEN_S:
            care.wait_s = _AGAIN_S
        else:
            care.wait_s = min(max(2 * care.wait_s, _AGAIN_S), _AGAIN_MAX_S)

    def ended(self, attempt: Attempt, node: Node, key: str, now: float, *, good: bool) -> None:
        """A load has ended, well or not."""
        self.preloads.discard(attempt)
        self._scores.ended(attempt, node, None, now, good=good)
        care = self._care(node, key)
        care.again = now + care.wait_s

    def kept(self) -> Sequence[Kept]:
        """Which models are kept in memory, and where they are."""
        return [
            Kept(key, count, tuple(
                node.spec.name
                for nodes in self._homes(key) for node in nodes if node.resides(key)
            ))
            for key, count in self.wanted.items()
        ]  # fmt: skip

    def _homes(self, key: str) -> Sequence[Sequence[Node]]:
        """The nodes that have a model and may be asked for it now, those first that requests go to
        first. What a breaker keeps away from counts as away."""
        pools, name = self._registry.pools, names.parse(key)
        everyone = [node for nodes in pools for node in nodes]
        bounds = self._registry.rules.bounds(everyone, name, Terms())
        assert not isinstance(bounds, Rejected)  # no mark is asked for
        able = [[node for node in nodes if _usable(node, key)] for nodes in pools]
        if bounds is None:
            return able
        able = [[node for node in nodes if node.spec.url in bounds.only] for nodes in able]
        first = [[node for node in nodes if node.spec.url in bounds.preferred] for nodes in able]
        rest = [[node for node in nodes if node.spec.url not in bounds.preferred] for nodes in able]
        return [*first, *rest]

    def _care(self, node: Node, key: str) -> _Care:
        found = self._cares.get((node.spec.url, key))
        if found is None:
            found = self._cares[node.spec.url, key] = _Care()
        return found


def _step(node: Node, key: str, *, loads: bool) -> Step:
    there, listed = node.resides(key), node.present[key].entry.get("name")
    name = listed if isinstance(listed, str) else key
    attempt = Attempt(Target(Name(name, key), sent=name))
    return Step(attempt, node, key, name, loads, None if there is None else there.context)


def _usable(node: Node, key: str) -> bool:
    calm = None not in node.troubled and key not in node.troubled
    return node.open and calm and key in node.present


def _bytes_lost(node: Node, key: str, wanted: Collection[str]) -> float | None:
    """How much others may lose when a model is loaded there, where nobody plans what a node has in
    memory; None where that could be something that works or is wanted, too."""
    others = [one for one in node.resident if one != key]
    used = sum(_size(node, one) for one in others)
    limit = sum(node.spec.gpus)
    over = used + DISK_TO_MEMORY * node.size(key) - limit if limit else used
    if limit and over <= 0:
        return 0.0
    if any(_at_work(node, one) or (limit and one in wanted) for one in others):
        return None
    return float(over)


def _size(node: Node, key: str) -> float:
    size = node.resident[key].entry.get("size_vram")
    return float(size) if isinstance(size, int) else node.size(key)


def _at_work(node: Node, key: str) -> bool:
    names = node.names(node.runner(key)) or (key,)
    replicas = (node.replicas.get(name) for name in names)
    return any(one is not None and one.in_flight > 0 for one in replicas)


def _loads(node: Node) -> bool:
    """Whether something may be on its way into its memory."""
    return any(
        one.in_flight and key in node.present and node.resides(key) is None
        for key, one in node.replicas.items()
    )
