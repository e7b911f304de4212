"""One request's way over the nodes: how far it may go, and what it says of them."""

from dataclasses import replace

import pytest

from router.core.names import Pin, parse
from router.core.policy import Target
from router.core.retry import Verdict
from router.core.trail import Trail
from router.core.types import Failure, FailureKind
from tests.core.build import RULES, spec

K = FailureKind
TARGET = Target(parse("m"), None, "m")
NODES = {name: spec(name) for name in "abcdef"}
MARKS = {Verdict.ELSEWHERE: ">", Verdict.GIVE_UP: ".", Verdict.FRESH: "="}
KINDS = {
    "r": Failure(K.RESET, sent=True),
    "n": Failure(K.REFUSED),
    "x": Failure(K.ANSWERED, sent=True, received=True, status=500),
    "b": Failure(K.BUSY, sent=True, received=True, status=503),
    "m": Failure(K.MISSING, sent=True, received=True, status=404),
    "t": Failure(K.FIRST_BYTE_TIMEOUT, sent=True),
    "s": Failure(K.STALLED, sent=True, received=True),
    "k": Failure(K.RESET, sent=True, reused=True),
}


def walk(trail: Trail, events: str, other_nodes: int = 2) -> str:
    """What follows each failure, such as `ar`: on node a, of the kind r. `+`: another record."""
    rules = replace(RULES, other_nodes=other_nodes)
    found = ""
    for event in events.split():
        if event == "+":
            trail.went_on()
        else:
            found += MARKS[trail.failed(NODES[event[0]], KINDS[event[1]], rules)]
    return found


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ("ar", ">"),
        ("ar br", ">>"),
        ("ar br cr", ">>."),  # two others in a row
        ("ar bx ct", ">>."),
        ("an bn cn", ">>."),
        ("am bm cm", ">>."),
        # another record makes two others possible, and those that failed before, too
        ("ar br + cr dr er", ">>>>."),
        ("ar + br + cr + dr", ">>>>"),
        ("as + as + as bs cs", ">>>>."),
        # but what was answered counts over the whole life of a request
        ("ax + bx + cx", ">>."),
        ("am + bx + ar + cm", ">>>."),
        # whoever is full does not count
        ("ab bb cb db ab bb", ">>>>>>"),
        ("ab br cb dr", ">>>>"),
        ("ab br cb dr er", ">>>>."),
        # a kept connection that was stale: the same node once more
        ("ak", "="),
        ("ak ar br cr", "=>>."),
    ],
)
def test_at_most_two_other_nodes_in_a_row_without_a_new_record(events: str, expected: str) -> None:
    assert walk(Trail(TARGET), events) == expected


@pytest.mark.parametrize(
    ("other_nodes", "expected"), [(0, "."), (1, ">."), (2, ">>."), (4, ">>>>.")]
)
def test_how_many_is_configured(other_nodes: int, expected: str) -> None:
    events = "ar br cr dr er"[: 3 * len(expected)]
    assert walk(Trail(TARGET), events, other_nodes) == expected


@pytest.mark.parametrize(("kind", "expected"), [(kind, ".") for kind in "rxbmts"] + [("n", ">")])
def test_what_changes_something_goes_elsewhere_only_unsent(kind: str, expected: str) -> None:
    assert walk(Trail(TARGET, changes=True), f"a{kind}") == expected


@pytest.mark.parametrize(
    ("events", "tried", "answered"),
    [
        ("", "", ""),
        ("ar", "a", ""),
        ("ax", "a", "a"),
        ("am", "a", "a"),
        ("ax br", "ab", ""),
        ("ar bx", "ab", "b"),
        # the pool itself keeps away from who is full: it may be asked again, and costs no budget
        ("ab", "", ""),
        ("ax bb", "a", ""),
        ("ar +", "", ""),
    ],
)
def test_the_next_attempt(events: str, tried: str, answered: str) -> None:
    trail = Trail(TARGET)
    walk(trail, events)
    attempt = trail.attempt()
    assert attempt.target is TARGET
    assert attempt.tried == {NODES[name].url for name in tried}
    assert attempt.answered == (NODES[answered].url if answered else "")
    assert attempt.digest == ""


def test_whoever_has_failed_it_before_is_asked_after_the_others() -> None:
    trail = Trail(TARGET)
    walk(trail, "ar ab cb + bx")
    assert trail.attempt().met == {NODES["a"].url, NODES["b"].url}
    assert trail.attempt().tried == {NODES["b"].url}


def test_what_goes_on_elsewhere_needs_the_very_same_model() -> None:
    trail = Trail(TARGET)
    trail.digest = "sha256:abc"
    assert trail.attempt().digest == "sha256:abc"


def test_an_attempt_does_not_change_with_the_trail() -> None:
    trail = Trail(TARGET)
    attempt = trail.attempt()
    walk(trail, "ar")
    assert attempt.tried == frozenset()


@pytest.mark.parametrize(
    ("before", "kind", "told"),
    [
        ("", "x", True),
        ("", "r", True),
        # it may be the request
        ("ax", "x", False),
        ("ax br", "x", False),
        ("ax +", "x", False),
        # but not what has nothing to do with it
        ("ax", "r", True),
        ("ax", "b", True),
        ("ax", "m", True),
        ("ax", "t", True),
        ("ar", "x", True),
        ("ab", "x", True),
        ("am", "x", True),
    ],
)
def test_a_request_that_fails_everywhere_the_same_way_blames_only_the_first(
    before: str, kind: str, *, told: bool
) -> None:
    trail = Trail(TARGET)
    walk(trail, before)
    outcome = trail.outcome(KINDS[kind])
    assert outcome.told is told
    assert outcome.failure is (KINDS[kind] if told else None)


@pytest.mark.parametrize(("kind", "told"), [("x", False), ("r", True), ("t", True), ("b", True)])
def test_a_bad_answer_to_a_pinned_request_blames_nobody(kind: str, *, told: bool) -> None:
    """No other node can tell whether it is the request."""
    trail = Trail(Target(parse("m"), Pin("a"), "m"))
    assert trail.outcome(KINDS[kind]).told is told


@pytest.mark.parametrize(
    ("before", "kind", "excused"),
    [
        ("", "x", ""),
        ("ax", "x", "a"),
        ("ax", "r", ""),
        ("ax br", "x", "a"),
        ("ar bx", "x", "b"),
        ("ar", "x", ""),
        ("ax bx", "x", ""),  # it is already
    ],
)
def test_the_first_that_failed_is_excused_once_another_fails_alike(
    before: str, kind: str, excused: str
) -> None:
    trail = Trail(TARGET)
    walk(trail, before)
    found = trail.excused(KINDS[kind])
    assert (found.name if found else "") == excused


def test_all_that_was_met_is_remembered_in_order() -> None:
    trail = Trail(TARGET)
    walk(trail, "ar bx + ab cm")
    assert [(node.name, failure.kind) for node, failure in trail.met] == [
        ("a", K.RESET),
        ("b", K.ANSWERED),
        ("a", K.BUSY),
        ("c", K.MISSING),
    ]


@pytest.mark.parametrize(
    ("way", "busy"), [("", False), ("ab", True), ("ar ab", True), ("ab br", False)]
)
def test_who_has_just_met_a_full_node_is_known(way: str, *, busy: bool) -> None:
    trail = Trail(TARGET)
    walk(trail, way)
    assert trail.busy is busy
