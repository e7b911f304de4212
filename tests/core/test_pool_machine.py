"""The pool against a model of it, whatever happens in whatever order."""

from collections.abc import Iterator
from dataclasses import dataclass, field

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

from router.core.names import parse, split_pin
from router.core.node import TRANSITIONS
from router.core.policy import Target
from router.core.pool import Attempt, Lease, Pool
from router.core.types import (
    Failure,
    FailureKind,
    Flip,
    Health,
    NodeSpec,
    NodeView,
    Observation,
    Outcome,
    PoolSpec,
    Reason,
    Refusal,
    Rejected,
    Sign,
    Topology,
)
from tests.core.build import felt, models, seen, spec

URLS = [f"http://10.0.0.{i}:11434" for i in range(1, 6)]
NAMES = ["ada", "bob", "cyd", "dan", "eve", "fay"]
KEYS = ["a:latest", "b:latest", "c:latest"]
GLOBS: list[tuple[str, ...]] = [(), (), (), (), ("a*",), ("!a*",)]
Given = MultipleResults[Attempt] | Attempt
TEXTS = ["a", "B", "c:latest", "d"]


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
        up_after=draw(st.integers(1, 3)),
        down_after=draw(st.integers(1, 3)),
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
    version: str = ""
    in_flight: int = 0

    @property
    def up(self) -> bool:
        return self.health is Health.UP

    @property
    def present(self) -> list[str]:
        return [key for key in self.listed if may_use(self.spec, key)]

    @property
    def load(self) -> float:
        return self.in_flight / self.spec.slots / self.spec.weight

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
        revision = self.pool.revision
        self.pool.reconfigure(topology, self.tick())
        self.expect(topology)
        assert self.pool.revision > revision
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
        flip = self.pool.observe(url, looked, self.tick())
        if url not in self.configured:
            assert flip is None
            return
        node = self.known[url]
        if looked.present is not None:
            node.listed = list(looked.present)
        node.version = looked.version or node.version
        self.check_flip(flip, node, looked.sign, looked.detail)

    @rule(keys=st.sampled_from([KEYS, KEYS[:1]]))
    def probe_round(self, keys: list[str]) -> None:
        """Every node answers as often as it takes to be up."""
        for url in self.configured * 3:
            self.look(url, seen(*keys, resident=keys[:1]))

    def check_flip(self, flip: Flip | None, node: Expected, sign: Sign | None, detail: str) -> None:
        was = node.health
        flipped = sign is not None and node.feel(sign, self.topology, self.now)
        assert flip == (Flip(node.spec.name, was, node.health, detail) if flipped else None)

    @rule(
        target=leased,
        text=st.sampled_from([*TEXTS, None]),
        pin=st.sampled_from([None, None, None, *NAMES, *URLS, "10.0.0.9", "x:y"]),
        tried=st.sets(st.sampled_from(URLS), max_size=3),
    )
    def submit(self, text: str | None, pin: str | None, tried: set[str]) -> Given:
        target = Target()
        if text is not None:
            left, found = split_pin(f"{text}@{pin}" if pin else text)
            target = Target(parse(left), found, left)
        return self.give(Attempt(target, frozenset(tried)))

    def give(self, attempt: Attempt) -> Given:
        allowed = self.allowed(attempt)
        verdict = self.pool.submit(attempt)
        if isinstance(verdict, Rejected):
            assert not allowed
            self.check_refusal(verdict, attempt)
            assert self.pool.leave(attempt, Outcome(), self.now) is None
            return multiple()
        self.check_lease(verdict, attempt, allowed)
        self.held[attempt] = verdict.node.url
        self.known[verdict.node.url].in_flight += 1
        return attempt

    def allowed(self, attempt: Attempt) -> list[Expected]:
        """The nodes of which one must be chosen."""
        target = attempt.target
        usable = [
            node
            for node in self.nodes()
            if node.up and node.serves(target) and node.spec.url not in attempt.tried
        ]
        if target.pin is not None:
            return [node for node in usable if target.pin.text in (node.spec.name, node.spec.url)]
        return [node for node in usable if node.pool == usable[0].pool]

    def check_lease(self, lease: Lease, attempt: Attempt, allowed: list[Expected]) -> None:
        chosen = self.known[lease.node.url]
        assert chosen in allowed
        assert lease.node == chosen.spec
        assert lease.attempt is attempt
        assert chosen.load == min(node.load for node in allowed)
        if attempt.target.pin is not None:
            assert lease.reason is Reason.PINNED
        elif chosen.pool != self.topology.pools[0].name:
            assert lease.reason is Reason.LATER_POOL
        else:
            several = len(allowed) > 1
            assert lease.reason is (Reason.LEAST_IN_FLIGHT if several else Reason.ONLY)

    def check_refusal(self, rejected: Rejected, attempt: Attempt) -> None:
        target = attempt.target
        assert all(spec in self.pool.specs() for spec in rejected.nodes)
        holders = [node for node in self.nodes() if node.serves(target)]
        if target.pin is not None:
            assert rejected.refusal in {
                Refusal.BAD_NAME, Refusal.UNKNOWN_PIN, Refusal.PIN_DOWN, Refusal.NOT_ON_PIN,
            }  # fmt: skip
        elif any(node.up for node in holders):
            assert rejected.refusal is Refusal.ALL_TRIED
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
        kind=st.sampled_from([None, *FailureKind]),
    )
    def leave(self, attempt: Attempt, kind: FailureKind | None) -> Attempt:
        failure = None if kind is None else Failure(kind, detail="failed")
        flip = self.pool.leave(attempt, Outcome(failure), self.tick())
        node = self.known[self.held.pop(attempt)]
        node.in_flight -= 1
        if not node.in_flight and node.spec.url not in self.configured:
            del self.known[node.spec.url]
        self.check_flip(flip, node, Sign.REFUSED if kind is FailureKind.REFUSED else None, "failed")
        return attempt

    @rule(attempt=ended, kind=st.sampled_from([None, FailureKind.REFUSED]))
    def leave_again(self, attempt: Attempt, kind: FailureKind | None) -> None:
        before = (self.pool.snapshot(), self.pool.revision, self.pool.in_flight)
        outcome = Outcome(None if kind is None else Failure(kind))
        assert self.pool.leave(attempt, outcome, self.tick()) is None
        assert (self.pool.snapshot(), self.pool.revision, self.pool.in_flight) == before

    @precondition(lambda self: len(self.held) > 5)
    @rule()
    def remove_all(self) -> None:
        """Every node goes while it has leases."""
        self.pool.reconfigure(Topology(()), self.tick())
        self.expect(Topology(()))

    # What always holds.

    @invariant()
    def books_balance(self) -> None:
        views = self.pool.snapshot()
        assert all(view.in_flight >= 0 for view in views)
        assert sum(view.in_flight for view in views) == self.pool.in_flight == len(self.held)
        on = list(self.held.values())
        assert {view.spec.url: view.in_flight for view in views} == {
            url: on.count(url) for url in self.known
        }

    @invariant()
    def what_is_known_is_what_was_told(self) -> None:
        views = self.pool.snapshot()
        assert [view.spec for view in views] == [node.spec for node in self.known.values()]
        for view, node in zip(views, self.known.values(), strict=True):
            assert (view.pool, view.health, view.since) == (node.pool, node.health, node.since)
            assert view.version == node.version
            assert view.present == models(node.present)
            assert view.resident == models(
                key for key in node.listed[:1] if may_use(node.spec, key)
            )

    @invariant()
    def who_leaves_has_leases_and_no_configuration(self) -> None:
        for view in self.pool.snapshot():
            assert view.leaving is (view.spec.url not in self.configured)
            assert not view.leaving or view.in_flight > 0

    @invariant()
    def the_short_answers_agree_with_the_long_one(self) -> None:
        stay = [view for view in self.pool.snapshot() if not view.leaving]
        assert list(self.pool.specs()) == [view.spec for view in stay]
        assert self.pool.any_up is any(view.up for view in stay)
        assert self.pool.probed is all(view.health is not Health.UNKNOWN for view in stay)
        for view in stay:
            assert self.pool.suspect(view.spec.url) is view.suspect
        for key in KEYS:
            assert self.pool.knows(key) is any(key in view.present for view in stay)

    def teardown(self) -> None:
        """When everybody has left, nothing is left."""
        if "pool" not in self.__dict__:
            return
        for attempt in list(self.held):
            self.pool.leave(attempt, Outcome(), self.tick())
        assert self.pool.in_flight == 0
        views: list[NodeView] = list(self.pool.snapshot())
        assert [view.spec.url for view in views] == self.configured
        assert all(view.in_flight == 0 for view in views)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=40)


def test_the_machine_knows_every_transition() -> None:
    """The model above is no copy of the table: both must say the same of a single sign."""
    for (health, sign), (after, _) in TRANSITIONS.items():
        node = Expected(spec("n"), "default", 0.0, health=health)
        node.feel(sign, Topology((), up_after=1, down_after=1), now=1.0)
        assert node.health is after
