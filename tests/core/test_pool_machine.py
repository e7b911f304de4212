"""The pool against a model of it, whatever happens in whatever order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from router.core.lease import Lease
from router.core.names import parse, split_pin
from router.core.node import TRANSITIONS
from router.core.policy import Attempt, Target
from router.core.pool import Pool
from router.core.types import (
    Ejected,
    Ejection,
    Failure,
    FailureKind,
    Flip,
    Health,
    NodeSpec,
    NodeView,
    Observation,
    Outcome,
    Policy,
    PoolSpec,
    Reason,
    Refusal,
    Rejected,
    Resilience,
    Sign,
    Topology,
)
from tests.core.build import felt, models, seen, spec

URLS = [f"http://10.0.0.{i}:11434" for i in range(1, 6)]
NAMES = ["ada", "bob", "cyd", "dan", "eve", "fay"]
KEYS = ["a:latest", "b:latest", "c:latest"]
GLOBS: list[tuple[str, ...]] = [(), (), (), (), ("a*",), ("!a*",)]
RULES = Resilience(resets=2, answers=2)
CLOSED, TRIAL = Ejection.CLOSED, Ejection.TRIAL
Given = MultipleResults[Attempt] | Attempt
BAD = [FailureKind.RESET, FailureKind.ANSWERED, FailureKind.BUSY]
TEXTS = ["a", "B", "c:latest", "d"]


def key_of(attempt: Attempt) -> str:
    model = attempt.target.model
    return "" if model is None else model.key


def may_use(spec: NodeSpec, key: str) -> bool:
    """The few globs of this file, read without the code under test."""
    starts_with_a = key.startswith("a")
    return {(): True, ("a*",): starts_with_a, ("!a*",): not starts_with_a}[spec.models]


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    urls = draw(st.permutations(URLS))[draw(st.sampled_from([0, 0, 0, 1, 2, 3, 5])) :]
    names = draw(st.permutations(NAMES))
    pools: list[list[NodeSpec]] = [[] for _ in range(draw(st.sampled_from([1, 1, 2, 3])))]
    for url, name in zip(urls, names, strict=False):
        draw(st.sampled_from(pools)).append(
            spec(
                name,
                url,
                slots=draw(st.integers(1, 3)),
                weight=draw(st.sampled_from([0.5, 1.0, 2.0])),
                models=draw(st.sampled_from(GLOBS)),
            )
        )
    return Topology(
        tuple(PoolSpec(f"pool-{i}", tuple(nodes)) for i, nodes in enumerate(pools)),
        policy=Policy.LEAST_IN_FLIGHT,
        up_after=draw(st.integers(1, 3)),
        down_after=draw(st.integers(1, 3)),
        resilience=RULES,
    )


@dataclass
class Expected:
    """What is to be known of one server, by its url."""

    spec: NodeSpec
    pool: str
    since: float
    health: Health = Health.UNKNOWN
    streak: list[Sign] = field(default_factory=list)
    listed: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    version: str = ""
    in_flight: int = 0
    draining: bool = False
    full_at: float = 0.0
    # of the node itself, and of models on it: what was told, and what the operator is shown
    ejection: dict[str, Ejection] = field(default_factory=dict)
    shown: Sequence[Ejected] = ()

    @property
    def up(self) -> bool:
        return self.health is Health.UP

    @property
    def open(self) -> bool:
        return self.up and not self.draining

    @property
    def present(self) -> list[str]:
        return [key for key in self.listed if may_use(self.spec, key)]

    def load(self, now: float) -> float:
        size = float(self.spec.slots)
        if now < self.full_at:
            size = max(1.0, size * (1 - (self.full_at - now) / RULES.slow_start_s))
        return self.in_flight / size / self.spec.weight

    def full(self, key: str, now: float) -> bool:
        return any(one.busy and one.model == key and now < one.until for one in self.shown)

    def keeps_away(self, key: str, now: float) -> bool:
        """Whether the operator was shown a reason not to ask it for this model now."""
        return self.full(key, now) or any(
            not one.busy and one.model in ("", key) and now < one.until for one in self.shown
        )

    def flipped(self, flips: Sequence[Flip], now: float) -> None:
        """Take what was told of breakers: each change once, none left out."""
        for flip in flips:
            if isinstance(flip.now, Ejection):
                assert flip.node == self.spec.name
                assert flip.was is self.ejection.pop(flip.model, CLOSED)
                assert flip.was is not flip.now
                if flip.now is not CLOSED:
                    self.ejection[flip.model] = flip.now
                elif not flip.model:
                    self.full_at = now + RULES.slow_start_s

    def serves(self, target: Target) -> bool:
        return target.model is None or target.model.key in self.present

    def feel(self, sign: Sign, topology: Topology, now: float) -> bool:
        """Whether it flips: told from the last signs alone, without a counter."""
        self.streak.append(sign)
        if self.health is Health.UNKNOWN:
            after, needed = (Health.UP if sign is Sign.GOOD else Health.DOWN), 1
        elif sign is Sign.REFUSED:
            after, needed = Health.DOWN, 1
        elif sign is Sign.GOOD:
            after, needed = Health.UP, topology.up_after
        else:
            after, needed = Health.DOWN, topology.down_after
        last = self.streak[-needed:]
        if after is self.health or len(last) < needed or set(last) != {sign}:
            return False
        if self.health is Health.DOWN:
            self.full_at = now + RULES.slow_start_s
        self.health, self.since, self.streak = after, now, []
        return True


class PoolMachine(RuleBasedStateMachine):
    """`known` holds configured servers in their order and, behind them, those that leave."""

    leased: Bundle[Attempt] = Bundle("leased")
    ended: Bundle[Attempt] = Bundle("ended")

    @initialize(topology=topologies(), probed=st.booleans())
    def start(self, topology: Topology, probed: bool) -> None:
        self.now = 0.0
        self.known: dict[str, Expected] = {}
        self.held: dict[Attempt, str] = {}
        self.paid: set[Attempt] = set()
        self.paid_at: list[float] = []
        self.pool = Pool(topology, self.now)
        self.expect(topology)
        if probed:
            self.probe_round(KEYS)

    def tick(self) -> float:
        self.now += 1.0
        return self.now

    def expect(self, topology: Topology) -> None:
        self.topology = topology
        before, self.known = self.known, {}
        for pool in topology.pools:
            for new in pool.nodes:
                kept = before.pop(new.url, None) or Expected(new, pool.name, self.now)
                kept.spec, kept.pool = new, pool.name
                self.known[new.url] = kept
        self.configured = list(self.known)
        self.known |= {url: node for url, node in before.items() if node.in_flight}

    def nodes(self) -> Iterator[Expected]:
        return (self.known[url] for url in self.configured)

    # What happens.

    @rule(topology=topologies(), probed=st.booleans())
    def reconfigure(self, topology: Topology, probed: bool) -> None:
        revision = self.pool.registry.revision
        self.pool.reconfigure(topology, self.tick())
        self.expect(topology)
        assert self.pool.registry.revision > revision
        if probed:
            self.probe_round(KEYS)

    @rule(
        url=st.sampled_from(URLS),
        sign=st.sampled_from([Sign.GOOD, *Sign, None]),
        keys=st.none() | st.lists(st.sampled_from(KEYS), unique=True),
        version=st.sampled_from([None, "0.5.0", "0.9.0"]),
    )
    def observe(
        self, url: str, sign: Sign | None, keys: list[str] | None, version: str | None
    ) -> None:
        looked = felt(sign, "looked")
        if keys is not None:
            looked = seen(*keys, sign=sign, resident=keys[:1], version=version, detail="looked")
        self.look(url, looked)

    def look(self, url: str, looked: Observation) -> None:
        flips = self.pool.observe(url, looked, self.tick())
        if url not in self.configured:
            assert not flips
            return
        node = self.known[url]
        if looked.present is not None:
            node.listed = list(looked.present)
            node.loaded = node.listed[:1]
        node.version = looked.version or node.version
        self.check_flips(flips, node, looked.sign, looked.detail)

    @rule(keys=st.sampled_from([KEYS, KEYS[:1]]))
    def probe_round(self, keys: list[str]) -> None:
        """Every node answers as often as it takes to be up."""
        for url in self.configured * 3:
            self.look(url, seen(*keys, resident=keys[:1]))

    def check_flips(
        self, flips: Sequence[Flip], node: Expected, sign: Sign | None, detail: str
    ) -> None:
        was = node.health
        flipped = sign is not None and node.feel(sign, self.topology, self.now)
        expected = [Flip(node.spec.name, was, node.health, detail)] if flipped else []
        assert [flip for flip in flips if isinstance(flip.now, Health)] == expected
        node.flipped(flips, self.now)

    @rule(url=st.sampled_from(URLS), draining=st.booleans())
    def drain(self, url: str, draining: bool) -> None:
        told = self.pool.registry.drain(url, draining=draining)
        if url not in self.configured:
            assert isinstance(told, Rejected)
            return
        node = self.known[url]
        assert told == node.spec
        node.draining = draining

    @rule(seconds=st.sampled_from([1.0, 5.0, 40.0, 200.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(
        target=leased,
        text=st.sampled_from([*TEXTS, None]),
        pin=st.sampled_from([None, None, None, *NAMES, *URLS, "10.0.0.9", "x:y"]),
        tried=st.sets(st.sampled_from(URLS), max_size=3),
        answered=st.sampled_from(["", "", *URLS]),
    )
    def submit(self, text: str | None, pin: str | None, tried: set[str], answered: str) -> Given:
        target = Target()
        if text is not None:
            left, found = split_pin(f"{text}@{pin}" if pin else text)
            target = Target(parse(left), found, left)
        return self.give(Attempt(target, frozenset(tried), "", answered))

    def give(self, attempt: Attempt) -> Given:
        allowed, paid = self.allowed(attempt), self.has_to_pay(attempt)
        verdict = self.pool.submit(attempt, self.now)
        if isinstance(verdict, Rejected):
            if verdict.refusal is Refusal.BUDGET:
                assert paid
                assert not self.can_pay()
            else:
                assert not allowed
                self.check_refusal(verdict, attempt)
            assert not self.pool.leave(attempt, Outcome(), self.now)
            return multiple()
        assert isinstance(verdict, Lease)
        self.check_lease(verdict, attempt, allowed)
        if paid:
            assert self.can_pay()
            self.paid.add(attempt)
            self.paid_at.append(self.now)
        self.held[attempt] = verdict.node.url
        node = self.known[verdict.node.url]
        node.in_flight += 1
        node.flipped(verdict.flips, self.now)
        self.look_at_ejected()
        return attempt

    def has_to_pay(self, attempt: Attempt) -> bool:
        """It was answered by a node that still gets such requests."""
        if attempt.answered not in self.configured:
            return False
        node = self.known[attempt.answered]
        return (
            node.open
            and node.serves(attempt.target)
            and not node.keeps_away(key_of(attempt), self.now)
        )

    def can_pay(self) -> bool:
        recent = sum(self.now - at < RULES.budget_s for at in self.paid_at)
        return recent < RULES.budget_least or len(self.paid) < RULES.budget * len(self.held)

    def allowed(self, attempt: Attempt) -> list[Expected]:
        """The nodes of which one must be chosen."""
        target, key = attempt.target, key_of(attempt)
        usable = [
            node
            for node in self.nodes()
            if node.open
            and node.serves(target)
            and node.spec.url not in attempt.tried
            and not node.full(key, self.now)
        ]
        if target.pin is not None:
            return [node for node in usable if target.pin.text in (node.spec.name, node.spec.url)]
        if not self.panics(attempt):
            usable = [node for node in usable if not node.keeps_away(key, self.now)]
        return [node for node in usable if node.pool == usable[0].pool]

    def panics(self, attempt: Attempt) -> bool:
        key, target = key_of(attempt), attempt.target
        holders = [node for node in self.nodes() if node.serves(target) and not node.draining]
        left = [node for node in holders if node.up and not node.keeps_away(key, self.now)]
        return len(left) < RULES.panic_share * len(holders)

    def check_lease(self, lease: Lease, attempt: Attempt, allowed: list[Expected]) -> None:
        chosen = self.known[lease.node.url]
        assert chosen in allowed
        assert lease.node == chosen.spec
        assert lease.attempt is attempt
        least = min(node.load(self.now) for node in allowed)
        assert chosen.load(self.now) == pytest.approx(least)
        if attempt.target.pin is not None:
            assert lease.reason is Reason.PINNED
        elif chosen.pool != self.topology.pools[0].name:
            assert lease.reason is Reason.LATER_POOL
        else:
            several = len(allowed) > 1
            assert lease.reason is (Reason.LEAST_IN_FLIGHT if several else Reason.ONLY)

    def check_refusal(self, rejected: Rejected, attempt: Attempt) -> None:
        target = attempt.target
        assert all(spec in self.pool.registry.specs() for spec in rejected.nodes)
        holders = [node for node in self.nodes() if node.serves(target)]
        if target.pin is not None:
            assert rejected.refusal in {
                Refusal.BAD_NAME, Refusal.UNKNOWN_PIN, Refusal.PIN_DOWN, Refusal.NOT_ON_PIN,
                Refusal.DRAINED, Refusal.BUSY,
            }  # fmt: skip
        elif any(node.open for node in holders):
            full = [
                node
                for node in holders
                if node.open
                and node.spec.url not in attempt.tried
                and node.full(key_of(attempt), self.now)
            ]
            assert rejected.refusal is (Refusal.BUSY if full else Refusal.ALL_TRIED)
            assert rejected.until is None or rejected.until > self.now
            assert (rejected.until is not None) is bool(full)
        elif any(node.up for node in holders):
            assert rejected.refusal is Refusal.DRAINED
        elif holders or not any(node.up for node in self.nodes()):
            assert rejected.refusal is Refusal.NODES_DOWN
        else:
            assert rejected.refusal is Refusal.NO_MODEL

    @rule(target=leased, text=st.sampled_from(TEXTS), size=st.integers(2, 12))
    def burst(self, text: str, size: int) -> Given:
        """Equal requests at once: each must go to the least loaded of that very moment."""
        attempts = [Attempt(Target(parse(text), None, text)) for _ in range(size)]
        return multiple(*(one for one in attempts if self.give(one) is one))

    @rule(
        target=ended,
        attempt=consumes(leased),
        kind=st.sampled_from([None, None, None, *FailureKind]),
        told=st.sampled_from([True, True, True, False]),
    )
    def leave(self, attempt: Attempt, kind: FailureKind | None, told: bool) -> Attempt:
        self.end(attempt, kind, told=told)
        return attempt

    def end(self, attempt: Attempt, kind: FailureKind | None, *, told: bool) -> None:
        failure = None if kind is None else Failure(kind, detail="failed")
        flips = self.pool.leave(attempt, Outcome(failure, told or kind is not None), self.tick())
        node = self.known[self.held.pop(attempt)]
        self.paid.discard(attempt)
        node.in_flight -= 1
        if not node.in_flight and node.spec.url not in self.configured:
            del self.known[node.spec.url]
        sign = Sign.REFUSED if kind is FailureKind.REFUSED else None
        self.check_flips(flips, node, sign, "failed")

    @rule(target=ended, attempts=st.lists(consumes(leased), max_size=6), kind=st.sampled_from(BAD))
    def fail_in_a_row(self, attempts: list[Attempt], kind: FailureKind) -> Given:
        for attempt in attempts:
            self.end(attempt, kind, told=True)
        return multiple(*attempts)

    def shown(self) -> object:
        registry = self.pool.registry
        return registry.snapshot(), registry.revision, self.pool.in_flight

    @rule(attempt=ended, kind=st.sampled_from([None, FailureKind.REFUSED]))
    def leave_again(self, attempt: Attempt, kind: FailureKind | None) -> None:
        before = self.shown()
        outcome = Outcome(None if kind is None else Failure(kind))
        assert not self.pool.leave(attempt, outcome, self.tick())
        assert self.shown() == before

    @rule(url=st.sampled_from(URLS), key=st.sampled_from(KEYS))
    def forgive(self, url: str, key: str) -> None:
        """Nobody is shut out or let in for it."""
        before = self.shown()
        self.pool.forgive(url, Target(parse(key), None, key))
        assert self.shown() == before

    @precondition(lambda self: len(self.held) > 5)
    @rule()
    def remove_all(self) -> None:
        """Every node goes while it has leases."""
        self.pool.reconfigure(Topology(()), self.tick())
        self.expect(Topology(()))

    # What always holds.

    @invariant()
    def look_at_ejected(self) -> None:
        """What the operator is shown is what was told, flip by flip; and no trial is forgotten."""
        for view in self.pool.registry.snapshot():
            node = self.known[view.spec.url]
            node.shown = view.ejected
            shown = {one.model: one.trial for one in view.ejected if not one.busy}
            assert shown == {model: now is TRIAL for model, now in node.ejection.items()}
            for model, state in node.ejection.items():
                on = [key_of(one) for one, url in self.held.items() if url == view.spec.url]
                assert state is not TRIAL or (model in on if model else on)

    @invariant()
    def nodes_and_their_models_count_the_same(self) -> None:
        for node in [*self.pool.registry.nodes.values(), *self.pool.registry.leaving]:
            url = node.spec.url
            on = [key_of(attempt) for attempt, where in self.held.items() if where == url]
            counts = {key: one.in_flight for key, one in node.replicas.items() if one.in_flight}
            assert counts == {key: on.count(key) for key in set(on)}

    @invariant()
    def the_budget_counts_what_runs(self) -> None:
        assert self.pool._budget.running == len(self.paid)

    @invariant()
    def books_balance(self) -> None:
        views = self.pool.registry.snapshot()
        assert all(view.in_flight >= 0 for view in views)
        assert sum(view.in_flight for view in views) == self.pool.in_flight == len(self.held)
        on = list(self.held.values())
        assert {view.spec.url: view.in_flight for view in views} == {
            url: on.count(url) for url in self.known
        }

    @invariant()
    def what_is_known_is_what_was_told(self) -> None:
        views = self.pool.registry.snapshot()
        assert [view.spec for view in views] == [node.spec for node in self.known.values()]
        for view, node in zip(views, self.known.values(), strict=True):
            assert (view.pool, view.health, view.since) == (node.pool, node.health, node.since)
            assert view.version == node.version
            assert view.present == models(node.present)
            assert view.resident == models(key for key in node.loaded if may_use(node.spec, key))

    @invariant()
    def who_leaves_has_leases_and_no_configuration(self) -> None:
        for view in self.pool.registry.snapshot():
            assert view.leaving is (view.spec.url not in self.configured)
            assert not view.leaving or view.in_flight > 0

    @invariant()
    def the_short_answers_agree_with_the_long_one(self) -> None:
        stay = [view for view in self.pool.registry.snapshot() if not view.leaving]
        assert list(self.pool.registry.specs()) == [view.spec for view in stay]
        assert self.pool.registry.any_up is any(view.up for view in stay)
        assert self.pool.registry.probed is all(view.health is not Health.UNKNOWN for view in stay)
        for view in stay:
            assert self.pool.registry.suspect(view.spec.url) is view.suspect
        for key in KEYS:
            assert self.pool.registry.knows(key) is any(key in view.present for view in stay)

    def teardown(self) -> None:
        """When everybody has left, nothing is left."""
        if "pool" not in self.__dict__:
            return
        for attempt in list(self.held):
            self.pool.leave(attempt, Outcome(), self.tick())
        assert self.pool.in_flight == 0
        views: list[NodeView] = list(self.pool.registry.snapshot())
        assert [view.spec.url for view in views] == self.configured
        assert all(view.in_flight == 0 for view in views)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=100, stateful_step_count=40)


def test_the_machine_knows_every_transition() -> None:
    """The model above is no copy of the table: both must say the same of a single sign."""
    for (health, sign), (after, _) in TRANSITIONS.items():
        node = Expected(spec("n"), "default", 0.0, health=health)
        node.feel(sign, Topology((), up_after=1, down_after=1), now=1.0)
        assert node.health is after
