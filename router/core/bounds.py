"""Where a request may go at all: scope, marks, placement, versions, digests."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from router.core import names
from router.core.names import Name
from router.core.node import Node, fits
from router.core.types import (
    Digest,
    Model,
    Need,
    NodeSpec,
    Placement,
    Refusal,
    Rejected,
    Scope,
    Topology,
    Wish,
)

_NOBODY: frozenset[str] = frozenset()
_PRIMARY, _CLOUD = Need.PRIMARY, Need.CLOUD

Conflicts = Mapping[str, Mapping[str, Sequence[str]]]


class Terms(msgspec.Struct, frozen=True):
    """What path and endpoint ask of a node, whatever the model. `since`: the version of Ollama
    that first had the endpoint."""

    scope: Scope | None = None
    need: Need = Need.NONE
    since: tuple[int, ...] = ()


class Bounds(msgspec.Struct, frozen=True):
    """Nodes by their urls. `only`: no other may be asked. Of them, `old` do not know the
    endpoint, and `preferred` come first."""

    only: frozenset[str]
    old: frozenset[str] = _NOBODY
    preferred: frozenset[str] = _NOBODY


class Rules:
    """What a configuration says of where requests and models go."""

    def __init__(self, topology: Topology) -> None:
        specs = [(spec, pool.name) for pool in topology.pools for spec in pool.nodes]
        self._primary = frozenset(spec.url for spec, _ in specs if spec.primary)
        self._cloud = frozenset(spec.url for spec, _ in specs if spec.cloud)
        self._digest = topology.digest
        self._placements = [
            (place, frozenset(spec.url for spec, pool in specs if _takes(place, spec, pool)))
            for place in topology.placements
        ]

    def placed(self, name: Name) -> tuple[Wish, frozenset[str]] | None:
        """Where a model may live. A cloud model lives nowhere: marks say who may be asked."""
        if name.cloud:
            return None
        for place, urls in self._placements:
            if fits(name.key, place.models):
                return place.wish, urls
        return None

    def bounds(
        self, nodes: Iterable[Node], name: Name | None, terms: Terms
    ) -> Bounds | Rejected | None:
        """What limits a request for this model on these nodes; None where nothing does."""
        scope = terms.scope
        everyone = list(nodes)
        inside = everyone if scope is None else [n for n in everyone if n.spec.url in scope.urls]
        able = self._marked(inside, name, terms)
        if inside and not able:
            return _rejected(Refusal.UNMARKED, inside)
        preferred = _NOBODY
        placed = None if name is None else self.placed(name)
        if placed is not None and placed[0] is Wish.REQUIRE:
            able = [node for node in able if node.spec.url in placed[1]]
        elif placed is not None:
            preferred = placed[1]
        old = frozenset(node.spec.url for node in able if not node.new_enough(terms.since))
        if name is not None:
            able = self._agreeing(able, name.key, old)
        if not old and not preferred and len(able) == len(everyone):
            return None
        return Bounds(frozenset(node.spec.url for node in able), old, preferred)

    def _marked(self, inside: Sequence[Node], name: Name | None, terms: Terms) -> Sequence[Node]:
        """Those that are marked for what is needed."""
        if terms.need is _PRIMARY:
            if len(inside) == 1:
                return inside
            return [node for node in inside if node.spec.url in self._primary]
        cloud = terms.need is _CLOUD or (name is not None and name.cloud)
        if not cloud or not self._cloud:
            return inside
        return [node for node in inside if node.spec.url in self._cloud]

    def _agreeing(self, able: Sequence[Node], key: str, old: frozenset[str]) -> Sequence[Node]:
        """Those with the digest that is to be used, and those without the model."""
        if self._digest is Digest.ANY:
            return able
        having = [n for n in able if n.open and key in n.present and n.spec.url not in old]
        chosen = _chosen(having, key, self._digest)
        if chosen is None:
            return able
        return [n for n in able if key not in n.present or n.present[key].digest == chosen]

    def listed(self, nodes: Sequence[Node]) -> Sequence[Mapping[str, Model]]:
        """What each of the nodes has, of what may be asked for there."""
        if not self._placements and self._digest is Digest.ANY:
            return [node.present for node in nodes]
        here = {
            key: self.bounds(nodes, names.parse(key), Terms())
            for key in {key for node in nodes for key in node.present}
        }
        return [
            {key: model for key, model in node.present.items() if _allow(here[key], node)}
            for node in nodes
        ]

    def homes(self, nodes: Sequence[Node], name: Name) -> Sequence[Node] | Rejected:
        """Those of the nodes that are up and where the model may live; those that have it first,
        then those with the least on disk."""
        able = self._marked(nodes, name, Terms())
        placed = self.placed(name)
        if placed is not None and placed[0] is Wish.REQUIRE:
            able = [node for node in able if node.spec.url in placed[1]]
        able = [node for node in able if node.may_use(name.key)]
        if not able:
            return _rejected(Refusal.NOT_PLACED, nodes)
        up = [node for node in able if node.up]
        if not up:
            return _rejected(Refusal.NODES_DOWN, able)
        if placed is not None:
            up = [node for node in up if node.spec.url in placed[1]] or up
        return sorted(up, key=lambda node: (name.key not in node.present, node.disk))


def _takes(place: Placement, spec: NodeSpec, pool: str) -> bool:
    labels = place.labels.items()
    return (
        spec.name.lower() in map(str.lower, place.nodes)
        or pool.lower() in map(str.lower, place.pools)
        or bool(labels and labels <= dict(spec.labels).items())
    )


def _allow(bounds: Bounds | Rejected | None, node: Node) -> bool:
    if isinstance(bounds, Bounds):
        return node.spec.url in bounds.only
    return bounds is None


def _rejected(refusal: Refusal, nodes: Sequence[Node]) -> Rejected:
    return Rejected(refusal, tuple(node.spec for node in nodes))


def _chosen(having: Sequence[Node], key: str, rule: Digest) -> str | None:
    """The digest to be used where nodes have several; None where they agree."""
    models = [node.present[key] for node in having if node.present[key].digest]
    counts = Counter(model.digest for model in models)
    if len(counts) < 2:
        return None
    if rule is Digest.MAJORITY:
        models = [model for model in models if counts[model.digest] == max(counts.values())]
    return max(models, key=lambda model: model.moment("modified_at")).digest


def conflicts(listed: Iterable[tuple[str, Mapping[str, Model]]]) -> Conflicts:
    """Of each name that stands for several digests, who has which: nodes by digest.

    `listed`: nodes by name, with what they have.
    """
    first: dict[str, str] = {}
    several = set()
    listed = list(listed)
    for _, models in listed:
        for key, model in models.items():
            if model.digest and first.setdefault(key, model.digest) != model.digest:
                several.add(key)
    found: dict[str, dict[str, list[str]]] = {key: {} for key in sorted(several)}
    for node, models in listed:
        for key in several & models.keys():
            if digest := models[key].digest:
                found[key].setdefault(digest, []).append(node)
    return found
