"""The nodes that there are and what is known of them: what was configured, listed, probed."""

from collections.abc import Callable, Collection, Mapping, Sequence
from math import inf

from router.core import policy
from router.core.bounds import Conflicts, Rules, conflicts
from router.core.node import Node
from router.core.policy import Attempt, Eligible, Target
from router.core.resolver import Resolver
from router.core.types import (
    Flip,
    Health,
    Model,
    Need,
    NodeSpec,
    NodeView,
    Observation,
    Policy,
    PoolSpec,
    Refusal,
    Rejected,
    Scope,
    Sign,
    Topology,
)

_NO_NEED = Need.NONE


class Registry:
    """All nodes: `nodes` by url, `pools` as configured, `leaving` those that are so no more and
    have requests yet. `revision` grows with every change that a listing may show; `changed`: who
    may have a node has changed since those that wait were last looked at."""

    def __init__(self, slots: Callable[[Node], Mapping[str, int]]) -> None:
        """`slots`: how many slots each model has on a node, as far as that was learned."""
        self.revision = 0
        self.changed = False
        self.nodes: dict[str, Node] = {}
        self.pools: list[list[Node]] = []
        self.leaving: list[Node] = []
        self._slots = slots
        self._known: dict[str, Eligible] = {}
        self._known_at = -1
        self._conflicts: Conflicts = {}
        self._listed: Sequence[tuple[str, Mapping[str, Model]]] = ()

    def __repr__(self) -> str:
        return f"<Registry {self.all}>"

    @property
    def all(self) -> list[Node]:
        """In the order of the configuration, then those that are leaving."""
        return [*self.nodes.values(), *self.leaving]

    # What a configuration says.

    def configure(self, topology: Topology, now: float) -> None:
        """Take a new configuration. A node whose url stays keeps its state."""
        self._topology, self._resilience = topology, topology.resilience
        self.rules = Rules(topology)
        before = {node.spec.url: node for node in self.all}
        self.nodes, self.pools = {}, []
        for pool in topology.pools:
            nodes = [self._kept(before, spec, pool, now) for spec in pool.nodes]
            self.pools.append(nodes)
            self.nodes |= {node.spec.url: node for node in nodes}
        self.leaving = [
            node for url, node in before.items() if url not in self.nodes and node.in_flight
        ]
        self._resolver = Resolver(self.pools, self.rules, topology)
        self.changed = True
        self.revision += 1

    def _kept(self, before: Mapping[str, Node], spec: NodeSpec, pool: PoolSpec, now: float) -> Node:
        node = before.get(spec.url)
        if node is None:
            node = Node(spec, pool.name, now)
        else:
            node.configure(spec, pool.name)
        node.schedules = (pool.policy or self._topology.policy) is Policy.EXPECTED_DELAY
        node.spill_s = pool.spill_after_s if node.schedules else inf
        return node

    # What clients ask for by name.

    def scope(self, text: str) -> Scope | Rejected:
        """The nodes that `/@text/...` leaves: one, by its name or address, or those of a pool."""
        return self._resolver.scope(text, self.revision)

    def resolve(
        self,
        text: str,
        scope: Scope | None = None,
        need: Need = _NO_NEED,
        since: tuple[int, ...] = (),
    ) -> Target | Rejected:
        """Read a model's name as a client wrote it: pin, alias and prefix taken off."""
        return self._resolver.resolve(text, scope, need, since, self.revision)

    def anyone(self, scope: Scope | None, need: Need, since: tuple[int, ...]) -> Target | Rejected:
        """What a request needs that names no model."""
        return self._resolver.anyone(scope, need, since, self.revision)

    def knows(self, key: str) -> bool:
        """Whether any node, up or down, has this model as far as known."""
        return self._resolver.knows(key)

    @property
    def aliases(self) -> Collection[str]:
        """Their canonical names."""
        return self._resolver.aliases

    # What may be had.

    def eligible(self, target: Target) -> Sequence[NodeSpec] | Rejected:
        """The nodes that a request for this may be sent to, whatever breakers say now; nothing is
        counted."""
        found = policy.eligible(self.pools, target, (), self._resilience, inf)
        if isinstance(found, Rejected):
            return found
        return [node.spec for node in found.nodes]

    def eligible_now(self, attempt: Attempt, now: float) -> Eligible | Rejected:
        """The nodes that one attempt may be given now."""
        target, model = attempt.target, attempt.target.model
        limits = target.pin or target.bounds or attempt.tried or attempt.digest or attempt.met
        if model is not None and not model.cloud and not limits:
            return self._usual(target, model.key, now)
        pools: Sequence[Sequence[Node]] = self.pools
        if attempt.digest and target.model is not None:
            pools = self._having(target.model.key, attempt.digest)
        found = policy.eligible(pools, target, attempt.tried, self._resilience, now)
        if attempt.met and not isinstance(found, Rejected):
            nodes = policy.fresh(found.nodes, attempt.met)
            return Eligible(nodes, found.reason, found.then)
        return found

    def _usual(self, target: Target, key: str, now: float) -> Eligible | Rejected:
        """The nodes for whoever asks for nothing but a model: worked out once, and good for as long
        as nothing changes and no breaker has to be asked."""
        if self._known_at != self.revision:
            self._known, self._known_at = {}, self.revision
        known = self._known.get(key)
        if known is not None and not [1 for node in known.nodes if node.troubled]:
            return known
        found = policy.eligible(self.pools, target, (), self._resilience, now)
        calm = not any(node.troubled for node in self.nodes.values())
        if calm and isinstance(found, Eligible) and found.then is None:
            self._known[key] = found
        return found

    def _having(self, key: str, digest: str) -> Sequence[Sequence[Node]]:
        return [[n for n in nodes if n.digest(key) == digest] for nodes in self.pools]

    def takes(self, url: str, target: Target, now: float) -> bool:
        """Whether this node still gets such requests."""
        node, model = self.nodes.get(url), target.model
        if node is None or not node.open or not node.serves(model):
            return False
        return node.lets("" if model is None else model.key, now)

    def has_served(self, key: str) -> bool:
        """Whether it was seen how long answers of this model take: nobody is refused for a guess
        from its size, with one slot for a start."""
        replicas = [node.replicas.get(key) for node in self.nodes.values()]
        return any(one is not None and one.rates.learned for one in replicas)

    def schedules_at(self, url: str) -> bool:
        """Whether requests wait for their turn at this node."""
        return self.nodes[url].schedules

    def listed(self, scope: Scope | None) -> Sequence[Mapping[str, Model]]:
        """What each node that takes requests has, of what may be had from it."""
        return self.rules.listed([node for node in self._up(scope) if node.open])

    def _up(self, scope: Scope | None) -> list[Node]:
        nodes = [node for node in self.nodes.values() if node.up]
        return nodes if scope is None else [n for n in nodes if n.spec.url in scope.urls]

    def believed(self, url: str, target: Target) -> bool:
        """Whether a node that was asked for a model was believed to have it, under the very name;
        it may have been taken from the node's list since."""
        node, model = self.nodes.get(url), target.model
        return model is not None and not model.cloud and (node is None or node.spells(model))

    def digest(self, url: str, target: Target) -> str:
        """Which model a node has under this name; empty where that is not known."""
        node = self.nodes.get(url)
        return "" if node is None or target.model is None else node.digest(target.model.key)

    # What managing verbs go through: they reach all nodes that a model is on, or belongs on.

    def holders(self, target: Target) -> Sequence[NodeSpec] | Rejected:
        """All nodes that are up and have the model, wherever it may live."""
        inside = policy.inside(self.pools, target)
        if isinstance(inside, Rejected):
            return inside
        key = "" if target.model is None else target.model.key
        having = [node for node in inside if key in node.present]
        up = [node.spec for node in having if node.up]
        return up or policy.nobody_has(inside, having, target)

    def homes(self, target: Target) -> Sequence[NodeSpec] | Rejected:
        """The nodes that are up and where the model may live: those that have it first, then
        those with the least on disk."""
        inside = policy.inside(self.pools, target)
        if isinstance(inside, Rejected):
            return inside
        assert target.model is not None  # a resolved name
        found = self.rules.homes(inside, target.model)
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
        inside = policy.inside(self.pools, target)
        if isinstance(inside, Rejected) or target.model is None:
            return ()
        key = target.model.key
        found = [
            node
            for node in inside
            if node.up and (node.resides(key) or (node.used != node.seen and key in node.present))
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
        node = self.nodes.get(url)
        if node is not None:
            node.seen = used

    # What the operator says.

    def drain(self, text: str, *, draining: bool) -> NodeSpec | Rejected:
        """Give a node no new leases, or give it leases again; `text` is its name or address."""
        scope = self.scope(text)
        if isinstance(scope, Rejected) or len(scope.urls) != 1:
            return scope if isinstance(scope, Rejected) else Rejected(Refusal.AMBIGUOUS_PIN)
        [node] = [self.nodes[url] for url in scope.urls]
        if node.drain(draining=draining):
            self.revision += 1
            self.changed = True
        return node.spec

    @property
    def drained(self) -> Sequence[str]:
        """The urls of the nodes that get no new leases."""
        return [url for url, node in self.nodes.items() if node.draining]

    def keep_drained(self, urls: Collection[str]) -> None:
        """Take over which nodes get no new leases."""
        for url in self.nodes.keys() & urls:
            self.nodes[url].drain(draining=True)
        self.revision += 1

    # What probes say. The pool is told, and tells it on.

    def learn(self, node: Node, seen: Observation) -> None:
        """Take what a probe learned of a node, but for its health."""
        if node.learn(seen):
            self.revision += 1

    def feel(self, node: Node, sign: Sign, detail: str, now: float) -> Sequence[Flip]:
        """Take what a node's health shows in."""
        topology = self._topology
        node.detail = detail
        was, health = node.feel(sign, topology.up_after, topology.down_after, now)
        if was is health:
            return ()
        self.revision += 1
        self.changed = True
        if was is Health.DOWN:
            node.full_at = now + self._resilience.slow_start_s
        return [Flip(node.spec.name, was, health, detail)]

    # What others may see.

    @property
    def any_up(self) -> bool:
        return any(node.up for node in self.nodes.values())

    @property
    def probed(self) -> bool:
        """Whether every node has been looked at once."""
        return all(node.health is not Health.UNKNOWN for node in self.nodes.values())

    def specs(self) -> Sequence[NodeSpec]:
        return [node.spec for node in self.nodes.values()]

    def conflicts(self) -> Conflicts:
        """Of each name that stands for several digests on nodes that are up, who has which."""
        listed = [(node.spec.name, node.present) for node in self.nodes.values() if node.up]
        if [name for name, _ in listed] != [name for name, _ in self._listed] or any(
            one is not other for (_, one), (_, other) in zip(listed, self._listed, strict=True)
        ):
            self._listed, self._conflicts = listed, conflicts(listed)
        return self._conflicts

    def suspect(self, url: str) -> bool:
        node = self.nodes.get(url)
        return node is not None and node.suspect

    def snapshot(self) -> Sequence[NodeView]:
        """All nodes in the order of the configuration, then those that are leaving."""
        return [self._view(node, leaving=False) for node in self.nodes.values()] + [
            self._view(node, leaving=True) for node in self.leaving
        ]

    def _view(self, node: Node, *, leaving: bool) -> NodeView:
        return NodeView(
            spec=node.spec,
            pool=node.pool,
            health=node.health,
            since=node.since,
            detail=node.detail,
            suspect=node.suspect,
            leaving=leaving,
            draining=node.draining,
            ejected=node.ejected(),
            in_flight=node.in_flight,
            version=node.version,
            present=node.present,
            resident=node.resident,
            slots=self._slots(node) if node.spec.auto else {},
        )
