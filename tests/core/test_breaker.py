"""Keeping away from what fails: one breaker, its back-off, and the share of good ends."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.breaker import TRANSITIONS, BackOff, Breaker, Share, Sign
from router.core.types import Ejection
from tests.core.build import RULES, ground

CLOSED, OPEN, TRIAL = Ejection.CLOSED, Ejection.OPEN, Ejection.TRIAL
MARKS = {CLOSED: "+", OPEN: "-", TRIAL: "?"}


class Traffic:
    """Leases on one breaker, numbered as a pool numbers them, and ended as a node ends them."""

    def __init__(self, limit: int = 3, now: float = 0.0) -> None:
        self.ground = ground()
        self.breaker = Breaker()
        self.limit = limit
        self.now = now
        self.leases: list[int] = []

    def do(self, events: str) -> str:
        """The state after each event, one mark each.

        `l` a lease, `w` waiting for the next trial, `s` for a second; of the newest lease `g` a
        good end, `b` a bad one, `u` one that tells nothing, of the oldest the same as capitals.
        """
        marks = ""
        for event in events.replace(" ", ""):
            self._event(event)
            marks += MARKS[self.breaker.state]
        return marks

    def _event(self, event: str) -> None:
        if event == "l":
            self.ground.turn += 1
            self.leases.append(self.ground.turn)
            self.breaker.lease(self.ground.turn, self.now)
        elif event == "w":
            self.now = self.breaker.back_off.until
        elif event == "s":
            self.now += 1.0
        else:
            self._end(event.lower(), self.leases.pop(0 if event.isupper() else -1))

    def _end(self, how: str, turn: int) -> None:
        if how == "g":
            self.breaker.good(turn, self.now)
        elif how == "u":
            self.breaker.untold(turn, self.now)
        elif not self.breaker.stale(turn) and self.breaker.bad(self.limit):
            self.breaker.open("it failed", self.ground, self.now)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ("lg lg lg", "++ ++ ++"),
        ("lb lb lb", "++ ++ +-"),
        ("lb lb lg lb lb", "++ ++ ++ ++ ++"),
        ("lb lb lu lb", "++ ++ ++ +-"),  # who leaves says neither good nor bad
        # one trial, when it is time, and it decides
        ("lblblb w l g", "+++++- - ? +"),
        ("lblblb w l b", "+++++- - ? -"),
        ("lblblb w l b w l g", "+++++- - ? - - ? +"),
        ("lblblb w l u", "+++++- - ? -"),
        ("lblblb w l u l g", "+++++- - ? - ? +"),  # it told nothing: the next one is the trial
        # once closed, it takes as many again
        ("lblblb wlg lblb lb", "+++++- -?+ ++++ +-"),
        # what began before it opened says nothing, however it ends
        ("lll lblblb G B U", "+++ +++++- - - -"),
        ("ll lblblb w l G B g", "++ +++++- - ? ? ? +"),
        ("ll lblblb w l U b", "++ +++++- - ? ? -"),
        ("ll lblblb wlg B B lblb", "++ +++++- -?+ + + ++++"),
        # leases while it is open are those of a panic: good news count, bad ones change nothing
        ("lblblb lb lb lb", "+++++- -- -- --"),
        ("lblblb lg", "+++++- -+"),
        ("lblblb lu", "+++++- --"),
        # one beside the trial may close it, too, and the trial's own end is then one of many
        ("lblblb wl l g b", "+++++- -? ? + +"),
        ("lblblb wl l b B", "+++++- -? ? - -"),
        # a lease that a panic gave before the trial began says nothing of it
        ("lblblb l wl B g", "+++++- - -? ? +"),
    ],
)
def test_closed_open_trial(events: str, expected: str) -> None:
    assert Traffic().do(events) == expected.replace(" ", "")


def test_the_table_has_a_row_for_every_state_and_sign() -> None:
    assert set(TRANSITIONS) == set(itertools.product(Ejection, Sign))


SIGNS = {Sign.LEASED: "l", Sign.GOOD: "g", Sign.BAD: "b", Sign.UNTOLD: "u"}
INTO = {CLOSED: "l", OPEN: "lb w", TRIAL: "lb w l"}


@pytest.mark.parametrize(("state", "sign"), TRANSITIONS)
def test_a_breaker_does_what_the_table_says(state: Ejection, sign: Sign) -> None:
    traffic = Traffic(limit=1)
    traffic.do(INTO[state])
    if state is OPEN and sign is not Sign.LEASED:
        traffic = Traffic(limit=1)
        traffic.do("lb l")  # as in a panic: it is not yet time for a trial
    assert traffic.breaker.state is state
    traffic.do(SIGNS[sign])
    assert traffic.breaker.state is TRANSITIONS[state, sign]


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_it_takes_as_many_bad_ends_in_a_row_as_configured(limit: int) -> None:
    traffic = Traffic(limit)
    assert traffic.do("lb" * limit) == "+" * (2 * limit - 1) + "-"


def test_it_lets_all_pass_while_closed_one_when_it_is_time_and_none_else() -> None:
    traffic = Traffic(limit=1, now=100.0)
    breaker = traffic.breaker
    lets = [breaker.lets(0.0)]
    traffic.do("lb")
    lets += [breaker.lets(100.0), breaker.lets(100.99), breaker.lets(101.0)]
    traffic.do("wl")
    lets += [breaker.lets(101.0), breaker.lets(101.99)]
    traffic.do("u")
    lets.append(breaker.lets(101.0))
    traffic.do("lg")
    lets.append(breaker.lets(101.0))
    assert lets == [True, False, False, True, False, False, True, True]


def test_a_trial_that_takes_longer_than_the_back_off_does_not_keep_all_others_away() -> None:
    """One request that hangs for minutes would else close the node to everybody."""
    traffic = Traffic(limit=1, now=100.0)
    traffic.do("lb w l")
    assert [traffic.breaker.lets(now) for now in (101.0, 101.99, 102.0)] == [False, False, True]
    assert traffic.do("w l") == "??"
    assert not traffic.breaker.lets(102.99)
    assert traffic.do("g G") == "++"


def test_the_end_of_an_earlier_trial_counts_beside_a_later_one() -> None:
    assert Traffic(limit=1).do("lb w l w l B g") == "+--???--"
    assert Traffic(limit=1).do("lb w l w l G b") == "+--???+-"


def test_what_is_forgiven_was_never_counted() -> None:
    breaker = Breaker()
    for _ in range(9):
        assert not breaker.bad(2)
        breaker.forgive()
    breaker.forgive()
    assert [breaker.bad(2), breaker.bad(2)] == [False, True]


def test_a_trial_that_told_nothing_does_not_make_the_next_one_wait_longer() -> None:
    traffic = Traffic(limit=1)
    traffic.do("lb w lu lu lu lb")
    assert traffic.breaker.back_off.until - traffic.now == 2.0


def test_bad_ends_of_a_panic_do_not_put_off_the_trial() -> None:
    traffic = Traffic(limit=1)
    traffic.do("lb")
    until = traffic.breaker.back_off.until
    traffic.do("lb lb lb")
    assert traffic.breaker.back_off.until == until


def test_the_reason_is_that_of_the_failure_that_opened_it() -> None:
    breaker, terms = Breaker(), ground()
    for reason in ("first", "second"):
        breaker.open(reason, terms, now=0.0)
        assert breaker.reason == reason
    assert repr(breaker) == "<Breaker open 0 bad in a row>"


# How long


def test_a_back_off_repeats_or_takes_back_the_last_time() -> None:
    back_off, terms = BackOff(), ground()
    for _ in range(3):
        back_off.grow(terms, 50.0)
    back_off.repeat(60.0)
    assert back_off.until == 64.0
    back_off.undo(61.0)
    assert back_off.until == 61.0
    back_off.grow(terms, 70.0)
    assert back_off.until == 74.0


def waits(times: int, roll: float = 0.5, now: float = 50.0) -> list[float]:
    back_off, terms = BackOff(), ground(roll=lambda: roll)
    found = []
    for _ in range(times):
        back_off.grow(terms, now)
        found.append(back_off.until - now)
    return found


def test_back_off_doubles_from_one_second_to_sixty() -> None:
    assert waits(9) == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_back_off_of_any_length_is_still_a_number() -> None:
    assert waits(5000)[-1] == 60


@given(st.floats(0, 1, exclude_max=True))
def test_back_off_varies_by_half_at_most(roll: float) -> None:
    for plain, wait_s in zip([1, 2, 4, 8, 16, 32, 60, 60], waits(8, roll), strict=True):
        assert plain * 0.5 - 1e-9 <= wait_s <= plain * 1.5 + 1e-9


def test_the_bounds_of_chance_are_reached() -> None:
    assert (waits(1, 0.0), waits(1, 1.0)) == ([0.5], [1.5])


def test_back_off_is_as_configured() -> None:
    rules = replace(RULES, back_off_s=3.0, back_off_max_s=10.0, jitter=0.0)
    back_off, terms = BackOff(), ground(rules, lambda: 0.99)
    found = []
    for _ in range(4):
        back_off.grow(terms, 0.0)
        found.append(back_off.until)
    assert found == [3, 6, 10, 10]


@pytest.mark.parametrize(("good_s", "next_wait_s"), [(0, 4), (59, 4), (60, 4), (61, 1), (1000, 1)])
def test_what_failed_is_forgotten_after_a_minute_without_trouble(
    good_s: float, next_wait_s: float
) -> None:
    traffic = Traffic(limit=1, now=1000.0)
    traffic.do("lb w lb w lg")
    traffic.now += good_s
    traffic.do("lb")
    assert traffic.breaker.back_off.until - traffic.now == next_wait_s


def test_time_that_it_is_open_is_not_time_without_trouble() -> None:
    traffic = Traffic(limit=1)
    traffic.do("lb w lb")
    traffic.now += 3600
    traffic.do("lb")
    assert traffic.breaker.state is OPEN
    assert traffic.breaker.back_off.until - traffic.now == 4.0


@given(st.lists(st.sampled_from("lgbuGBUws"), max_size=60), st.integers(1, 3))
def test_never_is_a_trial_forgotten(events: list[str], limit: int) -> None:
    """Once all leases have ended, it is closed, or open until a time that is told."""
    traffic = Traffic(limit)
    for event in events:
        if event in "lws" or traffic.leases:
            traffic.do(event)
    while traffic.leases:
        traffic.do("u")
    assert traffic.breaker.state is not TRIAL
    if traffic.breaker.state is OPEN:
        traffic.do("w lg" if traffic.breaker.back_off.until > traffic.now else "lg")
    assert traffic.breaker.state is CLOSED


# The share of good ends


def poor(ends: str, every_s: float = 1.0, *, least: int = 5, share: float = 0.8) -> bool:
    """Whether the share is poor after these ends: `+` good, `-` bad, a dot for nothing."""
    found, now = Share(), 500.0
    for end in ends:
        now += every_s
        if end == "+":
            found.good(now, window_s=30.0)
        elif end == "-":
            found.bad(now, window_s=30.0)
    return found.poor(least, share)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ("", False),
        ("----", False),
        ("-----", True),
        ("++++-", False),
        ("+++--", True),
        ("++++++++--", False),
        ("+++++++---", True),
        ("-+-+-+-+", True),
        ("-----" + "+" * 20, False),
        # what is older than the window is forgotten
        ("----" + "." * 40 + "-", False),
        ("-----" + "." * 40 + "++++-", False),
        ("-----" + "." * 10 + "+", True),
        ("+" * 20 + "." * 40 + "-----", True),
        ("+" * 20 + "." * 2 + "-----", False),
    ],
)
def test_a_share_under_80_percent_of_at_least_five_is_poor(ends: str, *, expected: bool) -> None:
    assert poor(ends) is expected


def test_the_window_is_no_longer_for_ends_that_are_far_apart() -> None:
    assert not poor("-----", every_s=9.9)
    assert poor("-----", every_s=4.9)


def test_how_poor_and_of_how_many_is_configured() -> None:
    assert poor("+-", least=2)
    assert not poor("+-", least=2, share=0.5)
    assert poor("+--", least=3, share=0.5)


@given(st.lists(st.tuples(st.floats(0, 60), st.booleans()), max_size=60))
def test_nothing_counts_longer_than_the_window_nor_less_than_most_of_it(
    ends: list[tuple[float, bool]],
) -> None:
    """The window moves on in sixths of its length."""
    share, now, told = Share(), 1000.0, []
    for gap_s, good in ends:
        now += gap_s
        (share.good if good else share.bad)(now, 30.0)
        told.append(now)
    least = sum(now - at < 25.0 for at in told)
    most = sum(now - at <= 30.0 for at in told)
    assert not share.poor(most + 1, 1.1)
    assert not least or share.poor(least, 1.1)


def test_what_was_counted_can_be_forgotten() -> None:
    share = Share()
    for _ in range(9):
        share.bad(1.0, 30.0)
    share.clear()
    assert not share.poor(1, 1.0)
