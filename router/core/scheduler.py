"""Which request has which node, and when: the least expected delay, bound late.

A request that would do best to wait for a busy node waits here, where it can still go elsewhere;
its turn is taken into account for those behind it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from math import inf

import msgspec

from router.core.memory import Loaded, Run
from router.core.node import Node
from router.core.policy import Attempt
from router.core.queue import Flow, Queue, Waiting
from router.core.room import Room
from router.core.score import Scores
from router.core.seat import Delay, Seat
from router.core.shares import Shares
from router.core.types import Reason, Weighed
from router.core.usage import Usage

_HAS_SHARE = "its flow has its share of the slots already"
_LOOKED_AT = 64  # of those that wait for one model

NodesOf = Callable[[Attempt], Sequence[Node]]


class Placed(msgspec.Struct, frozen=True, eq=False):
    """A request that has got a node, and why: `run` is its work on what is in memory there."""

    one: Waiting
    node: Node
    reason: Reason
    loaded: Loaded
    run: Run


class Scheduler:
    """Orders and places requests for models. Only the pool calls it."""

    def __init__(self) -> None:
        self.queue = Queue()
        self.scores = Scores(self.queue.by_key)
        self._shares = Shares(self.queue, self.scores)
        self._room = Room(self.queue, self.scores)
        self.unbarred = False  # a flow that had its share has given a node back
        self.spared: set[Node] = set()  # those that get one request in a pass: it is a trial
        self._barred: set[Flow] = set()  # flows that had their share when they were looked at

    def __repr__(self) -> str:
        return f"<Scheduler {len(self.queue)} waiting>"

    def learned(self, node: Node) -> Mapping[str, int]:
        """How many slots each model has there, as far as that was learned."""
        memory = self.scores.memories.get(node)
        known = {} if memory is None else memory.learned_slots
        return {key: known[runner] for key in node.present if (runner := node.runner(key)) in known}

    # What a request goes through.

    def come(
        self, attempt: Attempt, key: str, nodes: Sequence[Node], now: float
    ) -> Placed | Waiting:
        """A request has come, that may have these nodes. It gets one at once if nobody waits for
        the model; else it is to wait."""
        work, queue, scores = attempt.work, self.queue, self.scores
        flow, size = queue.flow(work.flow, work.weight, now), scores.costs.size(work, key)
        one = queue.come(attempt, key, flow, scores.asked(work, key, size, nodes, now), now)
        if key in queue.by_key:
            return one
        if len(queue.flows) > 1:
            self._shares.begin()
            if not self._shares.may(one, flow.waiting + 1):
                return one
        quick = scores.at_once(one, size, nodes, now)
        if quick is not None:
            node, loaded, delay = quick
            return self._put(one, node, loaded, delay, 0.0, now)
        scores.begin()
        best = scores.best(one, size, nodes, (), now)
        if best is None:
            return one
        seat, delay = best
        return self._grant(one, seat, delay, now) if delay.now else one

    def wait(self, one: Waiting, nodes_of: NodesOf, now: float) -> Placed | None:
        """Have a request wait, unless there is a node for it. Those that wait already have had
        their turn at the last event."""
        self.queue.push(one)
        self._begin()
        placed = self._give([one], nodes_of, now, self.queue.before(one, now))
        return placed[0] if placed else None

    def pass_(
        self, nodes_of: NodesOf, now: float, touched: Collection[Node] | None,
        came: Collection[str] = (),
    ) -> Sequence[Placed]:  # fmt: skip
        """Give nodes to those that wait, as far as there are any. `touched`: where something has
        happened since the last time, None for everywhere; `came`: models that more wait for."""
        self._begin()
        self._room.release()
        if touched is None:
            self._barred.clear()
        found: list[Placed] = []
        for alike in self.queue.order(now):
            key = alike[0].key
            if touched is None or key in came or self._may_gain(key, touched, now):
                found += self._give(alike, nodes_of, now)
        return found

    def _begin(self) -> None:
        """All is to be looked at anew."""
        self.scores.begin()
        self.spared.clear()
        self._shares.begin()

    def _may_gain(self, key: str, nodes: Collection[Node], now: float) -> bool:
        """Whether one of these could take a request for this model now."""
        return any(self.scores.seat(n, key, now).open for n in nodes if key in n.present)

    def began(self, placed: Placed, now: float) -> bool:
        """The first record of an answer is there: whatever had to be loaded is. Says whether
        anything had."""
        node, loaded, run, work = placed.node, placed.loaded, placed.run, placed.one.attempt.work
        loading = loaded.ready is not None
        if loading or not loaded.plain:
            self.scores.memories[node].began(loaded, work, now)
        if work.blocks:
            loaded.prefixes.remember(work.blocks)
        if node.spec.auto:
            self.scores.memories[node].learned(loaded.key).began(run.place)
        run.begin(now)
        return loading

    def withdraw(self, attempt: Attempt) -> None:
        """It waits no longer, and has got nothing."""
        self.queue.leave(attempt)
        self._room.release()

    def leave(self, placed: Placed, now: float, *, good: bool) -> None:
        """A request that had a node has ended."""
        one = placed.one
        self.queue.ended(one, now)
        if self._barred and one.flow in self._barred:
            self.unbarred = True
        self.scores.ended(one.attempt, placed.node, placed.loaded, now, good=good)

    def let_go(self, one: Waiting) -> None:
        """It gets a node where nobody waits for a turn: its flow has had what it asked for."""
        self.queue.pop(one.attempt)
        if self._barred and not self.queue.shares(one):
            self.unbarred = True  # the others' parts have grown
        if one.key not in self.queue.by_key:
            self._room.release()

    def learn(self, node: Node, key: str, flow: str, told: Usage, place: int, now: float) -> None:
        """Take what the final record of an answer told, that had this place in the line."""
        self.scores.costs.learn(node, key, flow, told)
        waited_s = told.waited_s if node.spec.auto else None
        if waited_s is not None and told.total_s is not None:
            learned = self.scores.memories[node].learned(node.runner(key))
            learned.learn(place, waited_s, told.total_s - (told.load_s or 0.0), now)

    def weigh(
        self, attempt: Attempt, key: str, nodes: Sequence[Node], nodes_of: NodesOf, now: float
    ) -> Sequence[Weighed]:
        """What each node would cost a request that came now, the best first. It may have a node
        at once, or else is behind those that go before it. Nothing is changed."""
        self._begin()
        with self.queue.visit(attempt, key, now) as one:
            found = self._ranked(one, nodes, now)
            if not found[0].now:
                self._hold_before(one, nodes_of, now)
                found = self._ranked(one, nodes, now)
            return found

    def _hold_before(self, one: Waiting, nodes_of: NodesOf, now: float) -> None:
        """Have the turns of those seen that go before it."""
        for other in self.queue.alike(one.key, now)[:_LOOKED_AT]:
            if other is one:
                break
            best = self._best(other, nodes_of(other.attempt), now)
            if best is not None and self._shares.may(other):
                best[0].hold(best[1].service_s)

    def _ranked(self, one: Waiting, nodes: Sequence[Node], now: float) -> Sequence[Weighed]:
        resides = self.scores.resides
        nodes = sorted(nodes, key=lambda node: (node.in_flight, not resides(node, one.key)))
        may, seat = self._shares.may(one), self.scores.seat
        found = [self._weighed(one, seat(node, one.key, now), now, may=may) for node in nodes]
        return sorted(found, key=lambda one: inf if one.total_s is None else one.total_s)

    def _weighed(self, one: Waiting, seat: Seat, now: float, *, may: bool) -> Weighed:
        size = self.scores.costs.size(one.attempt.work, one.key)
        delay, node = self.scores.delay(one, size, seat, now), seat.node.spec
        if delay is None:
            return Weighed(node, "no room for the model", later=True)
        return Weighed(
            node, "" if may else _HAS_SHARE, delay.wait_s, delay.load_s, delay.answer_s,
            delay.reason(one.attempt), now=delay.now and may, later=True,
        )  # fmt: skip

    # Who gets it.

    def _give(
        self, alike: Sequence[Waiting], nodes_of: NodesOf, now: float, ahead: int = 0
    ) -> list[Placed]:
        """Give nodes to those of one model, in their order. `ahead`: how many go before the first,
        and are not among them."""
        found: list[Placed] = []
        shut: set[int] = set()  # lists of nodes of which none can take anything now
        barred: set[Flow] = set()  # those that have their share
        left = _LOOKED_AT
        for one in alike:
            if one.flow in barred:
                continue
            nodes = nodes_of(one.attempt)
            if id(nodes) in shut:
                continue
            if not self._shares.may(one):
                barred.add(one.flow)
                self._barred.add(one.flow)
                if one.expected_s == inf:
                    one.expected_s = self._share_s(one, nodes, now)
                continue
            left -= 1
            if not left:
                break
            best = self._best(one, nodes, now)
            if best is None:
                one.expected_s = inf
                self._room.reserve(one, nodes, now)
                shut.add(id(nodes))
            elif best[1].now:
                found.append(self._go(one, *best, now))
            else:
                seat, delay = best
                one.expected_s = delay.wait_s + self._ahead_s(one, delay, ahead)
                seat.hold(delay.service_s)
                self._room.insist(one, seat, now)
                if not self._hope(nodes, one.key, now):
                    shut.add(id(nodes))
        return found

    def _best(self, one: Waiting, nodes: Sequence[Node], now: float) -> tuple[Seat, Delay] | None:
        size = self.scores.costs.size(one.attempt.work, one.key)
        return self.scores.best(one, size, nodes, self.spared, now)

    def _hope(self, nodes: Sequence[Node], key: str, now: float) -> bool:
        """Whether a node could take another request for this model now."""
        return any(self.scores.seat(n, key, now).open for n in nodes if n not in self.spared)

    def _ahead_s(self, one: Waiting, delay: Delay, ahead: int) -> float:
        """How long those take that go before it, roughly."""
        return ahead * delay.service_s / max(1, self._shares.slots(one.key))

    def _share_s(self, one: Waiting, nodes: Sequence[Node], now: float) -> float:
        """How long it waits, roughly, while its flow gets no more than its share."""
        best = self._best(one, nodes, now)
        if best is None:
            return inf
        slots = self._shares.part(one, self._shares.slots(one.key))
        own = sum(other.flow is one.flow for other in self.queue.by_key[one.key])
        return own * best[1].service_s / slots

    def _go(self, one: Waiting, seat: Seat, delay: Delay, now: float) -> Placed:
        """It waits no longer, and gets a node."""
        placed = self._grant(one, seat, delay, now)
        self.let_go(one)
        return placed

    def _grant(self, one: Waiting, seat: Seat, delay: Delay, now: float) -> Placed:
        loaded, load_s = seat.loaded, 0.0
        if loaded is None or delay.load_s:
            load_s = one.load_s = seat.cost.load_s
            loaded = self.scores.load(seat, one, now)
            self._shares.begin()
        else:
            seat.take(delay)
        return self._put(one, seat.node, loaded, delay, load_s, now)

    def _put(
        self, one: Waiting, node: Node, loaded: Loaded, delay: Delay, load_s: float, now: float
    ) -> Placed:
        """It is at work there from now on."""
        attempt, place = one.attempt, 0
        if node.spec.auto:
            learned = self.scores.memories[node].learned(loaded.key)
            place = learned.lease(len(loaded.runs), now)
        run = loaded.runs[attempt] = Run(now, load_s + delay.first_s, delay.out_s, place)
        loaded.used = now
        reason = delay.reason(attempt)
        if load_s or now > one.since:
            self.scores.placed(one, reason, now)
        self.queue.went(one, now)
        if node.troubled:
            self.spared.add(node)
        return Placed(one, node, reason, loaded, run)
