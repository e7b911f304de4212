"""Who waits for a node, and in which order: start-time fair queueing over flows."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from operator import attrgetter

from router.core.policy import Attempt
from router.core.work import Priority

_AGEING_S = 30.0  # after so long a request goes with those of the next better priority
_ACTIVE_S = 60.0
_FLOWS_MAX = 4096
_LEAST_SHARE = 0.1  # of what was guessed: what fails at once is not for nothing
_OWED_MAX_S = 60.0  # for one request more than was guessed: it may be the node that hung
_TURN = attrgetter("start", "number")


@dataclass(slots=True, eq=False)
class Flow:
    """What one team, user or address has been given. `finish`: its virtual time; `active`: when it
    was last here; `held`: leases that it has, by model; `waiting_bytes`: bodies of those that
    wait."""

    name: str
    weight: float = 1.0
    finish: float = 0.0
    active: float = 0.0
    held: dict[str, int] = field(default_factory=dict)
    waiting: int = 0
    waiting_bytes: int = 0


@dataclass(slots=True, eq=False)
class Waiting:
    """One request that waits. `since`: when it came; `start`: its virtual time, and `spent`
    what its flow is charged for it; `expected_s`: how long it was last thought to wait, from then
    on, infinite where that cannot be told. `got`: when it got a node, and `load_s` how long a load
    takes there: of the time that it has the node that is charged to nobody."""

    attempt: Attempt
    key: str
    flow: Flow
    since: float
    start: float
    number: int
    spent: float = 0.0
    expected_s: float = inf
    got: float = 0.0
    load_s: float = 0.0

    def __lt__(self, other: "Waiting") -> bool:
        return (self.start, self.number) < (other.start, other.number)

    def rank(self, now: float) -> tuple[int, float, int]:
        """The smaller, the sooner. With time it goes with those of better priority."""
        aged = int((now - self.since) / _AGEING_S)
        return max(0, self.attempt.work.priority - aged), self.start, self.number


class Queue:
    """All that wait, by model."""

    __slots__ = ("_by_priority", "_flows", "_number", "_of", "_virtual", "by_key")

    def __init__(self) -> None:
        self.by_key: dict[str, list[Waiting]] = {}
        self._of: dict[Attempt, Waiting] = {}
        self._by_priority: dict[Priority, int] = {}  # how many wait
        self._flows: dict[str, Flow] = {}
        self._virtual = 0.0  # that of the last one that went
        self._number = 0

    def __len__(self) -> int:
        return len(self._of)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._of.values())

    @property
    def active(self) -> int:
        """How many flows have been here of late."""
        return len(self._flows)

    def flow(self, name: str, weight: float, now: float) -> Flow:
        """A flow by its name. Those that have not been here for long are forgotten."""
        found = self._flows.pop(name, None) or Flow(name, finish=self._virtual)
        found.active, found.weight = now, weight
        self._flows[name] = found
        self._forget(now)
        return found

    def since(self, attempt: Attempt, now: float) -> float:
        """Since when it waits; one that does not would wait from now on."""
        one = self._of.get(attempt)
        return now if one is None else one.since

    def _forget(self, now: float) -> None:
        """Look at the two that were looked at longest ago."""
        for first in [*islice(self._flows.values(), 2)]:
            del self._flows[first.name]
            busy = first.held or first.waiting
            old = now - first.active > _ACTIVE_S or len(self._flows) >= _FLOWS_MAX
            if busy or not old:
                self._flows[first.name] = first

    def tag(self, flow: Flow, cost: float) -> float:
        """The virtual time at which a request of this flow starts; the next one's is later by
        what it costs."""
        start = max(self._virtual, flow.finish)
        flow.finish = start + cost / flow.weight
        return start

    def push(self, attempt: Attempt, key: str, flow: Flow, start: float, now: float) -> Waiting:
        """Have a request wait; `start` is the tag that its flow has just got for it."""
        self._number += 1
        one = Waiting(attempt, key, flow, now, start, self._number, flow.finish - start)
        insort(self.by_key.setdefault(key, []), one)
        self._of[attempt] = one
        priority = attempt.work.priority
        self._by_priority[priority] = self._by_priority.get(priority, 0) + 1
        flow.waiting += 1
        flow.waiting_bytes += attempt.work.body_bytes
        return one

    @contextmanager
    def visit(self, attempt: Attempt, key: str, now: float) -> Iterator[Waiting]:
        """Have a request wait where it would, and its flow be here, only to be weighed: behind
        that all is as it was."""
        work = attempt.work
        new = work.flow not in self._flows
        if new:
            self._flows[work.flow] = Flow(work.flow, work.weight, self._virtual)
        flow = self._flows[work.flow]
        try:
            yield self.push(attempt, key, flow, max(self._virtual, flow.finish), now)
        finally:
            self.pop(attempt)
            if new:
                del self._flows[work.flow]

    def pop(self, attempt: Attempt) -> Waiting | None:
        """It waits no longer; None where it did not."""
        one = self._of.pop(attempt, None)
        if one is None:
            return None
        alike = self.by_key[one.key]
        alike.remove(one)
        if not alike:
            del self.by_key[one.key]
        priority = attempt.work.priority
        self._by_priority[priority] -= 1
        if not self._by_priority[priority]:
            del self._by_priority[priority]
        one.flow.waiting -= 1
        one.flow.waiting_bytes -= attempt.work.body_bytes
        return one

    def leave(self, attempt: Attempt) -> None:
        """It waits no longer, and has got nothing: its flow is not charged for it. Yet none that
        comes goes before one of its flow that is here already."""
        one = self.pop(attempt)
        if one is None:
            return
        flow = one.flow
        last = max((other.start for other in self if other.flow is flow), default=0.0)
        flow.finish = max(flow.finish - one.spent, last)

    def went(self, one: Waiting, now: float) -> None:
        """It has got a node."""
        one.got = now
        self._virtual = max(self._virtual, one.start)
        one.flow.held[one.key] = one.flow.held.get(one.key, 0) + 1
        one.flow.active = now

    def ended(self, one: Waiting, now: float) -> None:
        """It has given its node back: its flow is charged for the time that it took, instead of
        what was guessed."""
        held = one.flow.held
        held[one.key] -= 1
        if not held[one.key]:
            del held[one.key]
        one.flow.active = now
        if len(self._flows) > 1:  # one alone takes from nobody
            self._correct(one.flow, now - one.got - one.load_s, one.spent)

    def _correct(self, flow: Flow, took_s: float, spent: float) -> None:
        """Move a flow, and those of it that wait, by what it was charged too little or too much.
        None goes before those that have gone: then it would have saved something up."""
        more = max(took_s / flow.weight, _LEAST_SHARE * spent) - spent
        more = min(more, _OWED_MAX_S / flow.weight)
        last, keys = 0.0, set()
        if flow.waiting:
            for one in self:
                if one.flow is flow:
                    one.start = max(one.start + more, min(one.start, self._virtual))
                    last = max(last, one.start)
                    keys.add(one.key)
        for key in keys:
            self.by_key[key].sort(key=_TURN)
        flow.finish = max(flow.finish + more, last)

    def alike(self, key: str, now: float) -> list[Waiting]:
        """Those that wait for one model, in their order: by priority, where the first of one has
        not waited for so long that it goes with those of a better one."""
        waiting = self.by_key.get(key, ())
        if len(self._by_priority) < 2:
            return list(waiting)
        lines = [
            deque(one for one in waiting if one.attempt.work.priority is priority)
            for priority in sorted(self._by_priority)
        ]
        lines, found = [line for line in lines if line], []
        while lines:
            line = min(lines, key=lambda line: line[0].rank(now))
            found.append(line.popleft())
            if not line:
                lines.remove(line)
        return found

    def before(self, one: Waiting, now: float) -> int:
        """How many that wait for the same model go before it."""
        if len(self._by_priority) < 2:
            return self.sooner(one.key, one)
        return self.alike(one.key, now).index(one)

    def sooner(self, key: str, one: Waiting) -> int:
        """How many wait for a model that have an earlier virtual time than one for another."""
        return bisect_left(self.by_key.get(key, ()), one)

    def order(self, now: float) -> Sequence[Sequence[Waiting]]:
        """All that wait, by model, the model first whose turn is first."""
        self._forget(now)
        found = [self.alike(key, now) for key in self.by_key]
        found.sort(key=lambda alike: alike[0].rank(now))
        return found
