"""The one owner of nodes and leases. Synchronous; told the time; returns what to do."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from math import inf

import msgspec

from router.core import policy, sizing
from router.core.bounds import Conflicts, Rules, conflicts
from router.core.breaker import Ground, Roll
from router.core.memory import Loads
from router.core.names import Name
from router.core.node import Node
from router.core.policy import Attempt, Eligible, Target
from router.core.queue import Waiting
from router.core.rates import Speed, Waits
from router.core.reach import Range, Reach
from router.core.resolver import Resolver
from router.core.retry import Budget
from router.core.scheduler import Placed, Scheduler
from router.core.types import (
    FailureKind,
    Flip,
    Health,
    Kept,
    Model,
    Need,
    NodeSpec,
    NodeView,
    NumCtx,
    Observation,
    Outcome,
    Policy,
    PoolSpec,
    Reason,
    Refusal,
    Rejected,
    Scope,
    Sign,
    Topology,
    Weighed,
)
from router.core.usage import Usage
from router.core.warm import Costs, Step, Warm, bytes_lost, homes, resident
from router.core.work import Priority, Work

_NO_NEED = Need.NONE
AGAIN_S = 0.25  # what a wait is worth changes with time, too: then it is to be asked again
_BACK_S = 30.0  # a node that is down may have been started anew


class Lease(msgspec.Struct, frozen=True, eq=False):
    """The right to have `attempt` in flight on `node`. `ahead`: how many requests for the model
    are there already, where that matters; `expected_s`: when the answer is expected to begin."""

    attempt: Attempt
    node: NodeSpec
    reason: Reason
    flips: Sequence[Flip] = ()
    ahead: int = 0
    expected_s: float | None = None


class Queued(msgspec.Struct, frozen=True, eq=False):
    """`attempt` waits for a node: `granted` will tell of it, unless it leaves. `expected_s`: for
    how long, as far as can be told now."""

    attempt: Attempt
    expected_s: float


class Lost(msgspec.Struct, frozen=True, eq=False):
    """`attempt` has waited in vain: what it needs is gone. It is told what one who came now
    would be."""

    attempt: Attempt
    rejected: Rejected


class Learned(msgspec.Struct, frozen=True, eq=False):
    """What a node has shown: `loads` is None where nobody plans with its memory."""

    node: str
    speeds: Mapping[str, Speed]
    loads: Loads | None


class Warming(msgspec.Struct, frozen=True, eq=False):
    """A model that a node is to be asked for so that it stays in memory, or gets there (`loads`).
    `name`: as the node spells it; `num_ctx`: the context that it has there, where that is told."""

    lease: Lease
    key: str
    name: str
    loads: bool
    num_ctx: int | None = None


class _Held(msgspec.Struct, frozen=True, eq=False):
    """Where a lease is counted. `turn`: how many leases had been given with it; `paid`: it takes
    from the budget of retries; `scheduled`: the scheduler has placed it."""

    node: Node
    key: str
    turn: int
    paid: bool
    scheduled: bool


class Pool:
    """All nodes and all leases. `revision` grows with every change that a listing may show;
    `schedules`: requests may wait here, and it matters how much work they are."""

    schedules: bool

    def __init__(self, topology: Topology, now: float, roll: Roll = lambda: 0.5) -> None:
        self.revision = 0
        self._nodes: dict[str, Node] = {}
        self._leaving: list[Node] = []
        self._leases: dict[Attempt, _Held] = {}
        self._ground = Ground(topology.resilience, roll)
        self._budget = Budget()
        self._scheduler = Scheduler()
        self._warm = Warm()
        self._preloads: set[Attempt] = set()
        self._paid: set[Attempt] = set()  # of those that wait
        self._touched: set[Node] = set()  # where something has happened since they were looked at
        self._came: set[str] = set()  # models that somebody waits for since then
        self._again_at = 0.0
        self._conflicts: Conflicts = {}
        self._listed: Sequence[tuple[str, Mapping[str, Model]]] = ()
        self.reconfigure(topology, now)

    def __repr__(self) -> str:
        return f"<Pool {list(self._nodes.values())} {len(self._leases)} leases>"

    # What a configuration says.

    def reconfigure(self, topology: Topology, now: float) -> None:
        """Take a new configuration. A node whose url stays keeps its state."""
        self._topology = topology
        self._ground.rules = topology.resilience
        self._rules = Rules(topology)
        before = self._nodes | {node.spec.url: node for node in self._leaving}
        self._nodes = {}
        self._pools: list[list[Node]] = []
        for pool in topology.pools:
            nodes = [self._kept(before, spec, pool, now) for spec in pool.nodes]
            self._pools.append(nodes)
            self._nodes |= {node.spec.url: node for node in nodes}
        self._leaving = [
            node for url, node in before.items() if url not in self._nodes and node.in_flight
        ]
        ways = [node.schedules for node in self._nodes.values()]
        self.schedules, self._lends = any(ways), not all(ways)
        self._spills = any(node.spill_s < inf for node in self._nodes.values())
        self._again_at = 0.0
        self._resolver = Resolver(self._pools, self._rules, topology)
        self._scheduler.scores.keep([*self._nodes.values(), *self._leaving])
        self._scheduler.scores.warm = topology.warm
        self._warm.configure(topology.warm, self._nodes)
        self._touched.clear()
        self.revision += 1

    def _kept(self, before: Mapping[str, Node], spec: NodeSpec, pool: PoolSpec, now: float) -> Node:
        node = before.get(spec.url)
        if node is None:
            node = Node(spec, pool.name, now)
        else:
            node.configure(spec, pool.name)
        node.schedules = (pool.policy or self._topology.policy) is Policy.EXPECTED_DELAY
        node.spill_s = pool.spill_after_s if node.schedules else inf
        if not node.schedules:
            self._scheduler.scores.lost(node)
        return node

    # What a request goes through.

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

    def eligible(self, target: Target) -> Sequence[NodeSpec] | Rejected:
        """The nodes that a request for this may be sent to, whatever breakers say now; nothing is
        counted."""
        found = policy.eligible(self._pools, target, (), self._ground.rules, inf)
        if isinstance(found, Rejected):
            return found
        return [node.spec for node in found.nodes]

    def listed(self, scope: Scope | None) -> Sequence[Mapping[str, Model]]:
        """What each node that takes requests has, of what may be had from it."""
        return self._rules.listed([node for node in self._up(scope) if node.open])

    def _up(self, scope: Scope | None) -> list[Node]:
        nodes = [node for node in self._nodes.values() if node.up]
        return nodes if scope is None else [n for n in nodes if n.spec.url in scope.urls]

    @property
    def aliases(self) -> Collection[str]:
        """Their canonical names."""
        return self._resolver.aliases

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

    def explain(self, target: Target, work: Work, now: float) -> Sequence[Weighed]:
        """What each node would cost a request, the best first; then why the others may not have
        it. From the code that decides, without a decision."""
        attempt = Attempt(target, work=work)
        found, model = self._eligible(attempt, now), target.model
        best: Sequence[Weighed] = ()
        if isinstance(found, Eligible):
            if found.nodes[0].schedules and model is not None and not model.cloud:
                nodes_of = self._nodes_of(now)
                best = self._scheduler.weigh(attempt, model.key, found.nodes, nodes_of, now)
                best = [*best, *_after(nodes_of.of(attempt))]
            else:
                nodes = policy.order(found.nodes, self._ground.rules, now)
                best = [Weighed(n.spec, reason=found.reason, now=True) for n in nodes]
        urls = {one.node.url for one in best}
        others = [node for url, node in self._nodes.items() if url not in urls]
        return [*best, *(_barred(node, target, now) for node in others)]

    # The lease of one attempt.

    def submit(self, attempt: Attempt, now: float) -> Lease | Queued | Rejected:
        """Choose a node and count the attempt on it, in one step; or have it wait for one."""
        target, paid = attempt.target, False
        found = self._eligible(attempt, now)
        if isinstance(found, Rejected):
            return found
        if attempt.answered:
            paid = self._is_open(attempt.answered, target, now)
            if paid and not self._budget.take(len(self._leases), self._ground.rules, now):
                return Rejected(Refusal.BUDGET)
        model, runs = target.model, attempt.work.infers
        if found.nodes[0].schedules and runs and model is not None and not model.cloud:
            return self._schedule(attempt, model.key, now, paid=paid)
        node = policy.pick(found.nodes, self._ground.rules, now)
        return self._lease(attempt, node, found.reason, now, paid=paid)

    def _eligible(self, attempt: Attempt, now: float) -> Eligible | Rejected:
        target = attempt.target
        pools: Sequence[Sequence[Node]] = self._pools
        if attempt.digest and target.model is not None:
            pools = self._having(target.model.key, attempt.digest)
        found = policy.eligible(pools, target, attempt.tried, self._ground.rules, now)
        if attempt.met and not isinstance(found, Rejected):
            others = [node for node in found.nodes if node.spec.url not in attempt.met]
            return Eligible(others or found.nodes, found.reason, found.then)
        return found

    def _lease(
        self,
        attempt: Attempt,
        node: Node,
        reason: Reason,
        now: float,
        *,
        paid: bool,
        placed: Placed | None = None,
    ) -> Lease:
        ground, model = self._ground, attempt.target.model
        key = "" if model is None else model.key
        ground.turn += 1
        flips = node.lease(key, ground, now)
        self._leases[attempt] = _Held(node, key, ground.turn, paid, placed is not None)
        if placed is None:
            return Lease(attempt, node.spec, reason, flips)
        return Lease(attempt, node.spec, reason, flips, placed.ahead, placed.first_s)

    # Those that wait.

    def schedules_at(self, url: str) -> bool:
        """Whether requests wait for their turn at this node."""
        return self._nodes[url].schedules

    @property
    def at_least(self) -> bool:
        """Whether contexts that requests ask for are raised to those of loaded models."""
        return self._topology.num_ctx is NumCtx.AT_LEAST

    @property
    def waiting(self) -> int:
        """How many requests wait for a node."""
        return len(self._scheduler.queue)

    def _schedule(
        self, attempt: Attempt, key: str, now: float, *, paid: bool
    ) -> Lease | Queued | Rejected:
        if paid:
            self._paid.add(attempt)
        nodes_of = self._nodes_of(now)
        found = self._scheduler.submit(attempt, key, nodes_of, now)
        if isinstance(found, Placed):
            return self._placed(found, nodes_of, now)
        expected_s = found.expected_s
        if expected_s < inf:  # else there may be room at any moment
            expected_s = min(expected_s, nodes_of.spills_s(attempt))
        refused = self._turned_away(found, expected_s, now)
        if refused is not None:
            self._withdraw(attempt)
            return refused
        self._came.add(key)
        return Queued(attempt, expected_s)

    def _turned_away(self, one: Waiting, expected_s: float, now: float) -> Rejected | None:
        """Why a request that has just come may not wait."""
        limits, flow = self._topology.queue, one.flow
        if self.waiting > limits.in_all:
            return Rejected(Refusal.FULL)
        many = flow.waiting > 1 and flow.waiting_bytes > limits.flow_bytes
        if many or flow.waiting > limits.of_flow:
            return Rejected(Refusal.CROWDED)
        if one.attempt.work.deadline < now + expected_s < inf and self._has_served(one.key):
            return Rejected(Refusal.LATE, after_s=expected_s)
        return None

    def _has_served(self, key: str) -> bool:
        """Whether it was seen how long answers of this model take: nobody is refused for a guess
        from its size, with one slot for a start."""
        replicas = [node.replicas.get(key) for node in self._nodes.values()]
        return any(one is not None and one.rates.learned for one in replicas)

    def _withdraw(self, attempt: Attempt) -> None:
        """It waits no longer, and has no node."""
        self._scheduler.withdraw(attempt)
        if attempt in self._paid:
            self._paid.discard(attempt)
            self._budget.give()

    def _placed(self, found: Placed, nodes_of: Reach, now: float) -> Lease:
        paid = found.attempt in self._paid
        self._paid.discard(found.attempt)
        attempt, node, reason = found.attempt, found.node, found.reason
        if self._spills and nodes_of.spilled(attempt, node):
            reason = Reason.LATER_POOL
        return self._lease(attempt, node, reason, now, paid=paid, placed=found)

    def _nodes_of(self, now: float) -> Reach:
        """The nodes that may be asked for each of those that wait."""
        return Reach(lambda one: self._eligible(one, now), self._scheduler.queue.since, now)

    def _hopes(self, refused: Rejected, now: float) -> bool:
        """Whether a request waits on although it would be refused if it came now: nodes are full,
        new, or have not been down for long."""
        if refused.until is not None or not self.probed:
            return True
        down = refused.refusal in (Refusal.NODES_DOWN, Refusal.PIN_DOWN)
        return down and any(now - self._nodes[one.url].since < _BACK_S for one in refused.nodes)

    def granted(self, now: float) -> Sequence[Lease | Lost]:
        """Those that wait no longer. To be asked whenever the pool was told something."""
        touched, self._touched = self._touched, set()
        came, self._came = self._came, set()
        if not self.waiting:
            return ()
        everywhere = now >= self._again_at or self._scheduler.unbarred
        if everywhere:
            self._again_at, self._scheduler.unbarred = now + AGAIN_S, False
        elif not touched and not came:
            return ()
        where = None if everywhere else touched
        nodes_of = self._nodes_of(now)
        placed = self._scheduler.pass_(nodes_of, now, where, came)
        given: list[Lease | Lost] = [self._placed(found, nodes_of, now) for found in placed]
        if everywhere and self._lends:
            given += self._outright(nodes_of, now)
        lost = [Lost(*one) for one in nodes_of.lost.items() if not self._hopes(one[1], now)]
        if self._scheduler.spared or lost:
            self._again_at = 0.0
        for one in lost:
            self._withdraw(one.attempt)
        return [*given, *lost]

    def _outright(self, nodes_of: Reach, now: float) -> Iterator[Lease]:
        """Those that still wait, and may have a node where nobody waits for a turn, get it."""
        spared = self._scheduler.spared
        for one in [*self._scheduler.queue]:
            attempt, reach = one.attempt, nodes_of.now(one.attempt)
            nodes = [node for node in reach.outright if node not in spared]
            if not nodes:
                continue
            node = policy.pick(nodes, self._ground.rules, now)
            paid = attempt in self._paid
            self._paid.discard(attempt)
            self._scheduler.let_go(one)
            self._again_at = 0.0  # others may have waited for its sake
            yield self._lease(attempt, node, reach.reason, now, paid=paid)
            if node.troubled:
                spared.add(node)

    def began(self, attempt: Attempt, now: float) -> str:
        """The first record of its answer is there. Gives the url of the node, if it has loaded
        something for that and others depend on its context."""
        held = self._leases.get(attempt)
        if held is None or not held.scheduled:
            return ""
        self._touched.add(held.node)
        loaded = self._scheduler.began(attempt, held.node, held.key, now)
        return held.node.spec.url if loaded and self.at_least else ""

    def _having(self, key: str, digest: str) -> Sequence[Sequence[Node]]:
        return [[n for n in nodes if n.digest(key) == digest] for nodes in self._pools]

    def _is_open(self, url: str, target: Target, now: float) -> bool:
        """Whether this node still gets such requests. What leaves one that does not is no more
        than what was in flight there when it was ejected: it costs no budget."""
        node, model = self._nodes.get(url), target.model
        if node is None or not node.open or not node.serves(model):
            return False
        return node.lets("" if model is None else model.key, now)

    def leave(self, attempt: Attempt, outcome: Outcome, now: float) -> Sequence[Flip]:
        """The one way out, for an attempt that was leased and for one that was not."""
        held = self._leases.pop(attempt, None)
        if held is None:
            self._withdraw(attempt)
            self._again_at = 0.0  # others may have waited for its sake
            return ()
        node, failure = held.node, outcome.failure
        good = failure is None and outcome.told
        if held.scheduled:
            self._scheduler.leave(attempt, node, held.key, now, good=good)
            self._touched.add(node)
        elif self._preloads and attempt in self._preloads:
            self._preloaded(attempt, node, held.key, now, good=good)
        if held.paid:
            self._budget.give()
        flips = node.leave(held.key, held.turn, outcome, self._ground, now)
        if not node.in_flight and node in self._leaving:
            self._leaving.remove(node)
            self._touched.discard(node)
            self._scheduler.scores.keep([*self._nodes.values(), *self._leaving])
        if failure is None:
            return flips
        if failure.kind is FailureKind.FIRST_BYTE_TIMEOUT:
            node.replicas[held.key].rates.late()
        if failure.kind is FailureKind.REFUSED:
            return [*flips, *self._feel(node, Sign.REFUSED, failure.detail, now)]
        return flips

    # What is kept in memory.

    def warmings(self, now: float) -> Sequence[Warming]:
        """What nodes are to be asked for now, so that models stay in memory. Each is leased, and
        leaves as all do."""
        found = []
        while (step := self._warm.step(self._homes, self._preload_cost(now), now)) is not None:
            found.append(self._warming(step, now))
        return found

    @property
    def warm_at(self) -> float:
        """When `warmings` has something new to tell, if nothing happens before."""
        return self._warm.next_at

    def kept(self) -> Sequence[Kept]:
        """Which models are kept in memory, and where they are."""
        return self._warm.kept(self._homes)

    def _homes(self, key: str) -> Sequence[Sequence[Node]]:
        return homes(self._pools, self._rules, key)

    def _preload_cost(self, now: float) -> Costs:
        scores, wanted = self._scheduler.scores, self._topology.warm
        return lambda node, key: (
            scores.preload_s(node, key, now) if node.schedules else bytes_lost(node, key, wanted)
        )

    def _warming(self, step: Step, now: float) -> Warming:
        node, key = step.node, step.key
        listed = node.present[key].entry.get("name")
        name = listed if isinstance(listed, str) else key
        attempt = Attempt(Target(Name(name, key), sent=name))
        self._warm.begun(step, now)
        there = resident(node, key)
        if step.loads:
            self._preloads.add(attempt)
            if node.schedules:
                self._scheduler.scores.preload(attempt, node, key, now)
        reason = Reason.LOAD if step.loads else Reason.WARM
        lease = self._lease(attempt, node, reason, now, paid=False)
        num_ctx = None if there is None else there.context
        return Warming(lease, key, name, step.loads, num_ctx)

    def _preloaded(self, attempt: Attempt, node: Node, key: str, now: float, *, good: bool) -> None:
        self._preloads.discard(attempt)
        memory = self._scheduler.scores.memory(node)
        memory.end(attempt, key, now, good=good)
        if not node.up:
            memory.forget()
        self._touched.add(node)
        self._warm.ended(node, key, now)

    def forgive(self, url: str, target: Target) -> None:
        """What a node failed to answer, another one has failed to answer alike."""
        node = self._nodes.get(url)
        if node is not None and target.model is not None:
            node.forgive(target.model.key)

    def believed(self, url: str, target: Target) -> bool:
        """Whether a node that was asked for a model was believed to have it, under the very name;
        it may have been taken from the node's list since."""
        node, model = self._nodes.get(url), target.model
        return model is not None and not model.cloud and (node is None or node.spells(model))

    def digest(self, url: str, target: Target) -> str:
        """Which model a node has under this name; empty where that is not known."""
        node = self._nodes.get(url)
        return "" if node is None or target.model is None else node.digest(target.model.key)

    def learn(
        self, url: str, key: str, told: Usage, flow: str = "", ahead: int = 0, now: float = 0.0
    ) -> None:
        """Take what the final record of an answer told of the node's speed, to a request of this
        flow that had so many for the same model before it."""
        node = self._nodes.get(url)
        replica = None if node is None else node.replicas.get(key)
        if node is not None and replica is not None:
            replica.rates.learn(told)
            self._scheduler.learn(node, key, flow, told, ahead, now)

    def first_byte_s(self, lease: Lease, waits: Waits, body_bytes: int, *, streams: bool) -> float:
        """How long the answer to a leased request may take to begin."""
        held = self._leases[lease.attempt]
        replica = held.node.replicas[held.key]
        return replica.rates.first_byte_limit_s(
            waits, sizing.tokens(body_bytes), replica.in_flight - 1, streams=streams,
            warm=held.key in held.node.resident,
        )  # fmt: skip

    def context(self, lease: Lease) -> int | None:
        """For how many tokens the model is loaded where this lease is; None where that is not
        known, and where it is to be loaded."""
        if lease.reason is Reason.LOAD:
            return None
        held = self._leases[lease.attempt]
        one = (
            self._scheduler.scores.memory(held.node).loaded.get(held.key)
            if held.scheduled
            else held.node.resident.get(held.key)
        )
        return None if one is None else one.context

    # What the operator says.

    def drain(self, text: str, *, draining: bool) -> NodeSpec | Rejected:
        """Give a node no new leases, or give it leases again; `text` is its name or address."""
        scope = self.scope(text)
        if isinstance(scope, Rejected) or len(scope.urls) != 1:
            return scope if isinstance(scope, Rejected) else Rejected(Refusal.AMBIGUOUS_PIN)
        [node] = [self._nodes[url] for url in scope.urls]
        if node.drain(draining=draining):
            self.revision += 1
            self._again_at = 0.0
        return node.spec

    @property
    def drained(self) -> Sequence[str]:
        """The urls of the nodes that get no new leases."""
        return [url for url, node in self._nodes.items() if node.draining]

    def keep_drained(self, urls: Collection[str]) -> None:
        """Take over which nodes get no new leases."""
        for url in self._nodes.keys() & urls:
            self._nodes[url].drain(draining=True)
        self.revision += 1

    # What probes say.

    def observe(self, url: str, seen: Observation, now: float) -> Sequence[Flip]:
        """Take what a probe learned; a node that is no longer configured is passed over."""
        node = self._nodes.get(url)
        if node is None:
            return ()
        if node.learn(seen):
            self.revision += 1
        if seen.resident is not None and node.schedules:
            self._scheduler.scores.see(node, now, seen.wall)
            self._touched.add(node)
        if seen.resident is not None and seen.wall:
            self._warm.see(node, now, seen.wall)
        if seen.sign is None:
            return ()
        return self._feel(node, seen.sign, seen.detail, now)

    def _feel(self, node: Node, sign: Sign, detail: str, now: float) -> Sequence[Flip]:
        topology = self._topology
        node.detail = detail
        was, health = node.feel(sign, topology.up_after, topology.down_after, now)
        if was is health:
            return ()
        self.revision += 1
        self._again_at = 0.0
        if health is Health.DOWN:
            self._scheduler.scores.lost(node)
        if was is Health.DOWN:
            node.full_at = now + topology.resilience.slow_start_s
        return [Flip(node.spec.name, was, health, detail)]

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
        return [self._view(node, leaving=False) for node in self._nodes.values()] + [
            self._view(node, leaving=True) for node in self._leaving
        ]

    def learned(self) -> Sequence[Learned]:
        """What each node has shown of its speed, and what loading has come to there."""
        return [
            Learned(
                node.spec.name, node.speeds(),
                copy(self._scheduler.scores.memory(node).loads) if self.schedules else None,
            )
            for node in self._nodes.values()
        ]  # fmt: skip

    def queued(self) -> Mapping[str, int]:
        """How many requests wait, by priority."""
        found = dict.fromkeys((priority.word for priority in Priority), 0)
        for one in self._scheduler.queue:
            found[one.attempt.work.priority.word] += 1
        return found

    def _view(self, node: Node, *, leaving: bool) -> NodeView:
        slots = self._scheduler.learned(node) if node.spec.auto else {}
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
            slots=slots,
        )


def _after(known: Sequence[Range]) -> Iterator[Weighed]:
    """The nodes of later pools, with how long a request waits before it may have them."""
    before = {*known[0].nodes}
    for reach in known[1:]:
        nodes = [node for node in (*reach.nodes, *reach.outright) if node not in before]
        before.update(nodes)
        for node in nodes:
            barred = f"of a later pool: may be had after {reach.after_s:g} s"
            yield Weighed(node.spec, barred, later=True)


def _barred(node: Node, target: Target, now: float) -> Weighed:
    why = policy.why_not(node, target, now)
    return Weighed(node.spec, why or "others go before it", later=why == policy.BUSY)
