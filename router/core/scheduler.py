"""Which node a request is to have, and when: the least expected delay, bound late.

All is weighed in seconds. A request that would do best to wait for a busy node waits here, where it
can still go elsewhere; its turn is taken into account for those behind it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from math import exp, inf

import msgspec

from router.core.demand import Demand
from router.core.estimate import Cost, Lengths, cost, pace
from router.core.memory import Loaded, Memory, Run
from router.core.node import Node
from router.core.policy import Attempt
from router.core.prefix import BLOCK_TOKENS
from router.core.queue import Flow, Queue, Waiting
from router.core.types import Reason, Weighed
from router.core.usage import Usage

_FIRST_SHARE = 0.3  # how much the length of an answer weighs against its first token
_CONTENTION = 0.7
_CAUTION = 0.5  # a load counts for so much more than it takes,
_AGED_S, _AGED_SHARE = 30.0, 0.1  # and less so for one that has waited
_SOON_S = 120.0  # a victim that is wanted again within so long has to be loaded again
_ONLY_COPY, _COPIES = 8.0, 4.0
_SETTLED_LOADS = 4.0  # a model stays at least so many times as long as it took to load
_PATIENCE_S = 8.0  # then a node is made to make room
_FLOW_SHARE = 0.7
_BACKLOG = 4  # a flow that has more of them waiting would take each slot that gets free
_LOOKED_AT = 64  # of those that wait for one model
_LOADING_S = 0.1  # at least, until it is seen to be over
_RUNNING_S = 0.01  # likewise: what is at work has its slot, however short it was thought to be

NodesOf = Callable[[Attempt], Sequence[Node]]


class Placed(msgspec.Struct, frozen=True, eq=False):
    """The node that a request gets now, and why. `ahead`: how many requests for the model are at
    work there; `first_s`: when its answer is expected to begin, in seconds."""

    attempt: Attempt
    node: Node
    reason: Reason
    ahead: int = 0
    first_s: float = 0.0


class Terms(msgspec.Struct, frozen=True, eq=False):
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
class _Seat:
    """One model on one node, in one pass. `ends`: a heap of when its slots are free, in seconds;
    `loaded` is None where it has to be loaded, and `victims` then what has to go for it, None where
    that cannot be; `evicts_s` what that costs others."""

    node: Node
    memory: Memory
    loaded: Loaded | None
    cost: Cost
    contention: float
    ends: list[float]
    victims: Collection[Loaded] | None = ()
    evicts_s: float = 0.0


class Scheduler:
    """Orders and places requests for models. Only the pool calls it."""

    def __init__(self) -> None:
        self.queue = Queue()
        self.lengths = Lengths()
        self.demand = Demand()
        self._memories: dict[Node, Memory] = {}
        self._costs: dict[Node, dict[str, Cost]] = {}
        self._seats: dict[tuple[Node, str], _Seat] = {}
        self._went: dict[Attempt, Waiting] = {}
        self._barred: set[Flow] = set()  # flows that had their share when they were looked at
        self.unbarred = False  # one of them has given a node back
        self.spared: set[Node] = set()  # those that get one request in a pass: it is a trial
        self._contexts: dict[str, int] = {}  # how many tokens each model was last loaded for

    def __repr__(self) -> str:
        return f"<Scheduler {len(self.queue)} waiting>"

    def keep(self, nodes: Collection[Node]) -> None:
        """Forget what is known of all other nodes."""
        for node in self._memories.keys() - set(nodes):
            del self._memories[node]
            self._costs.pop(node, None)
        for node, memory in self._memories.items():
            memory.configure(node.spec.gpus)
        self._costs.clear()

    def memory(self, node: Node) -> Memory:
        found = self._memories.get(node)
        if found is None:
            found = self._memories[node] = Memory(node.spec.gpus)
        return found

    def learned(self, node: Node) -> Mapping[str, int]:
        """How many slots each model has there, as far as that was learned."""
        memory = self._memories.get(node)
        return {} if memory is None else memory.learned_slots

    # What a request goes through.

    def submit(
        self, attempt: Attempt, key: str, nodes_of: NodesOf, now: float
    ) -> tuple[Waiting, Sequence[Placed]]:
        """Have a request wait, unless there is a node for it. Those that wait already have had
        their turn at the last event."""
        work = attempt.work
        self.demand.count(key, now)
        flow = self.queue.flow(work.flow, work.weight, now)
        start = self.queue.tag(flow, self._size(attempt, key, nodes_of(attempt)))
        one = self.queue.push(attempt, key, flow, start, now)
        self._begin()
        return one, self._give([one], nodes_of, now)

    def pass_(
        self, nodes_of: NodesOf, now: float, touched: Collection[Node] | None,
        came: Collection[str] = (),
    ) -> Sequence[Placed]:  # fmt: skip
        """Give nodes to those that wait, as far as there are any. `touched`: where something has
        happened since the last time, None for everywhere; `came`: models that more wait for."""
        self._begin()
        self._release()
        if touched is None:
            self._barred.clear()
        found: list[Placed] = []
        for alike in self.queue.order(now):
            key = alike[0].key
            if touched is None or key in came or self._may_gain(key, touched, now):
                found += self._give(alike, nodes_of, now)
        return found

    def _may_gain(self, key: str, nodes: Collection[Node], now: float) -> bool:
        """Whether one of these could take a request for this model now."""
        return any(self._free(self._seat(node, key, now)) for node in nodes if key in node.present)

    @staticmethod
    def _free(seat: _Seat) -> bool:
        return seat.victims is not None if seat.loaded is None else seat.ends[0] <= 0.0

    def began(self, attempt: Attempt, node: Node, key: str, now: float) -> None:
        """The first record of an answer is there: whatever had to be loaded is."""
        memory = self.memory(node)
        one = memory.loaded.get(key)
        run = None if one is None else one.runs.get(attempt)
        if one is not None and run is not None:
            memory.ready(one, now)
            one.prefixes.remember(attempt.work.blocks)
            if node.spec.auto:
                memory.learned(key).began(run.ahead, run.since, now)
            run.begin(now)

    def leave(
        self, attempt: Attempt, node: Node | None, key: str, now: float, *, good: bool
    ) -> None:
        """A request has ended, or waits no longer."""
        self.queue.leave(attempt)
        if node is None:
            self._release()
        went = self._went.pop(attempt, None)
        if node is None or went is None:
            return
        self.queue.ended(went, now)
        self.unbarred = self.unbarred or went.flow in self._barred
        memory = self.memory(node)
        if node.spec.auto:
            memory.learned(key).freed(now)
        memory.end(attempt, key, now, good=good)
        if not node.up:
            self.lost(node)

    def learn(self, node: Node, key: str, flow: str, told: Usage, ahead: int, now: float) -> None:
        """Take what the final record of an answer told, that had so many before it."""
        self._costs.pop(node, None)
        if node.spec.auto and told.waited_s is not None and told.total_s is not None:
            learned = self.memory(node).learned(key)
            learned.learn(ahead, told.waited_s, told.total_s, now)
        if told.completion_tokens:
            self.lengths.learn(key, flow, told.completion_tokens)

    def see(self, node: Node, now: float, wall: float) -> None:
        """Take what the node has in its memory."""
        memory = self.memory(node)
        memory.see(node.resident, now, wall)
        for key, one in memory.loaded.items():
            if one.num_ctx:
                self._contexts[key] = one.num_ctx

    def lost(self, node: Node) -> None:
        """It is down: whatever it had in its memory is gone, but for what has not ended yet. That
        counts until it does."""
        memory = self._memories.get(node)
        if memory is None:
            return
        busy = {key: one for key, one in memory.loaded.items() if one.runs}
        loading = memory.loading
        memory.forget()
        memory.loaded.update(busy)
        if loading in busy.values():
            memory.loading = loading

    def weigh(
        self, attempt: Attempt, key: str, nodes: Sequence[Node], nodes_of: NodesOf, now: float
    ) -> Sequence[Weighed]:
        """What each node would cost a request that came now, the best first. It may have a node
        at once, or else is behind those that go before it. Nothing is changed."""
        self._begin()
        one = self.queue.visit(attempt, key, now)
        try:
            found = self._ranked(one, nodes, now)
            if not found[0].now:
                self._hold_before(one, nodes_of, now)
                found = self._ranked(one, nodes, now)
        finally:
            self.queue.pop(attempt)
        return found

    def _hold_before(self, one: Waiting, nodes_of: NodesOf, now: float) -> None:
        """Have the turns of those seen that go before it."""
        for other in self.queue.alike(one.key, now)[:_LOOKED_AT]:
            if other is one:
                break
            best, _ = self._best(other, nodes_of(other.attempt), now)
            if best is not None and self._may(other):
                self._hold(other, best)

    def _ranked(self, one: Waiting, nodes: Sequence[Node], now: float) -> Sequence[Weighed]:
        found = [self._weighed(one, self._seat(node, one.key, now), now) for node in nodes]
        return sorted(found, key=lambda one: inf if one.total_s is None else one.total_s)

    def _weighed(self, one: Waiting, seat: _Seat, now: float) -> Weighed:
        terms, node = self._terms(one, seat, now), seat.node.spec
        if terms is None:
            return Weighed(node, "no room for the model", later=True)
        return Weighed(
            node, "", terms.wait_s, terms.load_s, terms.answer_s, self._reason(one, seat),
            now=terms.now and self._may(one), later=True,
        )  # fmt: skip

    # How it is weighed.

    def _size(self, attempt: Attempt, key: str, nodes: Sequence[Node]) -> float:
        """What a request takes of whichever node answers it: seconds of a slot, as guessed from
        the model's size alone."""
        price = cost(nodes[0].size(key), None, 1.0)
        known = 0
        for node in nodes:
            loaded = self.memory(node).loaded.get(key)
            if loaded is not None:
                known = max(known, loaded.prefixes.common(attempt.work.blocks))
        out = self.lengths.expected(key, attempt.work.flow, attempt.work.max_tokens)
        return self._prompt(attempt, key, known) * price.prefill_s + out * price.decode_s

    def _prompt(self, attempt: Attempt, key: str, known: int) -> float:
        """Tokens of a prompt that have to be worked out: no more than the context holds, less
        those of the blocks that are known."""
        most = min(attempt.work.prompt_tokens, self._contexts.get(key, inf))
        return max(most - known * BLOCK_TOKENS, 0)

    def _give(self, alike: Sequence[Waiting], nodes_of: NodesOf, now: float) -> list[Placed]:
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
            if not self._may(one):
                barred.add(one.flow)
                self._barred.add(one.flow)
                continue
            left -= 1
            if not left:
                break
            best, terms = self._best(one, nodes, now)
            if best is None or terms is None:
                one.expected_s = inf
                self._reserve(one, nodes, now)
                shut.add(id(nodes))
            elif terms.now:
                found.append(self._grant(one, best, now))
            else:
                one.expected_s = terms.wait_s + terms.load_s + self._ahead_s(one, best)
                self._hold(one, best)
                self._insist(one, best, now)
                if not self._hope(nodes, one.key):
                    shut.add(id(nodes))
        return found

    def _release(self) -> None:
        """Nodes make no more room for what nobody waits for."""
        by_key = self.queue.by_key
        for memory in self._memories.values():
            memory.release(by_key)
            loaded = memory.loaded.get(memory.wanted)
            if loaded is not None and not any(
                loaded.differs(one.attempt.work.num_ctx) for one in by_key[loaded.key]
            ):
                memory.release(())

    def _hope(self, nodes: Sequence[Node], key: str) -> bool:
        """Whether a node could take another request for this model now."""
        seats = (self._seats[node, key] for node in nodes if node not in self.spared)
        return any(map(self._free, seats))

    @staticmethod
    def _insist(one: Waiting, seat: _Seat, now: float) -> None:
        """It waits until all have ended that use the model with another context. After some time
        no more of them begin."""
        memory, loaded = seat.memory, seat.loaded
        if loaded is None or now - one.since < _PATIENCE_S or memory.wanted:
            return
        if loaded.differs(one.attempt.work.num_ctx) and memory.loading is None:
            memory.reserve(one.key, [loaded])

    def _ahead_s(self, one: Waiting, seat: _Seat) -> float:
        """How long those take that wait for the same model, roughly."""
        ahead = len(self.queue.by_key[one.key]) - 1
        return ahead * self._service_s(one, seat) / max(1, self._slots(one.key))

    def _slots(self, key: str) -> int:
        """How many requests for a model are served at once."""
        return sum(
            memory.slots(key, node.spec) for node, memory in self._memories.items()
            if key in memory.loaded
        )  # fmt: skip

    def _hold(self, one: Waiting, seat: _Seat) -> None:
        """Those behind it see its turn."""
        heapreplace(seat.ends, max(seat.ends[0], 0.0) + self._service_s(one, seat))

    def _best(
        self, one: Waiting, nodes: Sequence[Node], now: float
    ) -> tuple[_Seat | None, Terms | None]:
        best, found, least = None, None, inf
        for node in nodes:
            if node in self.spared:
                continue
            seat = self._seat(node, one.key, now)
            terms = self._terms(one, seat, now)
            if terms is not None and terms.total_s < least:
                best, found, least = seat, terms, terms.total_s
        return best, found

    def _terms(self, one: Waiting, seat: _Seat, now: float) -> Terms | None:
        """What this node would cost it; None where it cannot have it."""
        work, loaded = one.attempt.work, seat.loaded
        if loaded is None:
            if seat.victims is None:
                return None
            return Terms(0.0, self._load_s(one, seat, now), self._answer_s(one, seat, 0), True)
        anew, leaves = loaded.differs(work.num_ctx), loaded.key in seat.memory.leaving
        if leaves and seat.memory.wanted != loaded.key:
            return None
        known = 0 if anew else loaded.prefixes.common(work.blocks)
        if anew or leaves:
            wait_s = max(seat.ends) if loaded.runs else 0.0
            idle = not loaded.runs and loaded.ready is None and seat.memory.loading is None
            load_s = self._load_s(one, seat, now) if anew else 0.0
            return Terms(wait_s, load_s, self._answer_s(one, seat, known), idle)
        wait_s = seat.ends[0]
        return Terms(wait_s, 0.0, self._answer_s(one, seat, known), wait_s <= 0.0)

    def _load_s(self, one: Waiting, seat: _Seat, now: float) -> float:
        """A load is dearer than it is long: it also costs those that it drives out. Whoever has
        waited long cares less."""
        aged = max(_AGED_SHARE, 1 - (1 - _AGED_SHARE) * (now - one.since) / _AGED_S)
        backlog = len(self.queue.by_key.get(one.key, ()))
        load_s = seat.cost.load_s
        caution_s = _CAUTION * load_s
        return load_s + aged * (caution_s + seat.evicts_s / max(1, min(2, backlog)))

    def _answer_s(self, one: Waiting, seat: _Seat, known: int) -> float:
        prompt = self._prompt(one.attempt, one.key, known)
        answer_s = prompt * seat.cost.prefill_s + _FIRST_SHARE * self._out_s(one, seat)
        return answer_s * seat.contention

    def _out_s(self, one: Waiting, seat: _Seat) -> float:
        work = one.attempt.work
        return self.lengths.expected(one.key, work.flow, work.max_tokens) * seat.cost.decode_s

    def _service_s(self, one: Waiting, seat: _Seat) -> float:
        work, loaded = one.attempt.work, seat.loaded
        known = 0 if loaded is None else loaded.prefixes.common(work.blocks)
        prompt = self._prompt(one.attempt, one.key, known)
        return (prompt * seat.cost.prefill_s + self._out_s(one, seat)) * seat.contention

    # What a node is worth now.

    def _begin(self) -> None:
        self._seats.clear()
        self.spared.clear()

    def _seat(self, node: Node, key: str, now: float) -> _Seat:
        found = self._seats.get((node, key))
        if found is None:
            found = self._seats[node, key] = self._look(node, key, now)
        return found

    def _look(self, node: Node, key: str, now: float) -> _Seat:
        memory = self.memory(node)
        loaded = memory.loaded.get(key)
        price = self._cost(node, key)
        others = sum(1 for one in memory.loaded.values() if one.runs and one.key != key)
        contention = 1 + _CONTENTION * max(0, others + 1 - memory.gpus) / memory.gpus
        if loaded is None:
            victims = self._victims(node, memory, key, now)
            evicts_s = sum(self._loss_s(node, one, now) for one in victims or ())
            return _Seat(node, memory, None, price, contention, [0.0], victims, evicts_s)
        slots = memory.slots(key, node.spec)
        if node.spec.auto and len(loaded.runs) == slots:
            slots += memory.tries(key, now)
        free = min(slots - len(loaded.runs), _LOOKED_AT)
        ends: list[float] = []
        if free < _LOOKED_AT:  # or nobody gets to see when those that run will end
            ends = sorted((max(end, _RUNNING_S) for end in loaded.ends(now)), reverse=True)[:slots]
        ends += [0.0] * free
        if loaded.ready is not None:
            left_s = max(loaded.ready - now, _LOADING_S)
            ends = [max(end, left_s) for end in ends]
        heapify(ends)
        return _Seat(node, memory, loaded, price, contention, ends)

    def _victims(
        self, node: Node, memory: Memory, key: str, now: float
    ) -> Collection[Loaded] | None:
        """What has to go for a model; None where it cannot, or should not, be loaded now."""
        if memory.loading is not None or memory.wanted not in ("", key):
            return None
        victims = memory.victims(key, self._bytes(node, memory, key))
        if victims is None or memory.wanted == key:
            return victims
        for one in victims:
            stays_s = _SETTLED_LOADS * self._cost(node, one.key).load_s
            if one.key in self.queue.by_key or now - one.since < stays_s:
                return None
        return victims

    def _loss_s(self, node: Node, victim: Loaded, now: float) -> float:
        """What it costs others that a model is driven out here."""
        again = 1 - exp(-self.demand.rate(victim.key, now) * _SOON_S)
        copies = sum(
            1 for other, memory in self._memories.items()
            if other is not node and victim.key in memory.loaded
        )  # fmt: skip
        price = _COPIES / copies if copies else _ONLY_COPY
        return again * self._cost(node, victim.key).load_s * price

    def _cost(self, node: Node, key: str) -> Cost:
        costs = self._costs.get(node)
        if costs is None:
            costs = self._costs[node] = {}
        found = costs.get(key)
        if found is None:
            replica = node.replicas.get(key)
            rates = None if replica is None else replica.rates
            found = costs[key] = cost(node.size(key), rates, self._pace(node))
        return found

    @staticmethod
    def _pace(node: Node) -> float:
        replicas = node.replicas.items()
        known = [(node.size(key), one.rates) for key, one in replicas if one.rates.answers]
        return pace(known, node.spec.weight)

    @staticmethod
    def _bytes(node: Node, memory: Memory, key: str) -> float:
        return memory.need_bytes(key, node.size(key))

    # Who gets it.

    def _may(self, one: Waiting) -> bool:
        """Whether its flow has not got its share of the slots already, of all and of those for
        the model."""
        active, flow = self.queue.active, one.flow
        if active < 2:
            return True
        share = max(_FLOW_SHARE, 1 / active)
        slots = sum(
            memory.slots(key, node.spec)
            for node, memory in self._memories.items() for key in memory.loaded
        )  # fmt: skip
        held, mine = flow.held.get(one.key, 0), self._slots(one.key)
        if flow.waiting > max(mine, _BACKLOG) and held >= max(1, int(share * mine)):
            return False
        return sum(flow.held.values()) < max(1, share * slots)

    def _grant(self, one: Waiting, seat: _Seat, now: float) -> Placed:
        attempt, key, loaded = one.attempt, one.key, seat.loaded
        service_s, reason = self._service_s(one, seat), self._reason(one, seat)
        out_s = self._out_s(one, seat) * seat.contention
        first_s = service_s - out_s
        if loaded is None or reason is Reason.LOAD:
            need = self._bytes(seat.node, seat.memory, key)
            ready = now + seat.cost.load_s
            loaded = seat.memory.load(key, need, attempt.work.num_ctx, ready, now)
            service_s += seat.cost.load_s
            first_s += seat.cost.load_s
            self._seats = {pair: s for pair, s in self._seats.items() if pair[0] is not seat.node}
        else:
            heapreplace(seat.ends, max(service_s, _RUNNING_S))
        ahead = len(loaded.runs)
        if seat.node.spec.auto:
            seat.memory.learned(key).lease(ahead, now)
        loaded.runs[attempt] = Run(now, service_s, _FIRST_SHARE * out_s, ahead)
        loaded.used = now
        self.queue.pop(attempt)
        if key not in self.queue.by_key:
            self._release()
        self.queue.went(one, now)
        if seat.node.troubled:
            self.spared.add(seat.node)
        self._went[attempt] = one
        return Placed(attempt, seat.node, reason, ahead, first_s)

    @staticmethod
    def _reason(one: Waiting, seat: _Seat) -> Reason:
        loaded, work = seat.loaded, one.attempt.work
        if loaded is None or loaded.differs(work.num_ctx):
            return Reason.LOAD
        return Reason.CACHED if loaded.prefixes.common(work.blocks) else Reason.WARM

    def _reserve(self, one: Waiting, nodes: Sequence[Node], now: float) -> None:
        """No node can have it. After some time the one that would be ready first makes room."""
        if now - one.since < _PATIENCE_S:
            return
        if any(self.memory(node).wanted == one.key for node in nodes):
            return
        best, least = None, inf
        for node in nodes:
            memory = self.memory(node)
            if memory.wanted or memory.loading is not None or one.key in memory.loaded:
                continue
            victims = memory.victims(one.key, self._bytes(node, memory, one.key), busy=True)
            drain_s = max((end for v in victims or () for end in v.ends(now)), default=0.0)
            total_s = drain_s + self._cost(node, one.key).load_s
            if victims is not None and total_s < least:
                best, least = (memory, victims), total_s
        if best is not None:
            best[0].reserve(one.key, best[1])
