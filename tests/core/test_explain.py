"""What a pool says of a request that nobody has sent, and that it would do just that."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core import policy
from router.core.bounds import Bounds
from router.core.lease import Lease, Queued
from router.core.names import Pin, parse
from router.core.policy import Attempt, Target
from router.core.pool import Pool
from router.core.types import (
    Failure,
    FailureKind,
    Model,
    NodeSpec,
    Observation,
    Outcome,
    Policy,
    Reason,
    Refusal,
    Rejected,
    Resilience,
    Sign,
    Topology,
    Weighed,
)
from router.core.work import NO_WORK, Priority, Work
from tests.core.build import ground, node, ready, seen, spec, topology

GB = 1_000_000_000
ANSWERED = Outcome(Failure(FailureKind.ANSWERED, status=500))
BUSY = Outcome(Failure(FailureKind.BUSY, status=503))


def scheduled(*nodes: NodeSpec) -> Topology:
    return replace(topology(nodes), policy=Policy.EXPECTED_DELAY)


def sized(**sizes: int) -> Mapping[str, Model]:
    """Models by their size in GB."""
    return {
        f"{name}:latest": Model(
            f"{name}:latest", name, {"size": gb * GB, "size_vram": gb * GB, "context_length": 4096}
        )
        for name, gb in sizes.items()
    }


def pool_of(listed: Mapping[str, Mapping[str, Model]], resident: Mapping[str, str]) -> Pool:
    """A pool of nodes of 24 GB that decides by expected delay: what they have, and hold."""
    gpus = (24 * GB,)
    specs = [replace(spec(name), gpus=gpus) for name in listed]
    pool = Pool(scheduled(*specs), 0.0)
    for one in specs:
        present = listed[one.name]
        held = {key: present[key] for key in resident.get(one.name, "").split()}
        pool.observe(one.url, Observation(Sign.GOOD, present=present, resident=held), 0.0)
    return pool


def target(pool: Pool, text: str) -> Target:
    found = pool.registry.resolve(text)
    assert isinstance(found, Target), found
    return found


def explain(pool: Pool, text: str, work: Work = NO_WORK, now: float = 0.0) -> list[Weighed]:
    return [*pool.explain(target(pool, text), work, now)]


def submit(pool: Pool, text: str, work: Work = NO_WORK, now: float = 0.0) -> Attempt:
    """Have a request lease a node, or wait."""
    attempt = Attempt(target(pool, text), work=work)
    assert not isinstance(pool.submit(attempt, now), Rejected)
    return attempt


def shown(found: list[Weighed]) -> list[str]:
    """Each node in one word or some: the reason, or what bars it; and when."""
    when = {(True, True): "now", (True, False): "now", (False, True): "later"}
    return [
        f"{one.node.name} {one.reason or one.barred}: {when.get((one.now, one.later), 'never')}"
        for one in found
    ]


# What bars a node.


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (Target(parse("a")), ""),
        (Target(), ""),
        (Target(parse("b")), "does not have the model"),
        (Target(parse("x:cloud")), ""),
        (Target(parse("a"), Pin("one")), ""),
        (Target(parse("a"), Pin("two")), "another node is pinned"),
        (Target(parse("a"), bounds=Bounds(frozenset())), "placement, path or marks leave it out"),
        (Target(parse("a"), bounds=Bounds(frozenset(["http://one:11434"]))), ""),
        (
            Target(parse("a"), bounds=Bounds(*[frozenset(["http://one:11434"])] * 3)),
            "its version 0.5.0 is too old",
        ),
    ],
)
def test_what_keeps_a_request_from_a_node(asked: Target, why: str) -> None:
    one = node(spec("one"), "a:latest")
    one.learn(seen("a:latest", version="0.5.0"))
    assert policy.why_not(one, asked, 0.0) == why


def test_a_node_that_is_down_is_so_whatever_else_it_is() -> None:
    one = node(spec("one"), up=False)
    one.detail = "connection refused"
    one.drain(draining=True)
    assert policy.why_not(one, Target(parse("a")), 0.0) == "down: connection refused"


def test_a_drained_node_is_so_before_it_is_without_the_model() -> None:
    one = node(spec("one"))
    one.drain(draining=True)
    assert policy.why_not(one, Target(parse("a")), 0.0) == "drained"


@pytest.mark.parametrize(("outcome", "why"), [(BUSY, "busy"), (ANSWERED, "ejected")])
def test_what_traffic_has_shown_keeps_away_for_a_time(outcome: Outcome, why: str) -> None:
    one, rules = node(spec("one"), "a:latest", "b:latest"), ground(Resilience(answers=1))
    one.lease("a:latest", rules, 0.0)
    one.leave("a:latest", 1, outcome, rules, 0.0)
    assert policy.why_not(one, Target(parse("a")), 0.1) == why
    assert policy.why_not(one, Target(parse("a")), 1000.0) == ""


# Least in flight.


def test_the_least_in_flight_comes_first_and_the_rest_in_the_order_they_would_be_picked() -> None:
    pool = ready(
        topology([spec("one"), spec("two"), spec("big", slots=4)], [spec("far")]),
        {"one": ["a:latest"], "two": ["a:latest"], "big": ["a:latest"], "far": ["a:latest"]},
    )
    said = "least-in-flight: now"
    far = "far others go before it: never"
    assert shown(explain(pool, "a")) == [f"one {said}", f"two {said}", f"big {said}", far]
    for _ in range(4):
        submit(pool, "a")
    assert shown(explain(pool, "a")) == [f"big {said}", f"one {said}", f"two {said}", far]
    assert all(one.total_s is None for one in explain(pool, "a"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", ["one only-node: now", "two does not have the model: never"]),
        ("b@two", ["two pinned: now", "one another node is pinned: never"]),
        ("c", ["one does not have the model: never", "two does not have the model: never"]),
    ],
)
def test_the_reason_is_that_of_a_decision(text: str, expected: list[str]) -> None:
    pool = ready(topology([spec("one"), spec("two")]), {"one": ["a:latest"], "two": ["b:latest"]})
    assert shown(explain(pool, text)) == expected


def test_a_node_that_is_busy_for_now_may_be_waited_for() -> None:
    pool = ready(topology([spec("one")]), {"one": ["a:latest"]})
    pool.leave(submit(pool, "a"), BUSY, 0.0)
    assert shown(explain(pool, "a", now=0.1)) == ["one busy: later"]


# Expected delay.

SMALL = sized(a=4, b=4)


def test_where_the_model_is_warm_comes_before_where_it_has_to_be_loaded() -> None:
    pool = pool_of({"cold": SMALL, "warm": SMALL, "bare": {}}, {"warm": "a:latest"})
    found = explain(pool, "a", Work(prompt_tokens=1000))
    assert shown(found) == [
        "warm warm: now", "cold load: now", "bare does not have the model: never"
    ]  # fmt: skip
    warm, cold, bare = found
    assert (warm.wait_s, warm.load_s) == (0.0, 0.0)
    assert cold.load_s is not None
    assert cold.load_s > 0
    assert None not in (warm.answer_s, cold.answer_s)
    assert bare.total_s is None


def test_another_context_is_a_load() -> None:
    pool = pool_of({"one": SMALL}, {"one": "a:latest"})
    assert shown(explain(pool, "a", Work(num_ctx=4096))) == ["one warm: now"]
    assert shown(explain(pool, "a", Work(num_ctx=8192))) == ["one load: now"]


def test_the_beginning_of_a_prompt_that_is_known_is_said() -> None:
    pool, work = (
        pool_of({"one": SMALL}, {"one": "a:latest"}),
        Work(prompt_tokens=900, blocks=(1, 2)),
    )
    attempt = submit(pool, "a", work)
    pool.began(attempt, 1.0)
    pool.leave(attempt, Outcome(), 2.0)
    assert shown(explain(pool, "a", work, 2.0)) == ["one cached: now"]
    assert shown(explain(pool, "a", Work(prompt_tokens=900), 2.0)) == ["one warm: now"]


def test_a_full_node_is_waited_for_and_longer_behind_others() -> None:
    pool = pool_of({"one": SMALL}, {"one": "a:latest"})
    submit(pool, "a")
    waits = [explain(pool, "a")[0].wait_s or 0.0]
    for _ in range(3):
        submit(pool, "a")
        found = explain(pool, "a")
        assert shown(found) == ["one warm: later"]
        waits.append(found[0].wait_s or 0.0)
    assert waits == sorted(set(waits))
    assert waits[0] > 0


def test_who_is_urgent_waits_behind_none_that_is_not() -> None:
    pool = pool_of({"one": SMALL}, {"one": "a:latest"})
    submit(pool, "a")
    alone = explain(pool, "a")
    for _ in range(3):
        submit(pool, "a")
    assert explain(pool, "a", Work(priority=Priority.INTERACTIVE)) == alone


def test_a_node_without_room_for_the_model_may_be_waited_for() -> None:
    large = sized(a=20, b=20)
    pool = pool_of({"one": large}, {"one": "b:latest"})
    pool.began(submit(pool, "b"), 0.0)
    assert shown(explain(pool, "a")) == ["one no room for the model: later"]
    submit(pool, "a")  # one that waits in vain is passed over
    assert shown(explain(pool, "a")) == ["one no room for the model: later"]


def test_a_flow_that_has_its_share_waits_though_there_is_a_slot() -> None:
    specs = [replace(spec("one", slots=4), gpus=(24 * GB,))]
    pool = Pool(scheduled(*specs), 0.0)
    here = Observation(Sign.GOOD, present=SMALL, resident={"a:latest": SMALL["a:latest"]})
    pool.observe(specs[0].url, here, 0.0)
    pool.leave(submit(pool, "a", Work("other")), Outcome(), 0.0)
    for _ in range(4):
        submit(pool, "a", Work("greedy"))
    greedy = explain(pool, "a", Work("greedy"))
    assert shown(greedy) == ["one warm: later"]
    assert greedy[0].barred == "its flow has its share of the slots already"
    assert shown(explain(pool, "a", Work("other"))) == ["one warm: now"]
    assert shown(explain(pool, "a", Work("third"))) == ["one warm: now"]


def test_the_first_of_a_flow_is_not_behind_those_of_one_that_has_its_share() -> None:
    pool = pool_of({"one": SMALL, "two": SMALL}, {"one": "a:latest", "two": "b:latest"})
    pool.registry.drain("two", draining=True)
    for _ in range(6):
        submit(pool, "a", Work("greedy"))
    pool.registry.drain("two", draining=False)
    work = Work("other", priority=Priority.BATCH)
    said = explain(pool, "a", work)
    assert shown(said)[0] == "one warm: later"
    verdict = pool.submit(Attempt(target(pool, "a"), work=work), 0.0)
    assert isinstance(verdict, Queued)
    assert not pool.granted(1.0)


def test_nothing_is_counted_or_changed() -> None:
    pool = pool_of({"one": SMALL, "two": SMALL}, {"one": "a:latest"})
    for _ in range(3):
        submit(pool, "a", Work("f"))
    pool.granted(0.0)
    submit(pool, "a", Work("f"))
    state = repr(pool), pool.waiting, pool.in_flight, pool.registry.revision
    first = explain(pool, "a", Work("f"))
    assert explain(pool, "a", Work("f")) == first
    assert explain(pool, "b", Work("g"))
    assert (repr(pool), pool.waiting, pool.in_flight, pool.registry.revision) == state
    assert not pool.granted(0.0)
    assert explain(pool, "a", Work("f")) == first


def test_a_cloud_model_is_not_weighed() -> None:
    pool = ready(replace(topology([spec("one", cloud=True)]), policy=Policy.EXPECTED_DELAY), {})
    [one] = explain(pool, "x:cloud")
    assert (one.now, one.total_s, one.reason) == (True, None, Reason.ONLY)


def test_a_lease_says_when_its_answer_is_expected_to_begin() -> None:
    pool = pool_of({"one": SMALL}, {"one": "a:latest"})
    expected = []
    for text, tokens in (("a", 0), ("a", 4000), ("b", 4000)):
        attempt = Attempt(target(pool, text), work=Work(prompt_tokens=tokens))
        lease = pool.submit(attempt, 0.0)
        assert isinstance(lease, Lease)
        assert lease.expected_s is not None
        expected.append(lease.expected_s)
        pool.leave(attempt, Outcome(), 0.0)
    assert expected[0] == 0.0
    assert expected == sorted(set(expected))
    old = ready(topology([spec("one")]), {"one": ["a:latest"]})
    lease = old.submit(Attempt(target(old, "a")), 0.0)
    assert isinstance(lease, Lease)
    assert lease.expected_s is None


# What is said first is what is done.

KEYS = ["a", "b", "c", "d"]
FLOWS = ["f", "g", "h"]
LISTED = sized(a=4, b=12, c=20, d=8)
WORKS = st.builds(
    Work,
    flow=st.sampled_from(FLOWS),
    prompt_tokens=st.sampled_from([0, 100, 5000]),
    blocks=st.sampled_from([(), (1,), (1, 2), (3,)]),
    max_tokens=st.sampled_from([None, 1, 500]),
    num_ctx=st.sampled_from([None, None, 4096, 8192]),
    priority=st.sampled_from(Priority),
)


class World:
    """A pool and its leases, with what is done to it in whatever order."""

    def __init__(self, way: Policy, slots: list[int]) -> None:
        specs = [
            replace(spec(f"n{i}", slots=count), gpus=(24 * GB,)) for i, count in enumerate(slots)
        ]
        self.pool = Pool(replace(topology(specs), policy=way), 0.0)
        self.now = 0.0
        self.leased: dict[Attempt, NodeSpec] = {}
        self.waiting: list[Attempt] = []
        for one in specs:
            self.pool.observe(one.url, Observation(Sign.GOOD, present=LISTED, resident={}), 0.0)

    def settle(self) -> list[Attempt]:
        """Give nodes to those that wait, until nothing moves; gives those that got one."""
        found: list[Attempt] = []
        while given := self.pool.granted(self.now):
            for one in given:
                self.waiting.remove(one.attempt)
                if isinstance(one, Lease):
                    self.leased[one.attempt] = one.node
                    found.append(one.attempt)
        return found

    def submit(self, attempt: Attempt) -> list[Attempt]:
        """Gives those that got a node before it."""
        verdict = self.pool.submit(attempt, self.now)
        if isinstance(verdict, Lease):
            self.leased[attempt] = verdict.node
        else:
            assert isinstance(verdict, Queued)
            self.waiting.append(attempt)
        return [one for one in self.settle() if one is not attempt]

    def stir(self, kind: str, which: int) -> None:
        """Something happens."""
        leased, specs = list(self.leased), self.pool.registry.specs()
        one, place = (leased[which % len(leased)] if leased else None), specs[which % len(specs)]
        if kind == "time":
            self.now += which % 7
        elif kind == "began" and one is not None:
            self.pool.began(one, self.now)
        elif kind in ("ended", "failed", "busy") and one is not None:
            del self.leased[one]
            how = {"ended": Outcome(), "failed": ANSWERED, "busy": BUSY}[kind]
            self.pool.leave(one, how, self.now)
        elif kind == "drain":
            self.pool.registry.drain(
                place.name, draining=place.url not in self.pool.registry.drained
            )
        elif kind == "seen":
            keys = {key: model for i, (key, model) in enumerate(LISTED.items()) if which >> i & 1}
            self.pool.observe(place.url, Observation(resident=keys), self.now)


EVENTS = st.sampled_from(
    ["submit"] * 10
    + ["time", "time", "began", "began", "ended", "ended", "failed", "busy", "drain", "seen"]
)
STEPS = st.tuples(EVENTS, st.integers(0, 40), st.sampled_from(KEYS), WORKS)


@pytest.mark.parametrize("way", Policy)
@given(slots=st.lists(st.integers(1, 3), min_size=1, max_size=4), data=st.data())
@settings(max_examples=150)
def test_the_node_that_is_said_first_is_the_one_that_is_chosen(
    way: Policy, slots: list[int], data: st.DataObject
) -> None:
    world = World(way, slots)
    pool = world.pool
    for kind, which, key, work in data.draw(st.lists(STEPS, max_size=30)):
        if kind != "submit":
            world.stir(kind, which)
            world.settle()
            continue
        asked = target(pool, key)
        said = [*pool.explain(asked, work, world.now)]
        attempt = Attempt(asked, work=work)
        if isinstance(found := pool.registry.eligible_now(attempt, world.now), Rejected):
            assert not any(one.now for one in said)
            assert (found.refusal is Refusal.BUSY) is any(one.later for one in said)
            continue
        others = world.submit(attempt)
        node = world.leased.get(attempt)
        if said[0].now:
            assert node == said[0].node or others  # those that waited go first
        else:
            assert node is None or others  # one that now loads elsewhere may have made way
            assert said[0].later
