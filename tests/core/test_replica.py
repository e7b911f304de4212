"""One model on one node: what makes it full, and what ejects it."""

import pytest

from router.core.replica import Replica
from router.core.types import Ejected, Ejection
from tests.core.build import ground

CLOSED, OPEN, TRIAL = Ejection.CLOSED, Ejection.OPEN, Ejection.TRIAL


class Traffic:
    """Requests on one replica."""

    def __init__(self) -> None:
        self.ground = ground()
        self.replica = Replica()
        self.now = 100.0

    def lease(self) -> int:
        self.ground.turn += 1
        self.replica.lease(self.ground, self.now)
        return self.ground.turn

    def end(self, how: str, turn: int | None = None) -> None:
        turn = self.ground.turn if turn is None else turn
        self.replica.in_flight -= 1
        if how == "good":
            self.replica.good(turn, self.ground, self.now)
        elif how == "untold":
            self.replica.untold(turn, self.now)
        elif how == "busy":
            self.replica.full(self.ground, self.now)
        else:
            self.replica.bad(how, turn, self.ground, self.now)

    def run(self, ends: str, every_s: float = 0.0) -> None:
        """Requests one after the other: `+` good, `-` bad."""
        for end in ends:
            self.now += every_s
            self.lease()
            self.end("good" if end == "+" else "it failed")


@pytest.fixture
def traffic() -> Traffic:
    return Traffic()


def test_five_bad_answers_in_a_row_eject_it(traffic: Traffic) -> None:
    traffic.run("+" * 40 + "----+----")
    assert traffic.replica.calm
    traffic.run("-")
    assert not traffic.replica.lets(traffic.now)
    assert traffic.replica.ejected("m") == [Ejected("it failed", 101.0, "m")]


@pytest.mark.parametrize(
    ("ends", "state"),
    [
        ("++++-", CLOSED),
        ("+++--", OPEN),
        ("++-+-", OPEN),
        ("+" * 16 + "-+-+-+-", CLOSED),
        ("+" * 16 + "-+-+-+-+-", CLOSED),
        ("+" * 16 + "-+-+-+-+-+-", OPEN),
    ],
)
def test_so_does_a_share_of_less_than_80_percent(
    traffic: Traffic, ends: str, state: Ejection
) -> None:
    traffic.run(ends)
    assert traffic.replica.breaker.state is state


def test_few_failures_over_a_long_time_do_not(traffic: Traffic) -> None:
    traffic.run("+-" * 20, every_s=16.0)
    assert traffic.replica.calm


def test_the_share_begins_anew_once_it_was_ejected(traffic: Traffic) -> None:
    traffic.run("-----")
    traffic.now = traffic.replica.breaker.back_off.until
    traffic.run("+--")
    assert traffic.replica.calm


def test_what_began_before_it_was_ejected_counts_nowhere(traffic: Traffic) -> None:
    early = [traffic.lease() for _ in range(9)]
    traffic.run("-----")
    traffic.now = traffic.replica.breaker.back_off.until
    traffic.run("+")
    for turn in early:
        traffic.end("it failed", turn)
    assert traffic.replica.calm


def test_the_operator_sees_a_trial(traffic: Traffic) -> None:
    traffic.run("-----")
    traffic.now = traffic.replica.breaker.back_off.until
    traffic.lease()
    assert traffic.replica.breaker.state is TRIAL
    assert traffic.replica.ejected("m") == [Ejected("it failed", 102.0, "m", trial=True)]
    assert repr(traffic.replica) == "<Replica 1 in flight, trial>"


# Full


def test_it_is_full_for_a_time_that_doubles_until_a_request_ends_well(traffic: Traffic) -> None:
    found = []
    for _ in range(8):
        traffic.lease()
        traffic.end("busy")
        found.append(traffic.replica.busy.until - traffic.now)
        traffic.now = traffic.replica.busy.until
    assert found == [1, 2, 4, 8, 16, 32, 60, 60]
    traffic.run("+")
    assert traffic.replica.calm
    traffic.lease()
    traffic.end("busy")
    assert traffic.replica.busy.until - traffic.now == 1


def test_of_many_that_are_told_so_at_once_the_first_counts(traffic: Traffic) -> None:
    for _ in range(9):
        traffic.lease()
    for _ in range(9):
        traffic.end("busy")
    assert traffic.replica.busy.until == traffic.now + 1


def test_it_lets_nothing_pass_while_full_and_then_one_at_a_time(traffic: Traffic) -> None:
    traffic.lease()
    traffic.end("busy")
    lets = [traffic.replica.lets(now) for now in (100.0, 100.9, 101.0)]
    traffic.now = 101.0
    traffic.lease()
    lets += [traffic.replica.lets(now) for now in (101.0, 102.9, 103.0)]
    assert lets == [False, False, True] * 2


def test_who_goes_alone_to_a_full_one_and_leaves_has_not_made_the_wait_longer(
    traffic: Traffic,
) -> None:
    traffic.lease()
    traffic.end("busy")
    for _ in range(9):
        traffic.now = max(traffic.now, traffic.replica.busy.until)
        traffic.lease()
        traffic.end("untold")
    assert traffic.replica.lets(traffic.now)
    traffic.lease()
    assert traffic.replica.busy.until - traffic.now == 2


def test_nor_has_one_that_leaves_while_others_run_made_it_shorter(traffic: Traffic) -> None:
    traffic.lease()
    traffic.lease()
    traffic.end("busy")
    traffic.now += 1
    traffic.lease()
    traffic.end("untold")
    assert not traffic.replica.lets(traffic.now + 1.9)


def test_what_is_forgiven_counts_nowhere(traffic: Traffic) -> None:
    for _ in range(40):
        traffic.run("-")
        traffic.replica.forgive()
    assert traffic.replica.calm
    traffic.run("++++-")
    assert traffic.replica.calm


@pytest.mark.parametrize("full", [False, True])
def test_the_end_of_any_request_that_was_answered_makes_room(
    traffic: Traffic, *, full: bool
) -> None:
    early = traffic.lease()
    if full:
        traffic.lease()
        traffic.end("busy")
    traffic.end("good", early)
    assert traffic.replica.lets(traffic.now)
    assert traffic.replica.ejected("m") == []


def test_being_full_never_touches_the_breaker(traffic: Traffic) -> None:
    for _ in range(100):
        traffic.lease()
        traffic.end("busy")
        traffic.now += 60
    assert traffic.replica.breaker.state is CLOSED
    [busy] = traffic.replica.ejected("m")
    assert (busy.reason, busy.model, busy.busy, busy.trial) == ("busy", "m", True, False)
