"""The one owner of nodes and leases. Synchronous; told the time; returns what to do."""

from collections.abc import Collection, Mapping, Sequence

import msgspec

from router.core import names, policy
from router.core.bounds import Conflicts, Rules, Terms, conflicts
from router.core.names import BadName, Name, Pin
from router.core.node import Node
from router.core.policy import Target
from router.core.types import (
    FailureKind,
    Flip,
    Health,
    Model,
    Need,
    NodeSpec,
    NodeView,
    Observation,
    Outcome,
    Reason,
    Refusal,
    Rejected,
    Scope,
    Sign,
    Topology,
)

# Names as clients write them, read once per revision. A client may send any number of them.
_KNOWN_MAX = 1000
_TEXT_MAX = 1000
_NO_NEED = Need.NONE
_ANYONE = Target()
_NEWEST = (1 << 40,)  # newer than all: no version is known


class Attempt(msgspec.Struct, frozen=True, eq=False):
    """One try on one node. Each has an identity of its own: it enters and leaves once."""

    target: Target
    tried: Collection[str] = frozenset()


class Lease(msgspec.Struct, frozen=True, eq=False):
    """The right to have `attempt` in flight on `node`."""

    attempt: Attempt
    node: NodeSpec
    reason: Reason


class Pool:
    """All nodes and all leases. `revision` grows with every change that a listing may show."""

    def __init__(self, topology: Topology, now: float) -> None:
        self.revision = 0
        self._nodes: dict[str, Node] = {}
        self._leaving: list[Node] = []
        self._leases: dict[Attempt, Node] = {}
        self._turn = 0
        self._resolved: dict[object, Target | Rejected] = {}
        self._scopes: dict[str, Scope] = {}
        self._known_at = 0
        self._oldest: tuple[int, ...] = _NEWEST
        self._conflicts: Conflicts = {}
        self._listed: Sequence[tuple[str, Mapping[str, Model]]] = ()
        self.reconfigure(topology, now)

    def __repr__(self) -> str:
        return f"<Pool {list(self._nodes.values())} {len(self._leases)} leases>"

    # What a configuration says.

    def reconfigure(self, topology: Topology, now: float) -> None:
        """Take a new configuration. A node whose url stays keeps its state."""
        self._aliases = {
            names.parse(name).key: (to,) if isinstance(to, str) else to
            for name, to in topology.aliases.items()
        }
        self._topology = topology
        self._rules = Rules(topology)
        before = self._nodes | {node.spec.url: node for node in self._leaving}
        self._nodes = {}
        self._pools: list[list[Node]] = []
        for pool in topology.pools:
            nodes = [self._kept(before, spec, pool.name, now) for spec in pool.nodes]
            self._pools.append(nodes)
            self._nodes |= {node.spec.url: node for node in nodes}
        self._leaving = [
            node for url, node in before.items() if url not in self._nodes and node.in_flight
        ]
        self.revision += 1

    @staticmethod
    def _kept(before: Mapping[str, Node], spec: NodeSpec, pool: str, now: float) -> Node:
        node = before.get(spec.url)
        if node is None:
            return Node(spec, pool, now)
        node.configure(spec, pool)
        return node

    # What a request goes through.

    def scope(self, text: str) -> Scope | Rejected:
        """The nodes that `/@text/...` leaves: one, by its name or address, or those of a pool."""
        if self._known_at != self.revision or len(self._scopes) > _KNOWN_MAX:
            self._forget()
        found: Scope | Rejected | None = self._scopes.get(text)
        if found is None:
            found = self._scope(text)
            if isinstance(found, Scope):
                self._scopes[text] = found
        return found

    def _scope(self, text: str) -> Scope | Rejected:
        specs = self.specs()
        try:
            found = names.pinned(names.pin(text), specs)
        except BadName:
            found = []
        if len(found) == 1:
            return Scope(text, frozenset([found[0].url]))
        pool = [n.spec.url for n in self._nodes.values() if n.pool.lower() == text.lower()]
        if pool:
            return Scope(text, frozenset(pool))
        refusal = Refusal.AMBIGUOUS_PIN if found else Refusal.UNKNOWN_PIN
        return Rejected(refusal, tuple(found or specs))

    def resolve(
        self,
        text: str,
        scope: Scope | None = None,
        need: Need = _NO_NEED,
        since: tuple[int, ...] = (),
    ) -> Target | Rejected:
        """Read a model's name as a client wrote it: pin, alias and prefix taken off."""
        if self._known_at != self.revision or len(self._resolved) > _KNOWN_MAX:
            self._forget()
        plain = scope is None and need is _NO_NEED and since <= self._oldest
        asked = text if plain else (text, scope, need, since)
        found = self._resolved.get(asked)
        if found is None:
            found = self._resolve(text, Terms(scope, need, since))
            if len(text) <= _TEXT_MAX:
                self._resolved[asked] = found
        return found

    def anyone(self, scope: Scope | None, need: Need, since: tuple[int, ...]) -> Target | Rejected:
        """What a request needs that names no model."""
        if self._known_at != self.revision:
            self._forget()
        if scope is None and need is _NO_NEED and since <= self._oldest:
            return _ANYONE
        return self._target(None, None, Terms(scope, need, since))

    def _forget(self) -> None:
        """What was worked out holds until the next change."""
        self._known_at = self.revision
        self._resolved.clear()
        self._scopes.clear()
        releases = [node.release for node in self._nodes.values() if node.release]
        self._oldest = min(releases, default=_NEWEST)

    def _resolve(self, text: str, terms: Terms) -> Target | Rejected:
        try:
            left, pin = names.split_pin(text)
            name = self._name(left)
            candidates = self._aliases.get(name.key)
            if candidates is None:
                return self._target(name, pin, terms)
            found = [self._candidate(one, pin, terms) for one in candidates]
        except BadName:
            return Rejected(Refusal.BAD_NAME)
        return next((one for one in found if self._can_be_had(one)), found[0])

    def _candidate(self, text: str, pin: Pin | None, terms: Terms) -> Target | Rejected:
        """What an alias stands for. A pin of the client's, also by path, replaces its own."""
        left, own = names.split_pin(text)
        target = self._target(self._name(left), pin or own, terms)
        if isinstance(target, Rejected) and target.refusal is Refusal.OUT_OF_SCOPE and pin is None:
            return self._target(self._name(left), None, terms)
        return target

    def _can_be_had(self, target: Target | Rejected) -> bool:
        return isinstance(target, Target) and not isinstance(self.eligible(target), Rejected)

    def _target(self, name: Name | None, pin: Pin | None, terms: Terms) -> Target | Rejected:
        scope = terms.scope
        if pin is None and scope is not None and len(scope.urls) == 1:
            pin = next(
                (Pin(n.spec.name) for n in self._nodes.values() if n.spec.url in scope.urls), None
            )
        sent, known = ("", False) if name is None else (name.text, self.knows(name.key))
        target = Target(name, pin, sent, known, scope)
        nodes: Sequence[Node] = list(self._nodes.values())
        if pin is not None:
            inside = policy.inside(self._pools, target)
            if isinstance(inside, Rejected):
                return inside if inside.refusal is Refusal.OUT_OF_SCOPE else target
            nodes = inside
        bounds = self._rules.bounds(nodes, name, terms)
        if isinstance(bounds, Rejected):
            return bounds
        return Target(name, pin, sent, known, scope, bounds)

    def _name(self, text: str) -> Name:
        rest = names.without_prefix(text)
        try:
            name = names.parse(text)
        except BadName:
            if rest is None:
                raise
            return names.parse(rest)
        if rest is None or self.knows(name.key):
            return name
        return names.parse(rest)

    def knows(self, key: str) -> bool:
        """Whether any node, up or down, has this model as far as known."""
        return any(key in node.present for node in self._nodes.values())

    def eligible(self, target: Target) -> Sequence[NodeSpec] | Rejected:
        """The nodes that a request for this would be sent to now; nothing is counted."""
        found = policy.eligible(self._pools, target, ())
        if isinstance(found, Rejected):
            return found
        return [node.spec for node in found.nodes]

    def listed(self, scope: Scope | None) -> Sequence[Mapping[str, Model]]:
        """What each node that is up has, of what may be had from it."""
        return self._rules.listed(self._up(scope))

    def _up(self, scope: Scope | None) -> list[Node]:
        nodes = [node for node in self._nodes.values() if node.up]
        return nodes if scope is None else [n for n in nodes if n.spec.url in scope.urls]

    @property
    def aliases(self) -> Collection[str]:
        """Their canonical names."""
        return self._aliases.keys()

    # What managing verbs go through: they reach all nodes that a model is on, or belongs on.

    def holders(self, target: Target) -> Sequence[NodeSpec] | Rejected:
        """All nodes that are up and have the model, wherever it may live."""
        inside = policy.inside(self._pools, target)
        if isinstance(inside, Rejected):
            return inside
        key = "" if target.model is None else target.model.key
        having = [node for node in inside if key in node.present]
        up = [node.spec for node in having if node.up]
        return up or policy.nobody_has(inside, having, target)

    def homes(self, target: Target) -> Sequence[NodeSpec] | Rejected:
        """The nodes that are up and where the model may live: those that have it first, then
        those with the least on disk."""
        inside = policy.inside(self._pools, target)
        if isinstance(inside, Rejected):
            return inside
        assert target.model is not None  # a resolved name
        found = self._rules.homes(inside, target.model)
        if isinstance(found, Rejected):
            down = found.refusal is Refusal.NODES_DOWN and target.pin is not None
            return Rejected(Refusal.PIN_DOWN, found.nodes) if down else found
        return [node.spec for node in found]

    def everyone(self, scope: Scope | None) -> Sequence[NodeSpec]:
        """The nodes that are up."""
        return [node.spec for node in self._up(scope)]

    def holding(self, target: Target) -> Sequence[NodeSpec]:
        """The nodes that are up and may have the model in memory: they have, or have been used
        since anybody looked. Each counts as used once more."""
        inside = policy.inside(self._pools, target)
        if isinstance(inside, Rejected) or target.model is None:
            return ()
        key = target.model.key
        found = [
            node
            for node in inside
            if node.up
            and (key in node.resident or (node.used != node.seen and key in node.present))
        ]
        for node in found:
            node.used += 1
        return [node.spec for node in found]

    def unseen(self, scope: Scope | None) -> Sequence[tuple[NodeSpec, int]]:
        """The nodes whose memory may have other models in it than when it was last looked at,
        each with what `saw` is to be told once somebody has."""
        return [(node.spec, node.used) for node in self._up(scope) if node.used != node.seen]

    def saw(self, url: str, used: int) -> None:
        """The node's memory was looked at after `used`."""
        node = self._nodes.get(url)
        if node is not None:
            node.seen = used

    # The lease of one attempt.

    def submit(self, attempt: Attempt) -> Lease | Rejected:
        """Choose a node and count the attempt on it, in one step."""
        found = policy.eligible(self._pools, attempt.target, attempt.tried)
        if isinstance(found, Rejected):
            return found
        node = policy.pick(found.nodes)
        self._turn += 1
        node.turn = self._turn
        node.in_flight += 1
        node.used += 1
        self._leases[attempt] = node
        return Lease(attempt, node.spec, found.reason)

    def leave(self, attempt: Attempt, outcome: Outcome, now: float) -> Flip | None:
        """The one way out, for an attempt that was leased and for one that was not."""
        node = self._leases.pop(attempt, None)
        if node is None:
            return None
        node.in_flight -= 1
        node.used += 1
        if not node.in_flight and node in self._leaving:
            self._leaving.remove(node)
        failure = outcome.failure
        if failure is not None and failure.kind is FailureKind.REFUSED:
            return self._feel(node, Sign.REFUSED, failure.detail, now)
        return None

    # What probes say.

    def observe(self, url: str, seen: Observation, now: float) -> Flip | None:
        """Take what a probe learned; a node that is no longer configured is passed over."""
        node = self._nodes.get(url)
        if node is None:
            return None
        if node.learn(seen):
            self.revision += 1
        if seen.sign is None:
            return None
        return self._feel(node, seen.sign, seen.detail, now)

    def _feel(self, node: Node, sign: Sign, detail: str, now: float) -> Flip | None:
        topology = self._topology
        node.detail = detail
        was, health = node.feel(sign, topology.up_after, topology.down_after, now)
        if was is not health:
            self.revision += 1
        return node.flip(was)

    # What others may see.

    @property
    def in_flight(self) -> int:
        return len(self._leases)

    @property
    def any_up(self) -> bool:
        return any(node.up for node in self._nodes.values())

    @property
    def probed(self) -> bool:
        """Whether every node has been looked at once."""
        return all(node.health is not Health.UNKNOWN for node in self._nodes.values())

    def specs(self) -> Sequence[NodeSpec]:
        return [node.spec for node in self._nodes.values()]

    def conflicts(self) -> Conflicts:
        """Of each name that stands for several digests on nodes that are up, who has which."""
        listed = [(node.spec.name, node.present) for node in self._nodes.values() if node.up]
        if [name for name, _ in listed] != [name for name, _ in self._listed] or any(
            one is not other for (_, one), (_, other) in zip(listed, self._listed, strict=True)
        ):
            self._listed, self._conflicts = listed, conflicts(listed)
        return self._conflicts

    def suspect(self, url: str) -> bool:
        node = self._nodes.get(url)
        return node is not None and node.suspect

    def snapshot(self) -> Sequence[NodeView]:
        """All nodes in the order of the configuration, then those that are leaving."""
        return [_view(node, leaving=False) for node in self._nodes.values()] + [
            _view(node, leaving=True) for node in self._leaving
        ]


def _view(node: Node, *, leaving: bool) -> NodeView:
    return NodeView(
        spec=node.spec,
        pool=node.pool,
        health=node.health,
        since=node.since,
        detail=node.detail,
        suspect=node.suspect,
        leaving=leaving,
        in_flight=node.in_flight,
        version=node.version,
        present=node.present,
        resident=node.resident,
    )
