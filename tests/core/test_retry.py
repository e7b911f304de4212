"""After a failed attempt, before the client has seen a byte."""

import itertools

import pytest

from router.core.retry import Verdict, decide, status
from router.core.types import Failure, FailureKind

FRESH, ELSEWHERE, GIVE_UP = Verdict.FRESH, Verdict.ELSEWHERE, Verdict.GIVE_UP
K = FailureKind


def failure(kind: FailureKind, flags: str) -> Failure:
    return Failure(kind, "sent" in flags, "reused" in flags, "received" in flags)


@pytest.mark.parametrize(
    ("kind", "flags", "verdict"),
    [
        (K.REFUSED, "", ELSEWHERE),
        (K.BUSY, "", ELSEWHERE),
        (K.CONNECT, "", ELSEWHERE),
        (K.RESET, "", ELSEWHERE),
        (K.RESET, "reused", FRESH),
        (K.RESET, "sent reused", FRESH),
        (K.RESET, "sent", GIVE_UP),
        (K.RESET, "sent received", GIVE_UP),
        (K.RESET, "sent reused received", GIVE_UP),
        (K.GARBAGE, "sent received", GIVE_UP),
        (K.GARBAGE, "sent reused received", GIVE_UP),
        (K.FIRST_BYTE_TIMEOUT, "sent", GIVE_UP),
        (K.FIRST_BYTE_TIMEOUT, "sent reused", GIVE_UP),
        (K.STALLED, "sent received", GIVE_UP),
        (K.STALLED, "sent reused received", GIVE_UP),
    ],
)
def test_verdict(kind: FailureKind, flags: str, verdict: Verdict) -> None:
    assert decide(failure(kind, flags)) is verdict


@pytest.mark.parametrize("kind", FailureKind)
@pytest.mark.parametrize("reused", [False, True])
def test_what_a_node_has_begun_to_answer_is_never_sent_again(
    kind: FailureKind, reused: bool
) -> None:
    assert decide(Failure(kind, sent=True, reused=reused, received=True)) is GIVE_UP


def test_what_was_sent_never_goes_to_another_node() -> None:
    for kind, reused, received in itertools.product(FailureKind, (False, True), (False, True)):
        assert decide(Failure(kind, True, reused, received)) is not ELSEWHERE


@pytest.mark.parametrize("kind", FailureKind)
@pytest.mark.parametrize("sent", [False, True])
def test_a_fresh_connection_is_tried_only_after_a_kept_one(kind: FailureKind, sent: bool) -> None:
    assert decide(Failure(kind, sent=sent)) is not FRESH


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (K.REFUSED, 503),
        (K.BUSY, 503),
        (K.CONNECT, 503),
        (K.RESET, 502),
        (K.GARBAGE, 502),
        (K.FIRST_BYTE_TIMEOUT, 504),
        (K.STALLED, 504),
    ],
)
def test_status(kind: FailureKind, expected: int) -> None:
    assert status(Failure(kind)) == expected


def test_every_kind_of_failure_has_a_status_of_a_gateway() -> None:
    assert {status(Failure(kind)) for kind in FailureKind} == {502, 503, 504}
