"""How many requests a model serves at once, learned from a node that does not tell it."""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.slots import Slots

SEEDS = st.integers(0, 2**32)


@dataclass
class Job:
    """A request: how many were before it, and when it was sent, began and ended on the node."""

    ahead: int
    sent: float
    first: float
    end: float
    waited_s: float


@dataclass
class Loaded:
    """A model on a node that serves `parallel` at once, first come first served, and a router in
    front that keeps it as busy as it believes that it may. `tells`: final records have
    durations; `streams`: first records come before the last."""

    parallel: int
    service_s: float = 4.0
    chance: Random = field(default_factory=lambda: Random(1))
    tells: bool = True
    streams: bool = True
    slots: Slots = field(default_factory=Slots)
    now: float = 0.0
    free: list[float] = field(default_factory=list)  # when each slot of the node is
    jobs: list[Job] = field(default_factory=list)
    sure: list[int] = field(default_factory=list)  # after each end
    most: int = 0

    def __post_init__(self) -> None:
        self.free = [0.0] * self.parallel

    def send(self) -> None:
        """All that the router dares to send at once."""
        while len(self.jobs) < self.slots.sure + self.slots.tries(self.now):
            ahead = len(self.jobs)
            self.slots.lease(ahead, self.now)
            start = max(self.now, self.free.pop(0))
            service_s = self.service_s * self.chance.uniform(0.3, 1.7)
            insort(self.free, start + service_s)
            first = start + (0.1 * service_s if self.streams else service_s)
            self.jobs.append(Job(ahead, self.now, first, start + service_s, start - self.now))
            self.most = max(self.most, len(self.jobs))

    def end(self) -> None:
        """What happens until the next request has ended, with that."""
        job = min(self.jobs, key=lambda one: one.end)
        begun = [one for one in self.jobs if self.now <= one.first <= job.end]
        for one in sorted(begun, key=lambda one: one.first):
            self.slots.began(one.ahead, one.sent, one.first)
        self.now = job.end
        self.jobs.remove(job)
        self.slots.freed(self.now)
        self.slots.ended(job.ahead)
        if self.tells:
            overhead_s = self.chance.uniform(0.0, 0.03)
            total_s = job.end - job.sent
            self.slots.learn(job.ahead, job.waited_s + overhead_s, total_s, self.now)
        self.sure.append(self.slots.sure)

    def serve(self, requests: int) -> "Loaded":
        for _ in range(requests):
            self.send()
            self.end()
        return self

    @property
    def converged(self) -> int:
        """After how many requests it was never wrong again."""
        return max(
            (at + 1 for at, sure in enumerate(self.sure) if sure != self.parallel), default=0
        )


PARALLEL = st.integers(1, 5)


@given(SEEDS, PARALLEL, st.floats(0.2, 30.0), st.booleans(), st.booleans())
def test_it_never_believes_in_more_than_there_are(
    seed: int, parallel: int, service_s: float, tells: bool, streams: bool
) -> None:
    node = Loaded(parallel, service_s, Random(seed), tells, streams).serve(150)
    assert max(node.sure) <= parallel
    assert node.most <= parallel + 1, "one on trial"
    assert node.sure == sorted(node.sure), "it does not oscillate"


@pytest.mark.parametrize(
    ("parallel", "requests"), [(1, 0), (2, 10), (3, 20), (4, 40), (8, 200), (16, 800)]
)
def test_it_finds_out_within_some_tens_of_requests(parallel: int, requests: int) -> None:
    nodes = [Loaded(parallel, chance=Random(seed)).serve(requests + 50) for seed in range(20)]
    assert max(node.converged for node in nodes) <= requests


@pytest.mark.parametrize("parallel", [2, 3])
def test_streams_tell_it_without_durations(parallel: int) -> None:
    assert Loaded(parallel, tells=False).serve(200).converged < 100


def test_once_there_trials_get_rare() -> None:
    node = Loaded(4).serve(50)
    before = node.now
    trials = 0
    for _ in range(2000):
        node.send()
        trials += max(one.ahead for one in node.jobs) == 4
        node.end()
    assert node.now - before > 1800
    assert trials < 40


@given(SEEDS, st.integers(2, 6), st.integers(1, 5))
def test_it_learns_that_there_are_fewer_now(seed: int, before: int, after: int) -> None:
    node = Loaded(max(before, after), chance=Random(seed)).serve(400)
    node.jobs, node.free, node.parallel = [], [node.now] * after, after
    node.slots.trying = False
    node.serve(150)
    assert set(node.sure[-50:]) == {after}


@given(SEEDS)
def test_it_learns_that_there_are_more_now(seed: int) -> None:
    node = Loaded(2, chance=Random(seed)).serve(50)
    node.free, node.parallel = [*node.free, node.now, node.now], 4
    assert node.serve(500).slots.sure == 4


# One by one.


def trial(slots: Slots, now: float, *, waited_s: float = 0.0, others: Iterable[float] = ()) -> None:
    """One more than is sure comes at `now`, and ends 5 s after; `others` end so long after."""
    ahead = slots.sure
    slots.lease(ahead, now)
    for at in others:
        slots.freed(now + at)
    slots.freed(now + 5.0)
    slots.ended(ahead)
    slots.learn(ahead, waited_s, 5.0, now + 5.0)


def with_sure(sure: int) -> Slots:
    slots = Slots()
    while slots.sure < sure:
        trial(slots, 0.0)
    return slots


def test_it_tells_its_state_in_one_line() -> None:
    slots = Slots()
    assert repr(slots) == "<Slots 1>"
    slots.lease(1, 0.0)
    assert repr(slots) == "<Slots 1+>"
    slots.ended(0)
    assert repr(slots) == "<Slots 1+>", "another has ended"
    slots.ended(1)
    assert repr(slots) == "<Slots 1>"


def test_one_at_a_time_is_tried() -> None:
    slots = Slots()
    assert slots.tries(0.0) == 1
    slots.lease(0, 0.0)
    assert slots.tries(0.0) == 1
    slots.lease(1, 0.0)
    assert slots.tries(0.0) == 0


@pytest.mark.parametrize(
    ("waited_s", "others", "again"),
    [
        (0.0, [], 105.0),
        (0.19, [], 105.0),
        (0.9, [], 105.0),  # nobody's end explains it, so it was no wait
        (0.0, [0.06], 105.0),
        (0.05, [0.2], 105.0),
        (0.0, [0.04], 110.0),
        (0.15, [0.2], 110.0),
        (0.21, [0.2], 125.0),
        (3.0, [2.9], 125.0),
        (1.1, [], 125.0),
    ],
)
def test_what_a_trial_tells(waited_s: float, others: list[float], again: float) -> None:
    """The next one comes at once after one that went well, ten seconds after the beginning of one
    that tells nothing, and later after the end of one that failed."""
    slots = Slots()
    trial(slots, 100.0, waited_s=waited_s, others=others)
    assert slots.sure == 1
    assert not slots.tries(again - 0.01)
    assert slots.tries(again)


def test_a_trial_that_never_tells_is_made_again_ever_more_rarely() -> None:
    slots = Slots()
    at, waits = 0.0, []
    for _ in range(12):
        slots.lease(1, at)
        slots.ended(1)
        waits.append(next(s for s in (10 * 2**n for n in range(12)) if slots.tries(at + s)))
        at += waits[-1]
        if waits[-1] > 2000:
            break
    assert waits == [10, 20, 40, 80, 160, 320, 640, 1280, 2560]
    slots.lease(1, at)
    slots.lease(1, at)
    assert slots.tries(at + 1e9) == 0, "it has not ended"
    slots.ended(1)
    assert not slots.tries(at + 3599)
    assert slots.tries(at + 3600) == 1


def test_three_good_signs_in_a_row_are_one_slot() -> None:
    slots = Slots()
    trial(slots, 0.0)
    trial(slots, 10.0)
    trial(slots, 20.0, waited_s=5.0)
    trial(slots, 90.0)
    trial(slots, 100.0)
    assert slots.sure == 1
    trial(slots, 110.0)
    assert slots.sure == 2


def test_a_trial_that_is_sure_before_its_end_is_none_any_more() -> None:
    slots = Slots()
    trial(slots, 0.0)
    trial(slots, 10.0)
    slots.lease(1, 20.0)
    slots.began(1, 20.0, 21.0)
    assert repr(slots) == "<Slots 2>"
    assert slots.tries(21.0) == 1


def test_an_answer_that_begins_after_anothers_end_tells_nothing() -> None:
    slots = Slots()
    for at in (0.0, 20.0, 60.0):
        slots.lease(1, at)
        slots.freed(at + 1.0)
        slots.began(1, at, at + 1.0)
        slots.ended(1)
    assert slots.sure == 1
    slots.began(1, 100.0, 105.0)
    slots.began(1, 100.0, 105.0)
    slots.began(1, 100.0, 105.0)
    assert slots.sure == 2


def test_of_too_many_ends_none_is_known_to_be_the_first() -> None:
    slots = Slots()
    for at in range(256):
        slots.freed(10.0 + at)
    for _ in range(3):
        slots.learn(1, 0.0, 300.0, 300.0)
        slots.began(1, 0.0, 1.0)
    assert slots.sure == 1


def test_three_in_a_row_that_should_not_have_waited_are_one_slot_less() -> None:
    slots = with_sure(4)
    for _ in range(2):
        slots.learn(3, 5.0, 10.0, 100.0)
    slots.learn(3, 0.0, 10.0, 100.0)
    for _ in range(2):
        slots.learn(3, 5.0, 10.0, 100.0)
        slots.learn(2, 0.0, 10.0, 100.0)  # that is no news
    assert slots.sure == 4
    slots.learn(1, 5.0, 10.0, 100.0)
    assert slots.sure == 3
    assert not slots.tries(109.0)
    assert slots.tries(110.0)


def test_nobody_that_is_alone_waits_for_a_slot_of_ours() -> None:
    slots = with_sure(2)
    for _ in range(9):
        slots.learn(0, 5.0, 10.0, 100.0)
    assert slots.sure == 2


def test_there_is_a_most() -> None:
    slots = with_sure(64)
    assert slots.tries(1e9) == 0
    for _ in range(9):
        slots.learn(64, 0.0, 10.0, 1e9)
    assert slots.sure == 64
