"""What a node would cost a request, in seconds: waiting, a load with what it drives out, and the
answer's beginning."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from math import exp, inf

import msgspec

from router.core.demand import Demand
from router.core.estimate import Cost, Lengths, cost, pace
from router.core.memory import Loaded, Memory, Run, overdue_s
from router.core.node import Node
from router.core.policy import Attempt
from router.core.prefix import BLOCK_TOKENS
from router.core.queue import Waiting
from router.core.types import Reason
from router.core.usage import Usage
from router.core.work import Work

_FIRST_SHARE = 0.3  # how much the length of an answer weighs against its first token
_CONTENTION = 0.7
_CAUTION = 0.5  # a load counts for so much more than it takes,
_AGED_S, _AGED_SHARE = 30.0, 0.1  # and less so for one that has waited
_PAID_SHARE = 0.5  # of what others have waited for a model
_PRICE_SHARE = 0.1  # of a load is always left, or it would go before a slot that is free
_SOON_S = 120.0  # a victim that is wanted again within so long has to be loaded again
_ONLY_COPY, _COPIES = 8.0, 4.0
_LEAST_LOSS_S = 1.0  # where nobody waits for the load
_SETTLED_LOADS = 4.0  # a model stays at least so many times as long as it took to load
_ENDS_MAX = 64  # of one seat that are told apart
_LOADING_S = 0.1  # at least, until it is seen to be over
RUNNING_S = 0.01  # likewise: what is at work has its slot, however short it was thought to be


class Delay(msgspec.Struct, frozen=True, eq=False):
    """What a node would cost a request, in seconds: waiting for a slot, a load with what it drives
    out, and the answer's beginning. `now`: it may have it now."""

    wait_s: float
    load_s: float
    answer_s: float
    now: bool

    @property
    def total_s(self) -> float:
        return self.wait_s + self.load_s + self.answer_s


@dataclass(slots=True, eq=False)
class Seat:
    """One model on one node, in one pass. `runner`: what stands for it in that memory. `ends`: a
    heap of when its slots are free, in seconds; `loaded` is None where it has to be loaded, and
    `victims` then what has to go for it, None where that cannot be; `evicts_s` what that costs
    others."""

    node: Node
    runner: str
    memory: Memory
    loaded: Loaded | None
    cost: Cost
    contention: float
    ends: list[float]
    victims: Collection[Loaded] | None = ()
    evicts_s: float = 0.0

    @property
    def free(self) -> bool:
        """Whether it could take a request now."""
        return self.victims is not None if self.loaded is None else self.ends[0] <= 0.0

    def reloads(self, work: Work) -> bool:
        """Whether a request has the model loaded, or loaded anew."""
        return self.loaded is None or self.loaded.differs(work)

    def known(self, attempt: Attempt) -> int:
        """How many blocks of its prompt are in the cache there."""
        work = attempt.work
        if self.loaded is None or self.loaded.differs(work):
            return 0
        return self.loaded.prefixes.common(work.blocks)

    def hold(self, service_s: float) -> None:
        """One more has its turn there."""
        heapreplace(self.ends, max(self.ends[0], 0.0) + service_s)

    def take(self, service_s: float) -> None:
        """One more is at work there."""
        heapreplace(self.ends, max(service_s, RUNNING_S))

    def reason(self, attempt: Attempt) -> Reason:
        """Why a request would go there."""
        if attempt.target.pin is not None:
            return Reason.PINNED
        if self.reloads(attempt.work):
            return Reason.LOAD
        return Reason.CACHED if self.known(attempt) else Reason.WARM


class Scores:
    """What is known of nodes, and what that is worth in one pass. `queued`: what waits, by
    model."""

    def __init__(self, queued: Mapping[str, Collection[Waiting]]) -> None:
        self.memories: dict[Node, Memory] = {}
        self._queued = queued
        self._lengths = Lengths()
        self._demand = Demand()
        self._waited = Demand()  # seconds that requests have waited for a slot, since the last load
        self._costs: dict[Node, dict[str, Cost]] = {}
        self._seats: dict[tuple[Node, str], Seat] = {}
        self._contexts: dict[str, int] = {}  # how many tokens each model was last loaded for
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
        self._costs.clear()

    def memory(self, node: Node) -> Memory:
        found = self.memories.get(node)
        if found is None:
            found = self.memories[node] = Memory(node.spec.gpus)
        return found

    def learn(self, node: Node, key: str, flow: str, told: Usage) -> None:
        """Take what the final record of an answer told."""
        self._costs.pop(node, None)
        if told.completion_tokens:
            self._lengths.learn(key, flow, told.completion_tokens)

    def see(self, node: Node, now: float, wall: float) -> None:
        """Take what the node has in its memory."""
        memory = self.memory(node)
        memory.see({node.runs(one): one for one in node.resident.values()}, now, wall)
        memory.keep(node.runners)
        for one in memory.loaded.values():
            for key in _names(node, one):
                if one.num_ctx:
                    self._contexts[key] = one.num_ctx
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

    def placed(self, one: Waiting, reason: Reason, now: float) -> None:
        """A request has got a node. Once many have waited for long the model is worth a load."""
        if reason is Reason.LOAD:
            self._waited.forget(one.key)
        else:
            self._waited.count(one.key, now, now - one.since)

    def ended(self, attempt: Attempt, node: Node, now: float, *, good: bool) -> None:
        """What was at work there, a request or a preload, has ended."""
        memory = self.memory(node)
        memory.end(attempt, now, good=good)
        if not (node.up and node.schedules):
            memory.forget()

    # How long things take.

    def asked(self, attempt: Attempt, key: str, nodes: Sequence[Node], now: float) -> float:
        """Count a request for this model. Gives what it takes of whichever node answers it:
        seconds of a slot, as guessed from the model's size alone."""
        self._demand.count(key, now)
        price = cost(nodes[0].size(key), None, 1.0)
        known = 0
        for node in nodes if attempt.work.blocks else ():
            loaded = self.memory(node).loaded.get(node.runner(key))
            if loaded is not None:
                known = max(known, loaded.prefixes.common(attempt.work.blocks))
        return self._read_s(attempt, key, price, known) + self._write_s(attempt, key, price)

    def _read_s(self, attempt: Attempt, key: str, price: Cost, known: int) -> float:
        """To work out a prompt, less the blocks that are known. Of a prompt that is longer than the
        context its beginning is left out, and so is all that would be known."""
        tokens, context = attempt.work.prompt_tokens, self._contexts.get(key, inf)
        if tokens > context:
            return context * price.prefill_s
        return max(tokens - known * BLOCK_TOKENS, 0) * price.prefill_s

    def _write_s(self, attempt: Attempt, key: str, price: Cost) -> float:
        work = attempt.work
        return self._lengths.expected(key, work.flow, work.max_tokens) * price.decode_s

    def first_s(self, one: Waiting, seat: Seat) -> float:
        """To read a prompt there."""
        known = seat.known(one.attempt)
        return self._read_s(one.attempt, one.key, seat.cost, known) * seat.contention

    def out_s(self, one: Waiting, seat: Seat) -> float:
        """To write an answer there."""
        return self._write_s(one.attempt, one.key, seat.cost) * seat.contention

    def service_s(self, one: Waiting, seat: Seat) -> float:
        """For how long it would have a slot there, once the model is loaded."""
        return self.first_s(one, seat) + self.out_s(one, seat)

    def cost(self, node: Node, key: str) -> Cost:
        costs = self._costs.get(node)
        if costs is None:
            costs = self._costs[node] = {}
        found = costs.get(key)
        if found is None:
            replica = node.replicas.get(key)
            rates = None if replica is None else replica.rates
            found = costs[key] = cost(node.size(key), rates, _pace(node))
        return found

    # What a node is worth now.

    def begin(self) -> None:
        """Look at all nodes anew."""
        self._seats.clear()

    def changed(self, node: Node) -> None:
        """Look at this one anew."""
        for pair in [pair for pair in self._seats if pair[0] is node]:
            del self._seats[pair]

    def seat(self, node: Node, key: str, now: float) -> Seat:
        found = self._seats.get((node, key))
        if found is None:
            found = self._seats[node, key] = self._look(node, key, now)
        return found

    def _look(self, node: Node, key: str, now: float) -> Seat:
        memory, runner = self.memory(node), node.runner(key)
        loaded = memory.loaded.get(runner)
        price = self.cost(node, key)
        others = sum(1 for one in memory.loaded.values() if one.runs and one is not loaded)
        contention = 1 + _CONTENTION * max(0, others + 1 - memory.gpus) / memory.gpus
        if loaded is None:
            victims = self._victims(node, memory, key, now)
            evicts_s = sum(self._loss_s(node, one, now) for one in victims or ())
            return Seat(node, runner, memory, None, price, contention, [0.0], victims, evicts_s)
        ends = _ends(node, memory, loaded, now)
        return Seat(node, runner, memory, loaded, price, contention, ends)

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
            stays_s = _SETTLED_LOADS * self.cost(node, one.name).load_s
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
        rate = sum(self._demand.rate(key, now) for key in _names(node, victim))
        again = 1.0 if copies < self._kept(node, victim) else 1 - exp(-rate * _SOON_S)
        price = _COPIES / copies if copies else _ONLY_COPY
        return again * self.cost(node, victim.name).load_s * price

    def _copies(self, node: Node, one: Loaded) -> int:
        """How many other nodes have it in memory."""
        names = _names(node, one)
        return sum(
            1 for other, memory in self.memories.items()
            if other is not node and any(other.runner(key) in memory.loaded for key in names)
        )  # fmt: skip

    def _kept(self, node: Node, one: Loaded) -> int:
        """How many nodes are to keep it in memory."""
        return max(self.warm.get(key, 0) for key in _names(node, one)) if self.warm else 0

    def waiting(self, node: Node, one: Loaded) -> int:
        """How many wait for what this node has in memory."""
        queued = self._queued
        return sum(len(queued[key]) for key in _names(node, one) if key in queued)

    # What is kept in memory.

    def preload_s(self, node: Node, key: str, now: float) -> float | None:
        """What it costs to load a model there that nobody waits for; None where it must not be
        now: those that wait go first, and what is kept there stays."""
        memory = self.memory(node)
        waiting = (one for one in self._queued if one in node.present)
        if any(node.runner(one) not in memory.loaded for one in waiting):
            return None
        victims = self._victims(node, memory, key, now)
        if victims is None:
            return None
        if any(self._copies(node, victim) < self._kept(node, victim) for victim in victims):
            return None
        losses = (max(_LEAST_LOSS_S, self._loss_s(node, victim, now)) for victim in victims)
        return self.cost(node, key).load_s + sum(losses)

    def preload(self, attempt: Attempt, node: Node, key: str, now: float) -> None:
        """A node is asked to load a model for nobody."""
        memory, load_s = self.memory(node), self.cost(node, key).load_s
        need = need_bytes(node, memory, key)
        loaded = memory.load(node.runner(key), key, need, None, now + load_s, now)
        loaded.runs[attempt] = Run(now, load_s, 0.0)

    # What it costs.

    def terms(self, one: Waiting, seat: Seat, now: float) -> Delay | None:
        """What this node would cost it; None where it cannot have it."""
        loaded, memory = seat.loaded, seat.memory
        if loaded is None:
            if seat.victims is None:
                return None
            return Delay(0.0, self._load_s(one, seat, now), self._answer_s(one, seat), True)
        anew, leaves = seat.reloads(one.attempt.work), loaded.key in memory.leaving
        if leaves and memory.wanted != loaded.key:
            return None
        if anew or leaves:
            wait_s = max(seat.ends) if loaded.runs else _loading_s(memory, now)
            idle = not loaded.runs and loaded.ready is None and memory.loading is None
            load_s = self._load_s(one, seat, now) if anew else 0.0
            return Delay(wait_s, load_s, self._answer_s(one, seat), idle)
        wait_s = seat.ends[0]
        return Delay(wait_s, 0.0, self._answer_s(one, seat), wait_s <= 0.0)

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

    def _answer_s(self, one: Waiting, seat: Seat) -> float:
        return self.first_s(one, seat) + _FIRST_SHARE * self.out_s(one, seat)


def need_bytes(node: Node, memory: Memory, key: str) -> float:
    """How much memory a model takes there."""
    return memory.need_bytes(node.runner(key), node.size(key))


def _names(node: Node, one: Loaded) -> Sequence[str]:
    """What requests may call a model in memory by."""
    return node.names(one.key) or (one.name,)


def _pace(node: Node) -> float:
    replicas = node.replicas.items()
    known = [(node.size(key), one.rates) for key, one in replicas if one.rates.answers]
    return pace(known, node.spec.weight)


def _ends(node: Node, memory: Memory, loaded: Loaded, now: float) -> list[float]:
    """When its slots are free, in seconds, as a heap."""
    slots = memory.slots(loaded.key, node.spec)
    if node.spec.auto and len(loaded.runs) == slots:
        slots += memory.tries(loaded.key, now)
    free = min(slots - len(loaded.runs), _ENDS_MAX)
    ends = [0.0] * free  # in order, they are a heap
    if loaded.runs and free < _ENDS_MAX:  # or nobody gets to see when those that run will end
        runs = loaded.runs.values()
        ends += sorted(max(run.holds_s(now), RUNNING_S) for run in runs)[-slots:]
    if loaded.ready is not None:
        left_s = _ready_s(loaded.ready, now)
        ends = [max(end, left_s) for end in ends]
    return ends


def _ready_s(ready: float, now: float) -> float:
    """How long a load still takes that should be over at `ready`."""
    left_s = ready - now
    return max(left_s, _LOADING_S, overdue_s(left_s))


def _loading_s(memory: Memory, now: float) -> float:
    """How long a node still loads something."""
    loading = memory.loading
    return 0.0 if loading is None or loading.ready is None else _ready_s(loading.ready, now)
