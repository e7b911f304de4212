"""The one owner of nodes and leases. Synchronous; told the time; returns what to do."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from router.core import names, policy
from router.core.names import BadName, Name
from router.core.node import Node
from router.core.policy import Target
from router.core.types import (
    FailureKind,
    Flip,
    Health,
    Model,
    NodeSpec,
    Observation,
    Outcome,
    Reason,
    Refusal,
    Rejected,
    Sign,
    Topology,
)

# Names as clients write them, read once per revision. A client may send any number of them.
_RESOLVED_MAX = 1000


class Attempt(msgspec.Struct, frozen=True, eq=False):
    """One try on one node. Each has an identity of its own: it enters and leaves once."""

    target: Target
    tried: Collection[str] = frozenset()


class Lease(msgspec.Struct, frozen=True, eq=False):
    """The right to have `attempt` in flight on `node`."""

    attempt: Attempt
    node: NodeSpec
    reason: Reason


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as it was when the snapshot was taken. `leaving`: no longer configured."""

    spec: NodeSpec
    pool: str
    health: Health
    since: float
    detail: str
    suspect: bool
    leaving: bool
    in_flight: int
    version: str
    present: Mapping[str, Model]
    resident: Mapping[str, Model]

    @property
    def up(self) -> bool:
        return self.health is Health.UP


class Pool:
    """All nodes and all leases. `revision` grows with every change that a listing may show."""

    def __init__(self, topology: Topology, now: float) -> None:
        self.revision = 0
        self._nodes: dict[str, Node] = {}
        self._leaving: list[Node] = []
        self._leases: dict[Attempt, Node] = {}
        self._turn = 0
        self._resolved: dict[str, Target | Rejected] = {}
        self._resolved_at = 0
        self.reconfigure(topology, now)

    def __repr__(self) -> str:
        return f"<Pool {list(self._nodes.values())} {len(self._leases)} leases>"

    # What a configuration says.

    def reconfigure(self, topology: Topology, now: float) -> None:
        """Take a new configuration. A node whose url stays keeps its state."""
        self._aliases = {names.parse(name).key: to for name, to in topology.aliases.items()}
        self._topology = topology
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

    def resolve(self, text: str) -> Target | Rejected:
        """Read a model's name as a client wrote it: pin, alias and prefix taken off."""
        if self._resolved_at != self.revision or len(self._resolved) > _RESOLVED_MAX:
            self._resolved_at = self.revision
            self._resolved.clear()
        found = self._resolved.get(text)
        if found is None:
            found = self._resolved[text] = self._resolve(text)
        return found

    def _resolve(self, text: str) -> Target | Rejected:
        try:
            left, pin = names.split_pin(text)
            alias = self._aliases.get(self._name(left).key)
            if alias is not None:
                left, alias_pin = names.split_pin(alias)
                pin = pin or alias_pin
            name = self._name(left)
        except BadName:
            return Rejected(Refusal.BAD_NAME)
        return Target(name, pin, name.text, self.knows(name.key))

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

    def submit(self, attempt: Attempt) -> Lease | Rejected:
        """Choose a node and count the attempt on it, in one step."""
        found = policy.eligible(self._pools, attempt.target, attempt.tried)
        if isinstance(found, Rejected):
            return found
        node = policy.pick(found.nodes)
        self._turn += 1
        node.turn = self._turn
        node.in_flight += 1
        self._leases[attempt] = node
        return Lease(attempt, node.spec, found.reason)

    def leave(self, attempt: Attempt, outcome: Outcome, now: float) -> Flip | None:
        """The one way out, for an attempt that was leased and for one that was not."""
        node = self._leases.pop(attempt, None)
        if node is None:
            return None
        node.in_flight -= 1
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
