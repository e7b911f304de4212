"""The one owner of queue and leases. Synchronous; told the time; returns what to do."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from math import inf

import msgspec

from router.core import policy, sizing
from router.core.breaker import Ground, Roll
from router.core.lease import Lease, Lost, Queued, Warming
from router.core.memory import Loads
from router.core.node import Node
from router.core.policy import Attempt, Eligible, Target
from router.core.queue import Waiting
from router.core.rates import Speed, Waits
from router.core.reach import Reach
from router.core.registry import Registry
from router.core.retry import Budget
from router.core.scheduler import Placed, Scheduler
from router.core.types import (
    FailureKind,
    Flip,
    Health,
    NumCtx,
    Observation,
    Outcome,
    Reason,
    Refusal,
    Rejected,
    Sign,
    Topology,
    Weighed,
)
from router.core.usage import Usage
from router.core.warm import Warm
from router.core.work import Priority, Work

AGAIN_S = 0.25  # what a wait is worth changes with time, too: then it is to be asked again
_BACK_S = 30.0  # a node that is down may have been started anew


class Learned(msgspec.Struct, frozen=True, eq=False):
    """What a node has shown: `loads` is None where nobody plans with its memory."""

    node: str
    speeds: Mapping[str, Speed]
    loads: Loads | None


class _Held(msgspec.Struct, frozen=True, eq=False):
    """Where a lease is counted. `turn`: how many leases had been given with it; `paid`: it takes
    from the budget of retries; `placed`: where the scheduler has put it, if it has."""

    node: Node
    key: str
    turn: int
    paid: bool
    placed: Placed | None


class Pool:
    """All leases, and those that wait for one (`waiters`). `registry`: the nodes, for all questions
    about them; `warm`: what is kept in memory; `schedules`: requests may wait here, and it matters
    how much work they are; `at_least`: contexts that they ask for are raised to those of loaded
    models."""

    schedules: bool
    at_least: bool

    def __init__(self, topology: Topology, now: float, roll: Roll = lambda: 0.5) -> None:
        self._leases: dict[Attempt, _Held] = {}
        self._ground = Ground(topology.resilience, roll)
        self._budget = Budget()
        self._scheduler = Scheduler()
        self.waiters: Collection[Attempt] = self._scheduler.queue.waiting
        self.registry = Registry(self._scheduler.learned)
        self.warm = Warm(self.registry, self._scheduler.scores)
        self._paid: set[Attempt] = set()  # of those that wait
        self._adopted: set[Attempt] = set()  # at work since before their node had turns
        self._touched: set[Node] = set()  # where something has happened since they were looked at
        self._came: set[str] = set()  # models that somebody waits for since then
        self._again_at = 0.0
        self.reconfigure(topology, now)

    def __repr__(self) -> str:
        return f"<Pool {list(self.registry.nodes.values())} {len(self._leases)} leases>"

    def reconfigure(self, topology: Topology, now: float) -> None:
        """Take a new configuration. A node whose url stays keeps its state."""
        self._topology = topology
        self.at_least = topology.num_ctx is NumCtx.AT_LEAST
        self._ground.rules = topology.resilience
        before = {node for node in self.registry.all if node.schedules}
        self.registry.configure(topology, now)
        nodes, scores = self.registry.nodes.values(), self._scheduler.scores
        ways = [node.schedules for node in nodes]
        self.schedules, self._lends = any(ways), not all(ways)
        self._spills = any(node.spill_s < inf for node in nodes)
        for node in nodes:
            if not node.schedules:
                scores.lost(node)
            elif node not in before:
                self._adopt(node, now)
        scores.keep(self.registry.all)
        self.warm.configure(topology.warm)
        self._touched.clear()

    def _adopt(self, node: Node, now: float) -> None:
        """From now on requests wait for their turn there: what it has in memory, and what is at
        work on that, is known at once."""
        scores = self._scheduler.scores
        if node.up:
            scores.see(node, now, 0.0)
        known = self.warm.preloads | self._adopted
        for attempt, held in self._leases.items():
            if (
                held.node is node and held.placed is None and attempt not in known
                and scores.adopt(attempt, node, held.key, now)
            ):  # fmt: skip
                self._adopted.add(attempt)

    # The lease of one attempt.

    def submit(self, attempt: Attempt, now: float) -> Lease | Queued | Rejected:
        """Choose a node and count the attempt on it, in one step; or have it wait for one."""
        target, paid = attempt.target, False
        found = self.registry.eligible_now(attempt, now)
        if isinstance(found, Rejected):
            return found
        if attempt.answered:
            # What leaves a node that is ejected or busy by now is no more than was in flight there.
            paid = self.registry.takes(attempt.answered, target, now)
            if paid and not self._budget.take(len(self._leases), self._ground.rules, now):
                return Rejected(Refusal.BUDGET)
        model, runs = target.model, attempt.work.infers
        if found.nodes[0].schedules and runs and model is not None and not model.cloud:
            return self._schedule(attempt, model.key, found, now, paid=paid)
        node = policy.pick(found.nodes, self._ground.rules, now)
        return self._lease(attempt, node, found.reason, now, paid=paid)

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
        self._leases[attempt] = _Held(node, key, ground.turn, paid, placed)
        if placed is None:
            return Lease(attempt, node.spec, reason, flips)
        run = placed.run
        return Lease(attempt, node.spec, reason, flips, run.place, run.first_s)

    # Those that wait.

    @property
    def waiting(self) -> int:
        """How many requests wait for a node."""
        return len(self.waiters)

    def _schedule(
        self, attempt: Attempt, key: str, eligible: Eligible, now: float, *, paid: bool
    ) -> Lease | Queued | Rejected:
        found = self._scheduler.come(attempt, key, eligible.nodes, now)
        if isinstance(found, Placed):
            return self._lease(attempt, found.node, found.reason, now, paid=paid, placed=found)
        if paid:
            self._paid.add(attempt)
        nodes_of = self._nodes_of(now).find(attempt, eligible)
        placed = self._scheduler.wait(found, nodes_of, now)
        if placed is not None:
            return self._placed(placed, nodes_of, now)
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
        late = one.attempt.work.deadline < now + expected_s < inf
        if late and self.registry.has_served(one.key):
            return Rejected(Refusal.LATE, after_s=expected_s)
        return None

    def _withdraw(self, attempt: Attempt) -> None:
        """It waits no longer, and has no node."""
        self._scheduler.withdraw(attempt)
        if self._no_longer_paid(attempt):
            self._budget.give()

    def _no_longer_paid(self, attempt: Attempt) -> bool:
        """It waits no longer; says whether what it took from the budget is now its lease's."""
        paid = attempt in self._paid
        self._paid.discard(attempt)
        return paid

    def _placed(self, found: Placed, nodes_of: Reach, now: float) -> Lease:
        attempt, node, reason = found.one.attempt, found.node, found.reason
        paid = self._no_longer_paid(attempt)
        if self._spills and nodes_of.spilled(attempt, node):
            reason = Reason.LATER_POOL
        return self._lease(attempt, node, reason, now, paid=paid, placed=found)

    def _nodes_of(self, now: float) -> Reach:
        """The nodes that may be asked for each of those that wait."""
        eligible = self.registry.eligible_now
        return Reach(lambda one: eligible(one, now), self._scheduler.queue.since, now)

    def _hopes(self, refused: Rejected, now: float) -> bool:
        """Whether a request waits on although it would be refused if it came now: nodes are full,
        new, or have not been down for long."""
        if refused.until is not None or not self.registry.probed:
            return True
        down, nodes = refused.refusal in (Refusal.NODES_DOWN, Refusal.PIN_DOWN), self.registry.nodes
        return down and any(now - nodes[one.url].since < _BACK_S for one in refused.nodes)

    def granted(self, now: float) -> Sequence[Lease | Lost]:
        """Those that wait no longer. To be asked whenever the pool was told something."""
        touched, self._touched = self._touched, set()
        came, self._came = self._came, set()
        if not self.waiters:
            return ()
        registry, scheduler = self.registry, self._scheduler
        everywhere = now >= self._again_at or scheduler.unbarred or registry.changed
        if everywhere:
            self._again_at, scheduler.unbarred, registry.changed = now + AGAIN_S, False, False
        elif not touched and not came:
            return ()
        where = None if everywhere else touched
        nodes_of = self._nodes_of(now)
        placed = scheduler.pass_(nodes_of, now, where, came)
        given: list[Lease | Lost] = [self._placed(found, nodes_of, now) for found in placed]
        if everywhere and self._lends:
            given += self._outright(nodes_of, now)
        lost = [Lost(*one) for one in nodes_of.lost.items() if not self._hopes(one[1], now)]
        if scheduler.spared or lost:
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
            paid = self._no_longer_paid(attempt)
            self._scheduler.let_go(one)
            self._again_at = 0.0  # others may have waited for its sake
            yield self._lease(attempt, node, reach.reason, now, paid=paid)
            if node.troubled:
                spared.add(node)

    def began(self, attempt: Attempt, now: float) -> str:
        """The first record of its answer is there. Gives the url of the node, if it has loaded
        something for that and others depend on its context."""
        held = self._leases.get(attempt)
        if held is None or held.placed is None:
            return ""
        self._touched.add(held.node)
        loaded = self._scheduler.began(held.placed, now)
        return held.node.spec.url if loaded and self.at_least else ""

    def leave(self, attempt: Attempt, outcome: Outcome, now: float) -> Sequence[Flip]:
        """The one way out, for an attempt that was leased and for one that was not."""
        held = self._leases.pop(attempt, None)
        if held is None:
            self._withdraw(attempt)
            self._again_at = 0.0  # others may have waited for its sake
            return ()
        node, failure = held.node, outcome.failure
        good = failure is None and outcome.told
        if held.placed is not None:
            self._scheduler.leave(held.placed, now, good=good)
            self._touched.add(node)
        elif self.warm.preloads and attempt in self.warm.preloads:
            self.warm.ended(attempt, node, held.key, now, good=good)
            self._touched.add(node)
        elif attempt in self._adopted:
            self._adopted.discard(attempt)
            self._scheduler.scores.ended(attempt, node, None, now, good=good)
            self._touched.add(node)
        if held.paid:
            self._budget.give()
        flips = node.leave(held.key, held.turn, outcome, self._ground, now)
        if not node.in_flight and node in self.registry.leaving:
            self.registry.leaving.remove(node)
            self._touched.discard(node)
            self._scheduler.scores.keep(self.registry.all)
        if failure is None:
            return flips
        if failure.kind is FailureKind.FIRST_BYTE_TIMEOUT:
            node.replicas[held.key].rates.late()
        if failure.kind is FailureKind.REFUSED:
            return [*flips, *self._feel(node, Sign.REFUSED, failure.detail, now)]
        return flips

    def warmings(self, now: float) -> Sequence[Warming]:
        """What nodes are to be asked for now, so that models stay in memory. Each is leased, and
        leaves as all do."""
        found = []
        while (step := self.warm.begin(now)) is not None:
            reason = Reason.LOAD if step.loads else Reason.WARM
            lease = self._lease(step.attempt, step.node, reason, now, paid=False)
            found.append(Warming(lease, step.key, step.name, step.loads, step.num_ctx))
        return found

    def forgive(self, url: str, target: Target) -> None:
        """What a node failed to answer, another one has failed to answer alike."""
        node = self.registry.nodes.get(url)
        if node is not None and target.model is not None:
            node.forgive(target.model.key)

    def learn(
        self, url: str, key: str, told: Usage, flow: str = "", place: int = 0, now: float = 0.0
    ) -> None:
        """Take what the final record of an answer told of the node's speed, to a request of this
        flow that had this place in the line for the model."""
        node = self.registry.nodes.get(url)
        replica = None if node is None else node.replicas.get(key)
        if node is not None and replica is not None:
            replica.rates.learn(told)
            self._scheduler.learn(node, key, flow, told, place, now)

    def first_byte_s(self, lease: Lease, waits: Waits, body_bytes: int, *, streams: bool) -> float:
        """How long the answer to a leased request may take to begin."""
        held = self._leases[lease.attempt]
        node, key = held.node, held.key
        replica, warm = node.replicas[key], streams and node.resides(key) is not None
        return replica.rates.first_byte_limit_s(
            waits, sizing.tokens(body_bytes), replica.in_flight - 1, streams=streams, warm=warm
        )

    def context(self, lease: Lease) -> int | None:
        """For how many tokens the model is loaded where this lease is; None where that is not
        known, and where it is to be loaded."""
        if lease.reason is Reason.LOAD:
            return None
        held = self._leases[lease.attempt]
        node = held.node
        one = (
            self._scheduler.scores.memories[node].loaded.get(node.runner(held.key))
            if held.placed is not None
            else node.resides(held.key)
        )
        return None if one is None else one.context

    # What probes say.

    def observe(self, url: str, seen: Observation, now: float) -> Sequence[Flip]:
        """Take what a probe learned; a node that is no longer configured is passed over."""
        node = self.registry.nodes.get(url)
        if node is None:
            return ()
        listed = node.present
        self.registry.learn(node, seen)
        if node.present is not listed:
            self._scheduler.scores.costs.forget()  # models may have other sizes
        if seen.resident is not None and node.schedules:
            self._scheduler.scores.see(node, now, seen.wall)
            self._touched.add(node)
        if seen.resident is not None and seen.wall:
            self.warm.see(node, now, seen.wall)
        if seen.sign is None:
            return ()
        return self._feel(node, seen.sign, seen.detail, now)

    def _feel(self, node: Node, sign: Sign, detail: str, now: float) -> Sequence[Flip]:
        flips = self.registry.feel(node, sign, detail, now)
        if flips and node.health is Health.DOWN:
            self._scheduler.scores.lost(node)
        return flips

    # What others may see.

    @property
    def in_flight(self) -> int:
        return len(self._leases)

    def explain(self, target: Target, work: Work, now: float) -> Sequence[Weighed]:
        """What each node would cost a request, the best first; then why the others may not have
        it. From the code that decides, without a decision."""
        attempt = Attempt(target, work=work)
        found, model = self.registry.eligible_now(attempt, now), target.model
        best: Sequence[Weighed] = ()
        if isinstance(found, Eligible):
            if found.nodes[0].schedules and model is not None and not model.cloud:
                nodes_of = self._nodes_of(now)
                best = self._scheduler.weigh(attempt, model.key, found.nodes, nodes_of, now)
                best = [*best, *nodes_of.later(attempt)]
            else:
                nodes = policy.order(found.nodes, self._ground.rules, now)
                best = [Weighed(n.spec, reason=found.reason, now=True) for n in nodes]
        urls = {one.node.url for one in best}
        others = [node for url, node in self.registry.nodes.items() if url not in urls]
        return [*best, *(policy.barred(node, target, now) for node in others)]

    def learned(self) -> Sequence[Learned]:
        """What each node has shown of its speed, and what loading has come to there."""
        return [
            Learned(
                node.spec.name, node.speeds(),
                copy(self._scheduler.scores.memories[node].loads) if self.schedules else None,
            )
            for node in self.registry.nodes.values()
        ]  # fmt: skip

    def queued(self) -> Mapping[str, int]:
        """How many requests wait, by priority."""
        found = dict.fromkeys((priority.word for priority in Priority), 0)
        for one in self._scheduler.queue:
            found[one.attempt.work.priority.word] += 1
        return found
