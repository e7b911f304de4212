"""A storm in virtual time: the pool, trails and the budget as they are, over nodes that fail in all
ways they can, under requests that come, wait, go on elsewhere and leave. One seed, one storm.

    python -m tests.core.storm SECONDS [SEED]     storms from SEED on, for so long
    python -m tests.core.storm replay SEED        that one, and all that happened in it
"""

import enum
import heapq
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from random import Random

from router.core.lease import Lease
from router.core.policy import Attempt, Target
from router.core.pool import Pool
from router.core.retry import Verdict
from router.core.trail import Trail
from router.core.types import (
    Ejection,
    Failure,
    FailureKind,
    NodeSpec,
    NodeView,
    Observation,
    Outcome,
    Refusal,
    Rejected,
    Sign,
    Topology,
)
from tests.core.build import RULES, models, spec, topology
from tests.core.quickly import agrees

_STORM_S = 60.0
_CALM_S = 100.0  # longer than any back-off
_BUSY_S = 20.0  # how long a request waits for room
_SILENT_S = 8.0  # how long a node may send nothing
_ATTEMPTS_MAX = 100
_URL = "http://{}:11434".format


class Mode(enum.Enum):
    """How a node behaves."""

    GOOD = "good"
    SLOW = "slow"
    DEAD = "dead"  # nobody listens
    LOST = "lost"  # its packets are
    HUNG = "hung"  # it accepts, and says nothing
    CUTS = "cuts"  # it answers probes, and cuts every other connection
    FAILS = "fails"  # 500 at once
    FULL = "full"  # 503 at once
    ODD = "odd"  # any of it, or none, after any time


_GOOD = (Mode.GOOD, Mode.SLOW)
_SIGNS = {Mode.DEAD: Sign.REFUSED, Mode.LOST: Sign.BAD, Mode.HUNG: Sign.BAD}
_SENT = Failure(FailureKind.RESET, sent=True)
_AT_ONCE: Mapping[Mode, tuple[float, Failure]] = {
    Mode.DEAD: (0.001, Failure(FailureKind.REFUSED)),
    Mode.LOST: (2.0, Failure(FailureKind.CONNECT)),
    Mode.CUTS: (0.01, _SENT),
    Mode.FAILS: (0.005, Failure(FailureKind.ANSWERED, sent=True, received=True, status=500)),
    Mode.FULL: (0.005, Failure(FailureKind.BUSY, sent=True, received=True, status=503)),
}
_ODDLY = (None, None, None, *(failure for _, failure in _AT_ONCE.values() if failure.sent))
_MISSING = Failure(FailureKind.MISSING, sent=True, received=True, status=404)


@dataclass(eq=False)
class Sim:
    """A node as it is in truth. `runs`: attempts that it works on. `failing`: models for which it
    has no memory. `full`: those that it has said it is too busy for, until one of them is
    answered, and when it was last asked for one."""

    spec: NodeSpec
    keys: set[str]
    mode: Mode = Mode.GOOD
    failing: set[str] = field(default_factory=set)
    runs: dict["Try", None] = field(default_factory=dict)
    full: dict[str, float] = field(default_factory=dict)

    def forgotten(self) -> None:
        """It is not configured: if it ever is again, nothing is known of it."""
        self.full.clear()

    def good(self, key: str) -> bool:
        return self.mode in _GOOD and key in self.keys and key not in self.failing

    def refuses(self, request: "Request", roll: Random) -> tuple[float, Failure] | None:
        """After how long it fails such a request, and how; None if it answers."""
        if self.mode in _AT_ONCE:
            return _AT_ONCE[self.mode]
        if self.mode is Mode.HUNG:
            return None
        if request.key not in self.keys:
            return 0.005, _MISSING
        oddly = roll.choice(_ODDLY) if self.mode is Mode.ODD else None
        if oddly is not None:
            return roll.uniform(0, 3), oddly
        if request.poison or request.key in self.failing:
            return _AT_ONCE[Mode.FAILS]
        return None


@dataclass(eq=False)
class Request:
    """What one client asks. `poison`: every node fails it. `met`: nodes that have failed it since
    the client saw a record, but for those that were full; `answers`: how many have answered that
    they fail it, in all."""

    number: int
    key: str
    came: float
    trail: Trail
    records: int
    pinned: bool = False
    changes: bool = False
    poison: bool = False
    seen: int = 0  # records that the client has
    told: int = 0  # of them, those before the last failure
    attempts: int = 0
    met: set[str] = field(default_factory=set)
    answers: int = 0
    ended: str = ""
    running: "Try | None" = None
    deadline: float = 0.0
    turn: int = 0  # of waiting: what was to wake it from an earlier one comes to nothing

    def __repr__(self) -> str:
        marks = [m for m in ("pinned", "changes", "poison") if getattr(self, m)]
        return f"<#{self.number} {self.key} {self.seen}/{self.records} {' '.join(marks)}>"


@dataclass(eq=False)
class Try:
    """One attempt that has a lease. `since`: when the node last sent something."""

    request: Request
    attempt: Attempt
    sim: Sim
    since: float
    paid: bool


class Broken(AssertionError):
    """Something that must hold does not; with all that led to it."""


class Storm:
    """One storm, and all that must hold in it."""

    def __init__(self, seed: int, kept: int = 40) -> None:
        self.seed = seed
        self.roll = Random(seed)
        self.now = 0.0
        self.story: deque[str] = deque(maxlen=kept)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self.requests: list[Request] = []
        self.waiting: dict[str, deque[Request]] = {}
        self.running: set[Try] = set()
        self.paid_at: list[float] = []
        self.steady: dict[tuple[str, str], float] = {}  # since when
        self._begin()

    def _begin(self) -> None:
        roll = self.roll
        self.keys = [f"m{i}:latest" for i in range(roll.randint(1, 3))]
        names = [f"n{i}" for i in range(roll.randint(1, 5))]
        self.sims = {
            _URL(name): Sim(
                spec(name, slots=roll.choice([1, 1, 4])),
                {key for key in self.keys if roll.random() < 0.85},
            )
            for name in names
        }
        self.rules = replace(RULES, slow_start_s=roll.choice([0.1, 5.0, 30.0]))
        self.pool = Pool(self._topology(), 0.0, roll.random)
        self.views: dict[str, NodeView] = {}
        for url in self.sims:
            self._probe(url)
        self._look()

    def _topology(self) -> Topology:
        specs = [sim.spec for sim in self.sims.values()]
        left = [one for one in specs if self.roll.random() < 0.8] or specs[:1]
        cut = self.roll.choice([0, 0, 1])
        return topology(*[pool for pool in (left[:cut], left[cut:]) if pool], rules=self.rules)

    # Time.

    def at(self, after_s: float, what: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._heap, (self.now + after_s, self._number, what))

    def run(self) -> None:
        """The storm, then calm, then good traffic. Raises Broken."""
        try:
            self._plan()
            while self._heap:
                self.now, _, what = heapq.heappop(self._heap)
                what()
                self._look()
                self._check()
            self._check_end()
        except Exception as error:
            story = "\n  ".join(self.story)
            raise Broken(f"seed {self.seed} at {self.now:.3f}: {error}\n  {story}") from error

    def _plan(self) -> None:
        roll = self.roll
        for _ in range(roll.randint(20, 80)):
            self.at(roll.uniform(0, _STORM_S), self._come)
        for _ in range(roll.choice([0, 1, 1])):
            start = roll.uniform(0, _STORM_S)
            for _ in range(roll.randint(5, 40)):
                self.at(start + roll.uniform(0, 0.05), self._come)
        for _ in range(roll.randint(1, 12)):
            self.at(roll.uniform(0, _STORM_S), roll.choice(self._troubles()))
        for url in self.sims:
            when = roll.uniform(0, 4)
            while when < _STORM_S:
                self.at(when, lambda url=url: self._probe(url))  # type: ignore[misc]
                when += roll.uniform(2, 5)
        self.at(_STORM_S, self._heal)
        # Each time as many at once as there are nodes, all idle: whoever may be asked is.
        for place, key in enumerate(self.keys * 3):
            for _ in self.sims:
                self.at(
                    _STORM_S + _CALM_S + 30 * place,
                    lambda key=key: self._come_well(key),  # type: ignore[misc]
                )

    def _troubles(self) -> Sequence[Callable[[], None]]:
        return [*[self._turn] * 8, self._forget, self._choke, self._drain, self._reload]

    def say(self, what: str) -> None:
        self.story.append(f"{self.now:9.3f} {what}")

    # What happens to nodes.

    def _probe(self, url: str) -> None:
        sim = self.sims[url]
        sign = _SIGNS.get(sim.mode, Sign.GOOD)
        # As the prober does: whoever is not up is asked for everything.
        present = models(sim.keys) if sign is Sign.GOOD and self._asks_tags(url) else None
        for flip in self.pool.observe(url, Observation(sign, present=present), self.now):
            self.say(f"{flip}")

    def _asks_tags(self, url: str) -> bool:
        view = self.views.get(url)
        return view is None or not view.up or self.roll.random() < 0.3 or self.now > _STORM_S

    def _turn(self) -> None:
        """A node turns into something else; what runs there breaks, if it does not go on."""
        sim = self.roll.choice(list(self.sims.values()))
        sim.mode = self.roll.choice(list(Mode))
        self.say(f"{sim.spec.name} is {sim.mode.value}")
        if sim.mode in (Mode.DEAD, Mode.CUTS):
            for run in list(sim.runs):
                self._fail(run, _SENT)

    def _forget(self) -> None:
        """A model is deleted on a node, or is there again."""
        sim = self.roll.choice(list(self.sims.values()))
        sim.keys ^= {self.roll.choice(self.keys)}
        self.say(f"{sim.spec.name} has {sorted(sim.keys)}")

    def _choke(self) -> None:
        """A node has no memory for a model, or has it again."""
        sim = self.roll.choice(list(self.sims.values()))
        sim.failing ^= {self.roll.choice(self.keys)}
        self.say(f"{sim.spec.name} fails for {sorted(sim.failing)}")

    def _drain(self) -> None:
        url, draining = self.roll.choice(list(self.sims)), self.roll.random() < 0.7
        self.say(f"{url} draining {draining}: {self.pool.registry.drain(url, draining=draining)}")

    def _reload(self) -> None:
        self.pool.reconfigure(self._topology(), self.now)
        self.say(f"reload: {[one.name for one in self.pool.registry.specs()]}")
        for one in self.pool.registry.specs():
            self.at(0.01, lambda url=one.url: self._probe(url))  # type: ignore[misc]

    def _heal(self) -> None:
        """From now on all is well."""
        self.say("all is well")
        self.pool.reconfigure(topology([sim.spec for sim in self.sims.values()]), self.now)
        for url, sim in self.sims.items():
            sim.mode, sim.failing = Mode.GOOD, set()
            self.pool.registry.drain(url, draining=False)
            for after_s in (1.0, 2.0, 3.0):
                self.at(after_s, lambda url=url: self._probe(url))  # type: ignore[misc]

    # What happens to requests.

    def _come(self) -> None:
        roll = self.roll
        key = roll.choice(self.keys)
        pin = f"@{roll.choice(list(self.sims.values())).spec.name}" if roll.random() < 0.1 else ""
        target = self.pool.registry.resolve(key + pin)
        if isinstance(target, Rejected):
            return
        request = self._request(key, target)
        request.poison = roll.random() < 0.03
        if roll.random() < 0.1:
            self.at(roll.uniform(0, 10), lambda: self._leave(request))
        self._ask(request)

    def _come_well(self, key: str) -> None:
        if not any(key in sim.keys for sim in self.sims.values()):
            return
        target = self.pool.registry.resolve(key)
        assert isinstance(target, Target), target
        request = self._request(key, target)
        self._ask(request)

    def _request(self, key: str, target: Target) -> Request:
        changes = self.now < _STORM_S and self.roll.random() < 0.05
        trail = Trail(target, changes=changes)
        records = self.roll.choice([1, 2, 3, 4, 12])
        request = Request(
            len(self.requests), key, self.now, trail, records, target.pin is not None, changes
        )
        self.requests.append(request)
        return request

    def _ask(self, request: Request) -> None:
        """Try the next node, as a proxy does."""
        attempt = request.trail.attempt()
        request.turn += 1
        request.deadline = request.deadline or self.now + _BUSY_S
        pays = self._has_to_pay(attempt, request.key)
        assert agrees(self.pool, attempt, self.now)
        verdict = self.pool.submit(attempt, self.now)
        if isinstance(verdict, Rejected):
            self._rejected(request, verdict, pays=pays)
            return
        assert isinstance(verdict, Lease)
        request.attempts += 1
        assert request.attempts <= _ATTEMPTS_MAX, f"{request} goes round in circles"
        self.say(f"{request} to {verdict.node.name} {[flip.now.value for flip in verdict.flips]}")
        self._check_lease(request, verdict)
        if pays:
            self._pay()
        run = Try(request, attempt, self.sims[verdict.node.url], self.now, pays)
        request.running, request.deadline = run, 0.0
        self.running.add(run)
        run.sim.runs[run] = None
        self._serve(run)
        self._look()

    def _rejected(self, request: Request, rejected: Rejected, *, pays: bool) -> None:
        if rejected.refusal is Refusal.BUDGET:
            assert pays, "a free retry was refused"
            assert not self._can_pay(), "the budget is not spent"
        if rejected.until is not None and self.now < request.deadline:
            turn = request.turn
            self.waiting.setdefault(request.key, deque()).append(request)
            assert rejected.until > self.now
            wait_s = min(rejected.until, request.deadline) - self.now
            self.say(f"{request} waits {wait_s:.3f} s for room")
            self.at(wait_s, lambda: self._wake(request, turn))
            return
        self._end(request, rejected.refusal.value)

    def _wake(self, request: Request, turn: int) -> None:
        if request.turn == turn and not request.ended:
            self.waiting[request.key].remove(request)
            self._ask(request)

    def _serve(self, run: Try) -> None:
        """What the node makes of it."""
        refused = run.sim.refuses(run.request, self.roll)
        if refused is None:
            self.at(self._pace_s(run), lambda: self._record(run))
        else:
            self.at(refused[0], lambda: self._fail(run, refused[1]))

    def _pace_s(self, run: Try) -> float:
        return self.roll.uniform(0.1, 0.8) * (5 if run.sim.mode is Mode.SLOW else 1)

    def _record(self, run: Try) -> None:
        if run not in self.running:
            return
        request = run.request
        if run.sim.mode not in (*_GOOD, Mode.ODD):
            self._silent(run)
        elif run.sim.mode is Mode.ODD and self.roll.random() < 0.2:
            self._fail(run, _SENT)
        else:
            request.seen += 1
            run.since = self.now
            if request.seen < request.records:
                self.at(self._pace_s(run), lambda: self._record(run))
            else:
                run.sim.full.pop(request.key, None)
                self._give_back(run, Outcome())
                self._end(request, "done")

    def _silent(self, run: Try) -> None:
        """Whatever runs on a node that is neither good nor cuts its connections gets nothing."""
        if self.now - run.since < _SILENT_S:
            self.at(1.0, lambda: self._record(run))
        elif run.request.seen:
            self._fail(run, Failure(FailureKind.STALLED, sent=True, received=True))
        else:
            self._fail(run, Failure(FailureKind.FIRST_BYTE_TIMEOUT, sent=True))

    def _fail(self, run: Try, failure: Failure) -> None:
        if run not in self.running:
            return
        request, trail = run.request, run.request.trail
        if request.seen > request.told:
            request.told = request.seen
            trail.went_on()
            request.met.clear()
        outcome, excused = trail.outcome(failure), trail.excused(failure)
        if excused is not None:
            self.pool.forgive(excused.url, run.attempt.target)
        verdict = trail.failed(run.sim.spec, failure, self.rules)
        self.say(f"{request} {failure.kind.value} on {run.sim.spec.name}: {verdict.value}")
        self._met(run, failure.kind)
        self._give_back(run, outcome)
        if request.seen:
            trail.digest = f"digest of {request.key}"
        if verdict is Verdict.GIVE_UP:
            self._end(request, failure.kind.value)
        elif request.seen and request.pinned:
            self._end(request, "broke off")
        else:
            self._ask(request)

    def _met(self, run: Try, kind: FailureKind) -> None:
        sim, request = run.sim, run.request
        if kind is FailureKind.BUSY:
            sim.full.setdefault(request.key, self.now)
            return
        request.met.add(sim.spec.url)
        request.answers += kind in (FailureKind.ANSWERED, FailureKind.MISSING)
        most = self.rules.other_nodes + 1
        assert max(len(request.met), request.answers) <= most, f"{request} met {request.met}"

    def _leave(self, request: Request) -> None:
        """The client has gone."""
        if request.ended:
            return
        if request.running is not None:
            self._give_back(request.running, Outcome(told=False))
        else:
            self.waiting[request.key].remove(request)
        self._end(request, "left")

    def _give_back(self, run: Try, outcome: Outcome) -> None:
        self.running.remove(run)
        del run.sim.runs[run]
        run.request.running = None
        flips = self.pool.leave(run.attempt, outcome, self.now)
        key = run.request.key
        if (
            not outcome.told
            and key in run.sim.full
            and all(r.request.key != key for r in run.sim.runs)
        ):
            run.sim.full[key] = -inf  # whoever goes there alone and leaves has tried nothing
        for flip in flips:
            self.say(f"{flip}")
        self._look()
        first = next(iter(self.waiting.get(run.request.key, ())), None)
        if first is not None:
            turn = first.turn
            self.at(0.0, lambda: self._wake(first, turn))

    def _end(self, request: Request, how: str) -> None:
        assert not request.ended, f"{request} ended twice: {request.ended}, {how}"
        self.say(f"{request} ended: {how}")
        request.ended = how
        if how not in ("done", "left"):
            self._check_failed(request)

    # What must hold.

    def _look(self) -> None:
        """Note who is steady: good in truth, and open, listed and let by the pool."""
        self.views = {view.spec.url: view for view in self.pool.registry.snapshot()}
        for url, sim in self.sims.items():
            view = self.views.get(url)
            if view is None:
                sim.forgotten()
            for key in self.keys:
                if view and sim.good(key) and _is_open(view, key) and _calm(view, key):
                    self.steady.setdefault((url, key), self.now)
                else:
                    self.steady.pop((url, key), None)

    def _check(self) -> None:
        """The books balance, whatever happens."""
        assert self.pool.in_flight == len(self.running)
        for url, view in self.views.items():
            assert view.in_flight == len(self.sims[url].runs), f"{view.spec.name} counts wrongly"
        runs = sum(len(sim.runs) for url, sim in self.sims.items() if url in self.views)
        assert runs == len(self.running), "a lease on a node that is not known any more"
        assert self.pool._budget.running == sum(run.paid for run in self.running)
        for node in self.pool.registry.nodes.values():
            for key, replica in node.replicas.items():
                runs_here = [run for run in self.sims[node.spec.url].runs if run.request.key == key]
                assert replica.in_flight == len(runs_here)
                assert replica.breaker.state is not Ejection.TRIAL or runs_here, "a trial is lost"
            assert node.breaker.state is not Ejection.TRIAL or node.in_flight, "a trial is lost"

    def _check_lease(self, request: Request, lease: Lease) -> None:
        """Nobody is asked that is not to be."""
        view, key, sim = self.views[lease.node.url], request.key, self.sims[lease.node.url]
        assert _is_open(view, key), f"{request} was sent to {view}"
        assert view.spec.url not in request.met
        assert not _full(view, key, self.now), f"{request} was sent to {view.spec.name}, full"
        if key in sim.full:
            least_s = self.rules.back_off_s * (1 - self.rules.jitter)
            assert self.now - sim.full[key] >= least_s, f"{view.spec.name} is full"
            sim.full[key] = self.now
        if _kept_away(view, key, self.now) and not request.pinned:
            assert self._panics(key), f"{request} was sent to {view.spec.name}: {view.ejected}"

    def _panics(self, key: str) -> bool:
        there = [view for view in self.views.values() if not view.leaving and not view.draining]
        holders = [view for view in there if key in view.present]
        left = [view for view in holders if view.up and not _kept_away(view, key, self.now)]
        return len(left) < self.rules.panic_share * len(holders)

    def _has_to_pay(self, attempt: Attempt, key: str) -> bool:
        """It was answered with a failure by a node that still gets such requests."""
        view = self.views.get(attempt.answered)
        return view is not None and _is_open(view, key) and not _kept_away(view, key, self.now)

    def _can_pay(self) -> bool:
        rules = self.rules
        recent = sum(self.now - at < rules.budget_s for at in self.paid_at)
        running = sum(run.paid for run in self.running)
        return recent < rules.budget_least or running < rules.budget * len(self.running)

    def _pay(self) -> None:
        assert self._can_pay(), "more is tried again than the budget allows"
        self.paid_at.append(self.now)

    def _check_failed(self, request: Request) -> None:
        """A request may fail for one of these reasons only: it was pinned, or it changes something;
        every node fails it; it has met as many nodes in a row as it may; the budget is spent; or
        no node has been steady since it came."""
        if request.pinned or request.changes or request.poison:
            return
        if (
            max(len(request.met), request.answers) > self.rules.other_nodes
            or request.ended == Refusal.BUDGET
        ):
            return
        self._look()
        steady = [
            url
            for (url, key), since in self.steady.items()
            if key == request.key and since < request.came
        ]
        assert not steady, f"{request} failed beside {steady}"

    def _check_end(self) -> None:
        """When all is well again, nothing is left of the storm."""
        assert self.pool.in_flight == 0
        assert not any(self.waiting.values())
        assert all(request.ended for request in self.requests)
        well = [one for one in self.requests if one.came >= _STORM_S + _CALM_S]
        assert all(one.ended == "done" for one in well), "a request failed when all was well"
        for view in self.views.values():
            assert view.up
            asked = {*view.present, "" if view.present else None}
            left = [one for one in view.ejected if one.model in asked]
            assert not left, f"{view.spec.name} stays ejected: {left}"


def _is_open(view: NodeView, key: str) -> bool:
    return view.up and not view.draining and not view.leaving and key in view.present


def _full(view: NodeView, key: str, now: float) -> bool:
    return any(one.busy and one.model == key and now < one.until for one in view.ejected)


def _kept_away(view: NodeView, key: str, now: float) -> bool:
    return _full(view, key, now) or any(
        not one.busy and one.model in ("", key) and now < one.until for one in view.ejected
    )


def _calm(view: NodeView, key: str) -> bool:
    return not any(one.model in ("", key) for one in view.ejected)


def endings(seeds: Collection[int]) -> Mapping[str, int]:
    """How often requests ended in each way."""
    found: dict[str, int] = {}
    for seed in seeds:
        storm = Storm(seed)
        storm.run()
        for request in storm.requests:
            found[request.ended] = found.get(request.ended, 0) + 1
    return found


def _for_so_long(seconds: float, seed: int) -> int:
    """Storms from this seed on; returns how many there were."""
    began, first = time.monotonic(), seed
    while time.monotonic() - began < seconds:
        Storm(seed).run()
        seed += 1
    return seed - first


def main(words: Sequence[str]) -> None:
    if words[:1] == ["replay"]:
        storm = Storm(int(words[1]), kept=1_000_000)
        storm.run()
        sys.stdout.write("\n".join([*storm.story, ""]))
        return
    seconds, seed = float(words[0]), int(words[1]) if len(words) > 1 else Random().getrandbits(32)
    sys.stdout.write(f"from seed {seed}\n")
    began = time.monotonic()
    count = _for_so_long(seconds, seed)
    rate = 60 * count / (time.monotonic() - began)
    sys.stdout.write(f"{count} storms, {rate:.0f} a minute\n")


if __name__ == "__main__":
    main(sys.argv[1:])
