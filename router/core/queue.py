"""Who waits for a node, and in which order: start-time fair queueing over flows."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from operator import attrgetter

import msgspec

from router.core.policy import Attempt
from router.core.work import Priority

_AGEING_S = 30.0  # after so long a request goes with those of the next better priority
_ACTIVE_S = 60.0
_FLOWS_MAX = 4096
_SWEEP_S, _SWEPT_SHARE = 0.25, 16  # how often flows are looked at, and which part of them
_LEAST_SHARE = 0.1  # of what was guessed: what fails at once is not for nothing
_OWED_MAX_S = 60.0  # for one request more than was guessed: it may be the node that hung
_TURN = attrgetter("start", "number")


@dataclass(slots=True, eq=False)
class Flow:
    """What one team, user or address has been given. `finish`: its virtual time; `active`: when it
    was last here; `held`: leases that it has, by model, `leases` all of them; `waiting_bytes`:
    bodies of those that wait."""

    name: str
    weight: float = 1.0
    finish: float = 0.0
    active: float = 0.0
    held: dict[str, int] = field(default_factory=dict)
    leases: int = 0
    waiting: int = 0
    waiting_bytes: int = 0


class Waiting(msgspec.Struct, eq=False):
    """One request that waits, or has a node. `since`: when it came; `start`: its virtual time, and
    `spent` what its flow is charged for it; `expected_s`: how long it was last thought to wait,
    from then on, infinite where that cannot be told. `got`: when it got a node, and `load_s` how
    long a load takes there: of the time that it has the node that is charged to nobody."""

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
    """All that wait: `by_key`, by model, and `waiting`, by attempt; `flows`: those that have been
    here of late, by name."""

    __slots__ = (
        "_by_priority", "_number", "_sharing", "_sweep_at", "_virtual", "by_key", "flows",
        "waiting",
    )  # fmt: skip

    def __init__(self) -> None:
        self.by_key: dict[str, list[Waiting]] = {}
        self.waiting: dict[Attempt, Waiting] = {}
        self._by_priority: dict[Priority, int] = {}  # how many wait
        self._sharing: dict[str, dict[Flow, int]] = {}  # how many of each flow wait, by model
        self.flows: dict[str, Flow] = {}
        self._sweep_at = 0.0
        self._virtual = 0.0  # that of the last one that went
        self._number = 0

    def __len__(self) -> int:
        return len(self.waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self.waiting.values())

    def flow(self, name: str, weight: float, now: float) -> Flow:
        """A flow by its name. Those that have not been here for long are forgotten."""
        if now >= self._sweep_at or len(self.flows) > _FLOWS_MAX:
            self._forget(now)
        found = self.flows.get(name)
        if found is None:
            found = self.flows[name] = Flow(name, finish=self._virtual)
        found.active, found.weight = now, weight
        return found

    def since(self, attempt: Attempt, now: float) -> float:
        """Since when it waits; one that does not would wait from now on."""
        one = self.waiting.get(attempt)
        return now if one is None else one.since

    def _forget(self, now: float) -> None:
        """Look at those that were looked at longest ago."""
        self._sweep_at = now + _SWEEP_S
        for first in [*islice(self.flows.values(), 2 + len(self.flows) // _SWEPT_SHARE)]:
            del self.flows[first.name]
            busy = first.leases or first.waiting
            old = now - first.active > _ACTIVE_S or len(self.flows) >= _FLOWS_MAX
            if busy or not old:
                self.flows[first.name] = first

    def come(self, attempt: Attempt, key: str, flow: Flow, cost: float, now: float) -> Waiting:
        """A request of this flow, that does not wait yet. Its virtual time is after those of all
        that its flow has asked for; the next one's is later by what it costs."""
        start = flow.finish if flow.finish > self._virtual else self._virtual
        spent = cost / flow.weight
        flow.finish = start + spent
        self._number += 1
        return Waiting(attempt, key, flow, now, start, self._number, spent)

    def push(self, one: Waiting) -> None:
        """Have a request wait."""
        work, flow = one.attempt.work, one.flow
        insort(self.by_key.setdefault(one.key, []), one)
        self.waiting[one.attempt] = one
        self._by_priority[work.priority] = self._by_priority.get(work.priority, 0) + 1
        sharing = self._sharing.setdefault(one.key, {})
        sharing[flow] = sharing.get(flow, 0) + 1
        flow.waiting += 1
        flow.waiting_bytes += work.body_bytes

    @contextmanager
    def visit(self, attempt: Attempt, key: str, now: float) -> Iterator[Waiting]:
        """Have a request wait where it would, and its flow be here, only to be weighed: behind
        that all is as it was."""
        work = attempt.work
        new = work.flow not in self.flows
        if new:
            self.flows[work.flow] = Flow(work.flow, work.weight, self._virtual)
        flow = self.flows[work.flow]
        finish, one = flow.finish, self.come(attempt, key, flow, 0.0, now)
        flow.finish = finish
        self.push(one)
        try:
            yield one
        finally:
            self.pop(attempt)
            if new:
                del self.flows[work.flow]

    def pop(self, attempt: Attempt) -> Waiting | None:
        """It waits no longer; None where it did not."""
        one = self.waiting.pop(attempt, None)
        if one is None:
            return None
        alike = self.by_key[one.key]
        alike.remove(one)
        if not alike:
            del self.by_key[one.key]
        self._unshare(one)
        priority = attempt.work.priority
        self._by_priority[priority] -= 1
        if not self._by_priority[priority]:
            del self._by_priority[priority]
        one.flow.waiting -= 1
        one.flow.waiting_bytes -= attempt.work.body_bytes
        return one

    def _unshare(self, one: Waiting) -> None:
        sharing = self._sharing[one.key]
        sharing[one.flow] -= 1
        if not sharing[one.flow]:
            del sharing[one.flow]
            if not sharing:
                del self._sharing[one.key]

    def shares(self, one: Waiting) -> bool:
        """Whether any of its flow waits for its model."""
        return one.flow in self._sharing.get(one.key, ())

    def weight(self, key: str) -> float:
        """That of all flows together that wait for a model."""
        return sum([flow.weight for flow in self._sharing.get(key, ())])

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
        if one.start > self._virtual:
            self._virtual = one.start
        flow, key = one.flow, one.key
        flow.held[key] = flow.held.get(key, 0) + 1
        flow.leases += 1
        flow.active = now

    def ended(self, one: Waiting, now: float) -> None:
        """It has given its node back: its flow is charged for the time that it took, instead of
        what was guessed."""
        flow, key = one.flow, one.key
        left = flow.held[key] = flow.held[key] - 1
        if not left:
            del flow.held[key]
        flow.leases -= 1
        flow.active = now
        if len(self.flows) > 1:  # one alone takes from nobody
            self._correct(flow, now - one.got - one.load_s, one.spent)

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
        if now >= self._sweep_at:
            self._forget(now)
        found = [self.alike(key, now) for key in self.by_key]
        found.sort(key=lambda alike: alike[0].rank(now))
        return found
