"""What a node would cost a request, in seconds: waiting, a load with what it drives out, and the
answer's beginning."""

from collections.abc import Collection, Mapping, Sequence
from math import exp, inf

from router.core.costs import Costs, Size
from router.core.demand import Demand
from router.core.estimate import Cost
from router.core.memory import Loaded, Memory, Run
from router.core.node import Node
from router.core.policy import Attempt
from router.core.queue import Waiting
from router.core.seat import (
    FIRST_SHARE,
    Delay,
    Seat,
    absent,
    answer_s,
    contention,
    loading_s,
    slots_now,
    there,
)
from router.core.types import Reason
from router.core.work import Work

_CAUTION = 0.5  # a load counts for so much more than it takes,
_AGED_S, _AGED_SHARE = 30.0, 0.1  # and less so for one that has waited
_PAID_SHARE = 0.5  # of what others have waited for a model
_PRICE_SHARE = 0.1  # of a load is always left, or it would go before a slot that is free
_SOON_S = 120.0  # a victim that is wanted again within so long has to be loaded again
_ONLY_COPY, _COPIES = 8.0, 4.0
_LEAST_LOSS_S = 1.0  # where nobody waits for the load
_SETTLED_LOADS = 4.0  # a model stays at least so many times as long as it took to load


class _Memories(dict[Node, Memory]):
    """What is known of each node's; nothing of one that was never asked for."""

    def __missing__(self, node: Node) -> Memory:
        made = self[node] = Memory(node.spec.gpus)
        return made


class Scores:
    """What is known of nodes, and what that is worth in one pass. `queued`: what waits, by
    model."""

    def __init__(self, queued: Mapping[str, Collection[Waiting]]) -> None:
        self.memories = _Memories()
        self._queued = queued
        self.costs = Costs()
        self._demand = Demand()
        self._waited = Demand()  # seconds that requests have waited for a slot, since the last load
        self._seats: dict[str, dict[Node, Seat]] = {}
        self.warm: Mapping[str, int] = {}  # how many replicas of a model are kept in memory

    def __repr__(self) -> str:
        return f"<Scores {list(self.memories)}>"

    # What is known.

    def keep(self, nodes: Collection[Node]) -> None:
        """Forget what is known of all other nodes."""
        for node in self.memories.keys() - set(nodes):
            del self.memories[node]
        for node, memory in self.memories.items():
            memory.configure(node.spec.gpus)
        self.costs.forget()

    def see(self, node: Node, now: float, wall: float) -> None:
        """Take what the node has in its memory."""
        memory = self.memories[node]
        self.costs.forget()
        memory.see(node.in_memory, now, wall)
        memory.keep(node.runners)
        contexts = [(one, one.num_ctx) for one in memory.loaded.values() if one.num_ctx]
        self.costs.see({key: ctx for one, ctx in contexts for key in names_of(node, one)})
        grown = [
            size / disk for runner, size in memory.sizes.items()
            for key in node.names(runner)[:1] if (disk := node.size(key))
        ]  # fmt: skip
        if grown:
            memory.growth = sum(grown) / len(grown)

    def lost(self, node: Node) -> None:
        """It is down, and whatever it had in its memory is gone."""
        if node in self.memories:
            self.memories[node].forget()

    def load(self, seat: Seat, one: Waiting, now: float) -> Loaded:
        """A request gets a node that has to load the model for it."""
        node, memory, key, work = seat.node, seat.memory, one.key, one.attempt.work
        need, ready = need_bytes(node, memory, key), now + seat.cost.load_s
        self.changed(node)
        return memory.load(seat.runner, key, need, work.num_ctx, ready, now)

    def placed(self, one: Waiting, reason: Reason, now: float) -> None:
        """A request has got a node. Once many have waited for long the model is worth a load."""
        if reason is Reason.LOAD:
            self._waited.forget(one.key)
        else:
            self._waited.count(one.key, now, now - one.since)

    def ended(
        self, attempt: Attempt, node: Node, loaded: Loaded | None, now: float, *, good: bool
    ) -> None:
        """What was at work there has ended: a request on `loaded`, or else a preload or what was
        adopted, wherever it is."""
        memory = self.memories[node]
        if loaded is None:
            loaded = next((one for one in memory.loaded.values() if attempt in one.runs), None)
        if loaded is not None:
            memory.end(loaded, attempt, now, good=good)
        if not (node.up and node.schedules):
            memory.forget()

    def asked(self, work: Work, key: str, size: Size, nodes: Sequence[Node], now: float) -> float:
        """Count a request for this model. Gives what it takes of whichever node answers it:
        seconds of a slot, as guessed from the model's size alone."""
        self._demand.count(key, now)
        known = 0
        if work.blocks:
            there = (self.memories[node].loaded.get(node.runner(key)) for node in nodes)
            known = max(0 if one is None else one.prefixes.common(work.blocks) for one in there)
        first_s, out_s = answer_s(size, known, self.costs.guessed(nodes[0], key), 1.0)
        return first_s + out_s

    # What a node is worth now.

    def begin(self) -> None:
        """Look at all nodes anew."""
        self._seats.clear()

    def changed(self, node: Node) -> None:
        """Look at this one anew."""
        for seats in self._seats.values():
            seats.pop(node, None)

    def resides(self, node: Node, key: str) -> bool:
        """Whether it has a model in memory, or on its way there."""
        return node.runner(key) in self.memories[node].loaded

    def seat(self, node: Node, key: str, now: float) -> Seat:
        seats = self._seats.setdefault(key, {})
        found = seats.get(node)
        if found is None:
            found = seats[node] = self._look(node, key, now)
        return found

    def _look(self, node: Node, key: str, now: float) -> Seat:
        memory, runner = self.memories[node], node.runner(key)
        loaded = memory.loaded.get(runner)
        if loaded is None:
            return self._absent(node, runner, memory, key, now)
        return there(node, memory, loaded, self.costs.of(node, key), now)

    def _absent(self, node: Node, runner: str, memory: Memory, key: str, now: float) -> Seat:
        victims = self._victims(node, memory, key, now)
        evicts_s = sum([self._loss_s(node, one, now) for one in victims]) if victims else 0.0
        return absent(node, runner, memory, self.costs.of(node, key), now, victims, evicts_s)

    def _victims(
        self, node: Node, memory: Memory, key: str, now: float
    ) -> Collection[Loaded] | None:
        """What has to go for a model; None where it cannot, or should not, be loaded now."""
        runner = node.runner(key)
        if memory.loading is not None or memory.wanted not in ("", runner):
            return None
        victims = memory.victims(runner, need_bytes(node, memory, key))
        if victims is None or memory.wanted == runner:
            return victims
        for one in victims:
            stays_s = _SETTLED_LOADS * self.costs.of(node, name_of(node, one)).load_s
            new = now - one.since < stays_s
            if self.waiting(node, one) or (new and not self._at_rest(key)):
                return None
        return victims

    def _at_rest(self, key: str) -> bool:
        """Whether nothing is at work anywhere, and nothing waits for another model: then whoever
        asks for this one would wait for nothing."""
        idle = not any(one.runs for m in self.memories.values() for one in m.loaded.values())
        return idle and self._queued.keys() <= {key}

    def _loss_s(self, node: Node, victim: Loaded, now: float) -> float:
        """What it costs others that a model is driven out here."""
        copies = self._copies(node, victim)
        rate = sum(self._demand.rate(key, now) for key in names_of(node, victim))
        again = 1.0 if copies < self._kept(node, victim) else 1 - exp(-rate * _SOON_S)
        price = _COPIES / copies if copies else _ONLY_COPY
        return again * self.costs.of(node, name_of(node, victim)).load_s * price

    def _copies(self, node: Node, one: Loaded) -> int:
        """How many other nodes have it in memory."""
        names = names_of(node, one)
        return sum(
            1 for other, memory in self.memories.items()
            if other is not node and any(other.runner(key) in memory.loaded for key in names)
        )  # fmt: skip

    def _kept(self, node: Node, one: Loaded) -> int:
        """How many nodes are to keep it in memory."""
        return max(self.warm.get(key, 0) for key in names_of(node, one)) if self.warm else 0

    def waiting(self, node: Node, one: Loaded) -> int:
        """How many wait for what this node has in memory."""
        queued = self._queued
        return sum(len(queued[key]) for key in names_of(node, one) if key in queued)

    # What is kept in memory.

    def preload_s(self, node: Node, key: str, now: float) -> float | None:
        """What it costs to load a model there that nobody waits for; None where it must not be
        now: those that wait go first, and what is kept there stays."""
        memory = self.memories[node]
        loaded = memory.loaded.get(node.runner(key))
        if loaded is not None and loaded.runs:
            return None  # it works there already, by another name
        waiting = (one for one in self._queued if one in node.present)
        if any(node.runner(one) not in memory.loaded for one in waiting):
            return None
        victims = self._victims(node, memory, key, now)
        if victims is None:
            return None
        if any(self._copies(node, victim) < self._kept(node, victim) for victim in victims):
            return None
        losses = (max(_LEAST_LOSS_S, self._loss_s(node, victim, now)) for victim in victims)
        return self.costs.of(node, key).load_s + sum(losses)

    def preload(self, attempt: Attempt, node: Node, key: str, now: float) -> None:
        """A node is asked to load a model for nobody."""
        memory, load_s = self.memories[node], self.costs.of(node, key).load_s
        need = need_bytes(node, memory, key)
        loaded = memory.load(node.runner(key), key, need, None, now + load_s, now)
        loaded.runs[attempt] = Run(now, load_s, 0.0)

    def adopt(self, attempt: Attempt, node: Node, key: str, now: float) -> bool:
        """A request is at work there that nobody has placed, and may end at any time. Says whether
        it is on what is in memory."""
        loaded = self.memories[node].loaded.get(node.runner(key))
        if loaded is None:
            return False
        loaded.runs[attempt] = Run(now, 0.0, 0.0)
        return True

    # What it costs.

    def at_once(
        self, one: Waiting, size: Size, nodes: Sequence[Node], now: float
    ) -> tuple[Node, Loaded, Delay] | None:
        """The same as `best`, where that has a free slot, and has the model as it is asked for;
        and where none of the others needs a closer look to tell, as they cannot be better."""
        work, key = one.attempt.work, one.key
        found, least, flight, others = None, inf, 0, inf
        for node in nodes:
            memory, price = self.memories[node], self.costs.of(node, key)
            loaded = memory.loaded.get(node.runner(key))
            if loaded is None:
                others = min(others, _least_s(size, price))
                continue
            known = loaded.prefixes.common(work.blocks) if work.blocks else 0
            first_s, out_s = answer_s(size, known, price, contention(memory, loaded))
            total_s = first_s + FIRST_SHARE * out_s
            slots = slots_now(node.spec, memory, loaded, now)
            taken = slots <= len(loaded.runs) or loaded.ready is not None
            if taken or memory.leaving or loaded.differs(work):
                others = min(others, total_s)
            elif (total_s, node.in_flight) < (least, flight):
                least, flight = total_s, node.in_flight
                found = node, loaded, Delay(total_s, 0.0, 0.0, first_s, out_s, known, True)
        return found if least < others else None

    def best(
        self, one: Waiting, size: Size, nodes: Sequence[Node], spared: Collection[Node], now: float
    ) -> tuple[Seat, Delay] | None:
        """Where a request costs least, and what; None where no node can have it. Where it would
        have to be loaded is only looked at if that could be less."""
        found, least, flight = None, inf, 0
        costs, key = self.costs, one.key
        seats = self._seats.setdefault(key, {})
        cold: list[Node] = []  # looked at after the others
        for some in (nodes, cold):
            for node in some:
                if node in spared:
                    continue
                seat = seats.get(node)
                if seat is None:
                    memory, runner = self.memories[node], node.runner(key)
                    loaded = memory.loaded.get(runner)
                    if loaded is not None:
                        seat = seats[node] = there(node, memory, loaded, costs.of(node, key), now)
                    elif some is nodes:
                        cold.append(node)
                        continue
                    elif _least_s(size, costs.of(node, key)) > least:
                        continue
                    else:
                        seat = seats[node] = self._absent(node, runner, memory, key, now)
                delay = self.delay(one, size, seat, now)
                if delay is not None and (delay.total_s, node.in_flight) < (least, flight):
                    found, least, flight = (seat, delay), delay.total_s, node.in_flight
        return found

    def delay(self, one: Waiting, size: Size, seat: Seat, now: float) -> Delay | None:
        """What this node would cost it; None where it cannot have it."""
        loaded, memory, work = seat.loaded, seat.memory, one.attempt.work
        wait_s = load_s = 0.0
        known, at_once = 0, True
        if loaded is None:
            if seat.victims is None:
                return None
            load_s = self._load_s(one, seat, now)
        else:
            anew, leaves = loaded.differs(work), loaded.key in memory.leaving
            if leaves and memory.wanted != loaded.key:
                return None
            if anew or leaves:
                wait_s = max(seat.ends) if loaded.runs else loading_s(memory, now)
                at_once = not loaded.runs and loaded.ready is None and memory.loading is None
            elif seat.free <= 0:
                wait_s, at_once = seat.ends[0], False
            if anew:
                load_s = self._load_s(one, seat, now)
            elif work.blocks:
                known = loaded.prefixes.common(work.blocks)
        first_s, out_s = answer_s(size, known, seat.cost, seat.contention)
        total_s = wait_s + load_s + first_s + FIRST_SHARE * out_s
        return Delay(total_s, wait_s, load_s, first_s, out_s, known, at_once)

    def _load_s(self, one: Waiting, seat: Seat, now: float) -> float:
        """A load is dearer than it is long: it also costs those that it drives out. Whoever has
        waited long cares less; and what others have waited for the model is paid already."""
        aged = max(_AGED_SHARE, 1 - (1 - _AGED_SHARE) * (now - one.since) / _AGED_S)
        backlog = len(self._queued.get(one.key, ()))
        load_s = seat.cost.load_s
        price_s = load_s + aged * (_CAUTION * load_s + seat.evicts_s / max(1, min(2, backlog)))
        if seat.loaded is not None:
            return price_s
        return max(price_s - _PAID_SHARE * self._waited.total(one.key, now), _PRICE_SHARE * load_s)


def _least_s(size: Size, price: Cost) -> float:
    """What a node takes at least that has to load the model."""
    tokens, _, out = size
    answer_s = tokens * price.prefill_s + FIRST_SHARE * out * price.decode_s
    return _PRICE_SHARE * price.load_s + answer_s


def need_bytes(node: Node, memory: Memory, key: str) -> float:
    """How much memory a model takes there."""
    return memory.need_bytes(node.runner(key), node.size(key))


def names_of(node: Node, one: Loaded) -> Sequence[str]:
    """What requests may call a model in memory by."""
    return node.names(one.key) or (one.name,)


def name_of(node: Node, one: Loaded) -> str:
    """One name of a model in memory, that the node still lists it by if it does at all."""
    return one.name if one.name in node.present else names_of(node, one)[0]
