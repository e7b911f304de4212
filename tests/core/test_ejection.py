"""What real traffic makes of a node: whose fault a failure is, and who is kept away for it."""

import itertools

import pytest

from router.core.names import parse
from router.core.node import Node
from router.core.types import (
    Ejected,
    Ejection,
    Failure,
    FailureKind,
    Flip,
    Model,
    Observation,
    Outcome,
    Sign,
)
from tests.core import build
from tests.core.build import ground, spec

CLOSED, OPEN, TRIAL = Ejection.CLOSED, Ejection.OPEN, Ejection.TRIAL
K = FailureKind
A, B = "a:latest", "b:latest"
ENDS = {
    "+": Outcome(),
    ".": Outcome(told=False),
    "r": Outcome(Failure(K.RESET, detail="reset by peer")),
    "c": Outcome(Failure(K.CONNECT)),
    "g": Outcome(Failure(K.GARBAGE)),
    "x": Outcome(Failure(K.ANSWERED, detail="status 500")),
    "t": Outcome(Failure(K.FIRST_BYTE_TIMEOUT)),
    "s": Outcome(Failure(K.STALLED)),
    "b": Outcome(Failure(K.BUSY)),
    "m": Outcome(Failure(K.MISSING)),
    "n": Outcome(Failure(K.REFUSED)),
}


class Traffic:
    """Requests to one node of many slots that has the models a and b."""

    def __init__(self, slots: int = 4) -> None:
        self.node = build.node(spec("n", slots=slots), A, B)
        self.ground = ground()
        self.now = 100.0
        self.flips: list[Flip] = []

    def lease(self, key: str = A) -> int:
        self.ground.turn += 1
        self.flips += self.node.lease(key, self.ground, self.now)
        return self.ground.turn

    def end(self, how: str, turn: int, key: str = A) -> None:
        self.flips += self.node.leave(key, turn, ENDS[how], self.ground, self.now)

    def run(self, *words: str) -> None:
        """Requests one after the other, such as `a:xx+`: the model, and how each ends."""
        for word in words:
            name, _, ends = word.partition(":")
            for end in ends:
                key = f"{name}:{'latest' if name in 'ab' else 'cloud'}" if name else ""
                self.end(end, self.lease(key), key)

    def wait(self) -> None:
        """Until the latest of all trials."""
        self.now = max(one.until for one in self.node.ejected())

    @property
    def ejected(self) -> list[str]:
        """Of which models, or `node`; `busy` ones with a mark."""
        return [
            (one.model[:1] or "node") + ("!" if one.busy else "") for one in self.node.ejected()
        ]

    def lets(self) -> str:
        """Which of the models may be asked for now."""
        return "".join(key[0] for key in (A, B) if self.node.lets(key, self.now))


@pytest.fixture
def traffic() -> Traffic:
    return Traffic()


@pytest.mark.parametrize(
    ("words", "ejected"),
    [
        # broken connections, three in a row, are the node's fault, whatever they were for
        ("a:rr", ""),
        ("a:rrr", "node"),
        ("a:ccc", "node"),
        ("a:rcg", "node"),
        ("a:r b:r a:r", "node"),
        ("a:rr+r", ""),
        ("a:rr b:+ a:r", ""),
        ("a:rr.r", "node"),
        # bad answers and silence are the model's
        ("a:xxxx", ""),
        ("a:xxxxx", "a"),
        ("a:ttsxx", "a"),
        ("a:xxxxx b:++++", "a"),
        ("a:xxxxx b:x", "a"),
        ("a:xxxxx b:xx", "node a"),
        ("a:xx+ b:xx+", ""),
        # of several models in a row, they are the node's, too
        ("a:xx b:xxx", "node"),
        ("a:x b:x a:x b:x a:x", "node"),
        ("a:x b:x a:x b:x a:+", ""),
        ("a:xx b:x+xx", ""),
        # who has nothing to tell is nobody's fault
        ("a:..........", ""),
        ("a:mmmmmmmmmm", ""),
        ("a:nnnnnnnnnn", ""),
        # full is not failed
        ("a:bbbbbbbbbb", "a!"),
        ("a:b b:b", "a! b!"),
        ("a:bbbb+", ""),
        ("a:xxxxb b:+", "a!"),
        ("a:b b:rrr", "node a!"),
        # requests that name no model tell of broken connections only
        (":xxxxxxxxxx", ""),
        (":tttttttttt", ""),
        (":rrr", "node"),
        (":xx a:xxx", ""),
        # what fails for a cloud model is behind the node
        ("k:xxxxx", "k"),
        ("k:xx l:xxx", ""),
        ("a:xx k:xxxx a:x", ""),
        # the row goes on whatever is between that is neither
        ("a:xxmxxx", "a"),
        ("a:rmrr", "node"),
    ],
)
def test_whose_fault_it_is(traffic: Traffic, words: str, ejected: str) -> None:
    traffic.run(*words.split())
    assert traffic.ejected == ejected.split()


@pytest.mark.parametrize(
    ("words", "lets"),
    [
        ("a:rrr", ""),
        ("a:xxxxx", "b"),
        ("a:b", "b"),
        ("a:b b:b", ""),
        (":b", "ab"),
        ("a:rr", "ab"),
    ],
)
def test_who_is_kept_away(traffic: Traffic, words: str, lets: str) -> None:
    traffic.run(*words.split())
    assert traffic.lets() == lets


def test_out_of_memory_for_one_model_leaves_the_others_alone(traffic: Traffic) -> None:
    for _ in range(20):
        traffic.run("a:xxxxx", "b:++++++++++")
        traffic.wait()
    assert traffic.ejected == ["a"]


def test_being_full_never_touches_a_breaker(traffic: Traffic) -> None:
    for _ in range(50):
        traffic.run("a:b", "b:b")
        traffic.now += 60
    assert not traffic.flips
    assert traffic.ejected == ["a!", "b!"]


def test_full_for_requests_without_a_model_is_full_for_those_alone(traffic: Traffic) -> None:
    traffic.run(":b")
    assert not traffic.node.lets("", traffic.now)
    assert traffic.node.busy_until("", traffic.now) == traffic.now + 1
    assert traffic.node.busy_until("", traffic.now + 1) is None
    assert traffic.node.busy_until(A, traffic.now) is None
    traffic.now += 1
    traffic.run(":+")
    assert traffic.node.lets("", traffic.now)


def test_a_node_that_fails_fast_gets_only_trials(traffic: Traffic) -> None:
    """Thousands of requests would find it idle: five, and then one at a time, ever more rarely."""
    sent = 0
    for _ in range(100_000):
        traffic.now += 0.01
        if traffic.node.lets(A, traffic.now):
            traffic.run("a:x")
            sent += 1
    assert sent == 5 + 5 + 1 + (1000 - 63) // 60


def test_every_flip_is_told_once_with_its_reason_and_the_time_to_the_next_trial(
    traffic: Traffic,
) -> None:
    traffic.run("a:rrr")
    traffic.wait()
    traffic.run("a:r")
    traffic.wait()
    traffic.run("a:+++")
    assert traffic.flips == [
        Flip("n", CLOSED, OPEN, "reset by peer", "", 1.0),
        Flip("n", OPEN, TRIAL, "reset by peer", "", 1.0),
        Flip("n", TRIAL, OPEN, "reset by peer", "", 2.0),
        Flip("n", OPEN, TRIAL, "reset by peer", "", 2.0),
        Flip("n", TRIAL, CLOSED, "reset by peer", "", 0.0),
    ]


def test_flips_of_a_model_name_it(traffic: Traffic) -> None:
    traffic.run("b:xxxxx")
    traffic.wait()
    traffic.run("b:+")
    assert [(flip.model, flip.was, flip.now) for flip in traffic.flips] == [
        (B, CLOSED, OPEN),
        (B, OPEN, TRIAL),
        (B, TRIAL, CLOSED),
    ]


def test_several_flips_at_once_are_all_told(traffic: Traffic) -> None:
    traffic.run("a:xx", "b:+", "b:xx", "a:xxx")
    assert [(flip.model, flip.now) for flip in traffic.flips] == [("", OPEN), (A, OPEN)]
    traffic.wait()
    del traffic.flips[:]
    traffic.run("a:+")
    assert [(flip.model, flip.now) for flip in traffic.flips] == [
        ("", TRIAL), (A, TRIAL), ("", CLOSED), (A, CLOSED),
    ]  # fmt: skip


@pytest.mark.parametrize("first", ["rrr", "xxx"])
@pytest.mark.parametrize(
    ("end", "state"),
    [
        ("+", CLOSED),
        ("r", OPEN),
        ("x", OPEN),
        ("t", OPEN),
        (".", OPEN),
        ("b", OPEN),
        ("m", OPEN),
        ("n", OPEN),
    ],
)
def test_the_trial_of_a_node_decides(
    traffic: Traffic, first: str, end: str, state: Ejection
) -> None:
    traffic.run("b:xx" if first == "xxx" else "b:", f"a:{first}")
    assert traffic.ejected == ["node"]
    traffic.wait()
    turn = traffic.lease(B)
    assert traffic.node.breaker.state is TRIAL
    assert traffic.lets() == ""
    traffic.end(end, turn, B)
    assert traffic.node.breaker.state is state
    told = end in "rxt"
    assert traffic.node.breaker.lets(traffic.now) is not told


@pytest.mark.parametrize("end", [end for end in ENDS if end not in "+xts"])
def test_what_tells_nothing_of_the_model_leaves_its_trial_to_the_next(
    traffic: Traffic, end: str
) -> None:
    traffic.run("a:xxxxx")
    traffic.wait()
    traffic.run(f"a:{end}")
    replica = traffic.node.replicas[A]
    assert replica.breaker.state is OPEN
    assert replica.breaker.lets(traffic.now)


@pytest.mark.parametrize("end", ENDS)
def test_a_trial_of_a_model_ends_though_the_node_was_ejected_meanwhile(
    traffic: Traffic, end: str
) -> None:
    """Or nobody would ever ask for it again."""
    traffic.run("a:xxxxx")
    traffic.wait()
    trial = traffic.lease(A)
    traffic.run("b:rrr")
    traffic.end(end, trial, A)
    assert traffic.node.replicas[A].breaker.state is not TRIAL
    assert traffic.node.breaker.state is OPEN


@pytest.mark.parametrize("end", ENDS)
def test_what_began_before_the_ejection_says_nothing_of_the_time_since(
    traffic: Traffic, end: str
) -> None:
    early = [traffic.lease(A) for _ in range(6)]
    traffic.run("b:rrr")
    traffic.wait()
    trial = traffic.lease(B)
    for turn in early:
        traffic.end(end, turn, A)
        assert traffic.node.breaker.state is TRIAL
    traffic.end("+", trial, B)
    assert traffic.node.breaker.state is CLOSED


def test_a_failure_that_is_forgiven_ejects_nobody(traffic: Traffic) -> None:
    for _ in range(20):
        traffic.run("a:x")
        traffic.node.forgive(A)
        traffic.run("b:x")
        traffic.node.forgive(B)
    assert traffic.ejected == []
    traffic.run("a:xxxxx")
    assert traffic.ejected == ["a"]


def test_forgiving_what_was_not_counted_changes_nothing(traffic: Traffic) -> None:
    traffic.node.forgive(A)
    traffic.run("a:" + "+" * 40)
    traffic.node.forgive(A)
    traffic.run("a:xxxx")
    assert traffic.ejected == []
    traffic.run("a:x")
    assert traffic.ejected == ["a"]


def test_the_operator_sees_who_is_kept_away_why_and_until_when(traffic: Traffic) -> None:
    assert traffic.node.ejected() == ()
    traffic.run("a:xxxxx", "a:rrr", "b:b")
    assert traffic.node.ejected() == (
        Ejected("reset by peer", 101.0),
        Ejected("status 500", 101.0, A),
        Ejected("busy", 101.0, B, busy=True),
    )
    traffic.now = 101.0
    traffic.lease(A)
    assert [one.trial for one in traffic.node.ejected()] == [True, True, False]


def test_models_of_any_name_are_remembered_only_while_they_matter() -> None:
    """A cloud model can have any name, and a client may send any number of them."""
    traffic = Traffic()
    held = traffic.lease("held:cloud")
    for i in range(5000):
        key = f"{i}:cloud"
        traffic.now += 0.01
        traffic.end("xb+"[i % 3], traffic.lease(key), key)
    assert len(traffic.node.replicas) <= 1100
    assert len(traffic.node.troubled) <= 1100
    assert len(traffic.node.ejected()) <= 1100
    traffic.end("+", held, "held:cloud")
    assert traffic.node.in_flight == 0


# Coming back


@pytest.mark.parametrize(
    ("slots", "after_s", "size"),
    [
        (1, 0, 1.0),
        (4, 0, 1.0),
        (4, 7, 1.0),
        (4, 15, 2.0),
        (4, 22.5, 3.0),
        (4, 30, 4.0),
        (4, 1000, 4.0),
        (8, 15, 4.0),
    ],
)
def test_a_readmitted_node_grows_from_one_slot_to_all(
    slots: int, after_s: float, size: float
) -> None:
    traffic = Traffic(slots)
    traffic.run("a:rrr")
    traffic.wait()
    traffic.run("a:+")
    traffic.node.in_flight = 6
    load = traffic.node.load(traffic.now + after_s, slow_start_s=30.0)
    assert load == pytest.approx(6 / size)


def test_a_model_that_is_readmitted_does_not_slow_its_node(traffic: Traffic) -> None:
    traffic.run("a:xxxxx")
    traffic.wait()
    traffic.run("a:+")
    traffic.node.in_flight = 4
    assert traffic.node.load(traffic.now, slow_start_s=30.0) == 1.0


def test_a_slow_start_that_is_made_shorter_ends_sooner(traffic: Traffic) -> None:
    traffic.run("a:rrr")
    traffic.wait()
    traffic.run("a:+")
    traffic.node.in_flight = 4
    assert traffic.node.load(traffic.now, slow_start_s=1.0) == 4.0
    assert traffic.node.load(traffic.now + 30, slow_start_s=1.0) == 1.0


# Drain


@pytest.mark.parametrize(("up", "draining"), [*itertools.product((False, True), repeat=2)])
def test_a_node_is_open_when_it_is_up_and_not_drained(*, up: bool, draining: bool) -> None:
    wanted = up and not draining
    first, second = (build.node(spec("n"), A, up=not up) for _ in range(2))
    first.drain(draining=draining)
    feel(first, up=up)
    feel(second, up=up)
    second.drain(draining=draining)
    assert (first.open, second.open) == (wanted, wanted)


def feel(node: Node, *, up: bool) -> None:
    for _ in range(3):
        node.feel(Sign.GOOD if up else Sign.BAD, up_after=2, down_after=3, now=1.0)


def test_drain_says_whether_it_changes_anything() -> None:
    node = build.node(spec("n"), A)
    assert [node.drain(draining=on) for on in (False, True, True, False)] == [
        False, True, False, True,
    ]  # fmt: skip


# What it has


@pytest.mark.parametrize(
    ("listed", "asked", "expected"),
    [
        ("a:latest", "a", True),
        ("a:latest", "a:latest", True),
        ("A:latest", "A", True),
        ("a:8b", "a:8b", True),
        # some endpoints know a name only as it is listed, so a 404 tells nothing
        ("A:latest", "a", False),
        ("a:latest", "A", False),
        ("a:latest", "a:LATEST", False),
        ("a:latest", "a:local", False),
        ("a:latest", "b", True),  # if it has been asked for that, it did list it
    ],
)
def test_whether_it_spells_a_model_like_that(listed: str, asked: str, *, expected: bool) -> None:
    node = build.node(spec("n"))
    key = parse(listed).key
    node.learn(Observation(present={key: Model(key, "", {"name": listed})}))
    assert node.spells(parse(asked)) is expected


def test_digest() -> None:
    node = build.node(spec("n"), A)
    assert (node.digest(A), node.digest(B)) == (f"digest of {A}", "")
