"""After a failed attempt: whose failure it is, what may follow, and how often in all."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.retry import Budget, Verdict, decide, judge, status, telling
from router.core.types import Failure, FailureKind
from tests.core.build import RULES

FRESH, ELSEWHERE, GIVE_UP = Verdict.FRESH, Verdict.ELSEWHERE, Verdict.GIVE_UP
K = FailureKind


def failure(kind: FailureKind, flags: str) -> Failure:
    return Failure(kind, "sent" in flags, "reused" in flags, "received" in flags)


@pytest.mark.parametrize(
    ("code", "had_model", "expected"),
    [
        (200, True, None),
        # the client's own mistakes
        (400, True, None),
        (401, True, None),
        (403, True, None),
        (413, True, None),
        (422, True, None),
        (429, True, None),
        # a model that the node was believed to have
        (404, True, K.MISSING),
        (404, False, None),
        # the node's
        (500, True, K.ANSWERED),
        (500, False, K.ANSWERED),
        (502, True, K.ANSWERED),
        (504, False, K.ANSWERED),
        (599, True, K.ANSWERED),
        (503, True, K.BUSY),
        (503, False, K.BUSY),
        # not here, so nowhere
        (501, True, None),
        (505, True, None),
    ],
)
def test_which_answers_another_node_may_give_better(
    code: int, *, had_model: bool, expected: FailureKind | None
) -> None:
    assert judge(code, had_model=had_model) is expected


@pytest.mark.parametrize(
    ("kind", "flags", "verdict"),
    [
        (K.REFUSED, "", ELSEWHERE),
        (K.CONNECT, "", ELSEWHERE),
        (K.BUSY, "sent received", ELSEWHERE),
        (K.ANSWERED, "sent received", ELSEWHERE),
        (K.MISSING, "sent received", ELSEWHERE),
        (K.RESET, "", ELSEWHERE),
        (K.RESET, "sent", ELSEWHERE),
        (K.RESET, "sent received", ELSEWHERE),
        (K.GARBAGE, "sent received", ELSEWHERE),
        (K.FIRST_BYTE_TIMEOUT, "sent", ELSEWHERE),
        (K.STALLED, "sent received", ELSEWHERE),
        # a kept connection that was stale
        (K.RESET, "reused", FRESH),
        (K.RESET, "sent reused", FRESH),
        (K.RESET, "sent reused received", ELSEWHERE),
        (K.FIRST_BYTE_TIMEOUT, "sent reused", ELSEWHERE),
        (K.GARBAGE, "sent reused received", ELSEWHERE),
    ],
)
def test_verdict(kind: FailureKind, flags: str, verdict: Verdict) -> None:
    assert decide(failure(kind, flags)) is verdict


ALL = [
    Failure(kind, sent, reused, received)
    for kind in FailureKind
    for sent, reused, received in itertools.product((False, True), repeat=3)
]


def test_what_changes_something_is_never_sent_to_another_node_once_a_byte_of_it_was() -> None:
    for one in ALL:
        if one.sent:
            assert decide(one, changes=True) is not ELSEWHERE
        elif decide(one) is ELSEWHERE:
            assert decide(one, changes=True) is ELSEWHERE


def test_a_fresh_connection_is_tried_only_after_a_kept_one_that_said_nothing() -> None:
    for one in ALL:
        stale = one.kind is K.RESET and one.reused and not one.received
        assert (decide(one) is FRESH) is stale


def test_nobody_is_left_to_be_asked() -> None:
    assert {decide(one, left=left) for one in ALL for left in (0, -1)} == {FRESH, GIVE_UP}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (K.REFUSED, 503),
        (K.BUSY, 503),
        (K.CONNECT, 503),
        (K.RESET, 502),
        (K.GARBAGE, 502),
        (K.ANSWERED, 502),
        (K.FIRST_BYTE_TIMEOUT, 504),
        (K.STALLED, 504),
        (K.MISSING, 404),
    ],
)
def test_status(kind: FailureKind, expected: int) -> None:
    assert status(Failure(kind)) == expected


@pytest.mark.parametrize("code", [404, 500, 502, 503])
def test_an_answer_has_its_own_status(code: int) -> None:
    assert status(Failure(K.ANSWERED, status=code)) == code


def test_every_kind_of_failure_has_a_status() -> None:
    assert {status(Failure(kind)) for kind in FailureKind} == {404, 502, 503, 504}


@pytest.mark.parametrize(
    ("kinds", "told"),
    [
        ([K.RESET], 0),
        ([K.REFUSED, K.ANSWERED, K.RESET], 1),
        ([K.CONNECT, K.REFUSED], 0),
        ([K.BUSY, K.REFUSED, K.CONNECT], 0),
        ([K.RESET, K.BUSY], 0),
        ([K.FIRST_BYTE_TIMEOUT, K.RESET], 0),
        ([K.RESET, K.STALLED, K.FIRST_BYTE_TIMEOUT], 1),
        # that one node lost the model matters least: others were believed to have it
        ([K.MISSING, K.REFUSED], 1),
        ([K.MISSING, K.MISSING], 1),
        # of equals the last
        ([K.ANSWERED, K.ANSWERED, K.RESET], 1),
        ([K.BUSY, K.BUSY, K.BUSY], 2),
    ],
)
def test_the_most_telling_failure_is_told(kinds: list[FailureKind], told: int) -> None:
    met = [Failure(kind, detail=str(place)) for place, kind in enumerate(kinds)]
    assert telling(met) is met[told]


def test_any_failures_have_one_that_is_told() -> None:
    for kinds in itertools.permutations(FailureKind, 2):
        assert telling(map(Failure, kinds)).kind in kinds


# How often in all


def taken(budget: Budget, times: int, in_flight: int, now: float) -> int:
    return sum(budget.take(in_flight, RULES, now) for _ in range(times))


@pytest.mark.parametrize(
    ("in_flight", "expected"), [(0, 5), (10, 5), (25, 5), (30, 6), (100, 20), (1000, 200)]
)
def test_a_fifth_of_what_is_in_flight_and_five_in_any_case(in_flight: int, expected: int) -> None:
    assert taken(Budget(), 500, in_flight, now=7.0) == expected


def test_what_has_ended_makes_room_under_the_share() -> None:
    budget = Budget()
    assert taken(budget, 30, in_flight=100, now=7.0) == 20
    for _ in range(3):
        budget.give()
    assert budget.running == 17
    assert taken(budget, 30, in_flight=100, now=7.0) == 3


def test_the_few_come_back_with_time() -> None:
    budget = Budget()
    for at in range(5):
        assert taken(budget, 1, 0, now=float(at)) == 1
    assert [taken(budget, 9, 0, now) for now in (9.9, 10.0, 10.9, 12.0, 30.0)] == [0, 1, 0, 2, 5]


@pytest.mark.parametrize(("least", "share", "expected"), [(0, 0.0, 0), (0, 0.5, 5), (3, 0.0, 3)])
def test_the_budget_is_as_configured(least: int, share: float, expected: int) -> None:
    rules, budget = replace(RULES, budget=share, budget_least=least), Budget()
    assert sum(budget.take(10, rules, 0.0) for _ in range(100)) == expected


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 60), st.booleans()), max_size=200))
def test_failure_does_not_multiply_load(steps: list[tuple[float, int, bool]]) -> None:
    budget, now, times = Budget(), 100.0, list[float]()
    for gap_s, in_flight, ends in steps:
        now += gap_s
        before = budget.running
        if ends and before:
            budget.give()
        elif budget.take(in_flight, RULES, now):
            recent = sum(now - at < RULES.budget_s for at in times)
            assert recent < RULES.budget_least or before < RULES.budget * in_flight
            times.append(now)
        else:
            assert before >= RULES.budget * in_flight
