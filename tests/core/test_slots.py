"""How many requests a model serves at once, learned from a node that does not tell it."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count, groupby, pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.slots import LINE, Slots

SEEDS = range(10)
PARALLEL = [1, 2, 3, 4, 6, 8, 12, 16]


@dataclass(eq=False)
class Job:
    """A request: its place in the line, and when it came, got a slot and ended on the node."""

    place: int
    service_s: float
    came: float = 0.0
    start: float = 0.0
    end: float = 0.0

    @property
    def waited_s(self) -> float:
        return self.start - self.came


@dataclass(frozen=True)
class Traffic:
    """What answers take (on average, from 0.3 to 1.7 times), and up to how much is added to that:
    by the node before it gets in line for a slot, and on the way to the node and back. `load`: how
    much is asked for, of what the node serves; 0: more than it ever serves. `tells`: final records
    have durations; `streams`: first records come before the last."""

    service_s: float = 4.0
    overhead_s: float = 0.0
    lag_s: float = 0.0
    load: float = 0.0
    tells: bool = True
    streams: bool = True


LONG = Traffic(4.0, overhead_s=0.03, lag_s=0.002)
HUNDREDTHS = Traffic(0.02, overhead_s=0.002, lag_s=0.001)
TRAFFIC = {
    "30 s": Traffic(30.0, overhead_s=0.03, lag_s=0.002),
    "4 s": LONG,
    "4 s, sparse": Traffic(4.0, overhead_s=0.03, lag_s=0.002, load=0.7),
    "4 s, whole": Traffic(4.0, overhead_s=0.03, lag_s=0.002, streams=False),
    "0.1 s": Traffic(0.1, overhead_s=0.01, lag_s=0.002),
    "0.1 s, whole": Traffic(0.1, overhead_s=0.01, lag_s=0.002, streams=False),
    "0.02 s": HUNDREDTHS,
    "0.02 s, sparse and whole": Traffic(
        0.02, overhead_s=0.002, lag_s=0.001, load=0.7, streams=False
    ),
}


@dataclass
class Loaded:
    """A model on a node that serves `parallel` at once, first come first served, and a router in
    front that sends as many as it believes that it may."""

    parallel: int
    traffic: Traffic = Traffic()
    chance: Random = field(default_factory=lambda: Random(1))
    slots: Slots = field(default_factory=Slots)
    now: float = 0.0
    flight: list[Job] = field(default_factory=list)
    line: deque[Job] = field(default_factory=deque)  # on the node, without a slot
    running: int = 0
    waiting: int = 0  # for the router
    sure: list[int] = field(default_factory=list)  # after each end
    most: int = 0
    trials: int = 0
    waited_s: float = 0.0
    _todo: list[tuple[float, int, Callable[[Job], None], Job]] = field(default_factory=list)
    _order: "count[int]" = field(default_factory=count)

    def __post_init__(self) -> None:
        self._at(self.now, self._ask if self.traffic.load else self._send, Job(0, 0.0))

    def serve(self, requests: int) -> "Loaded":
        until = len(self.sure) + requests
        while len(self.sure) < until:
            self.now, _, what, job = heappop(self._todo)
            what(job)
        return self

    def restart(self, parallel: int) -> None:
        """The node ends, with all that is there, and comes back with other settings."""
        for job in self.flight:
            self.slots.ended(job.place, self.now)
        self.flight, self.line, self.running, self.parallel = [], deque(), 0, parallel
        self._todo = []
        self.__post_init__()

    def _at(self, when: float, what: Callable[[Job], None], job: Job) -> None:
        heappush(self._todo, (when, next(self._order), what, job))

    def _way_s(self) -> float:
        return self.chance.uniform(0.2, 1.0) * self.traffic.lag_s

    def _ask(self, job: Job) -> None:
        self.waiting += 1
        self._send(job)
        often = self.traffic.load * self.parallel / self.traffic.service_s
        self._at(self.now + self.chance.expovariate(often), self._ask, job)

    def _room(self) -> bool:
        ahead, sure = len(self.flight), self.slots.sure
        return ahead < sure + (self.slots.tries(self.now) if ahead >= sure else 0)

    def _send(self, _: Job) -> None:
        while (self.waiting or not self.traffic.load) and self._room():
            self.waiting -= bool(self.traffic.load)
            self.trials += len(self.flight) >= self.slots.sure
            place = self.slots.lease(len(self.flight), self.now)
            job = Job(place, self.traffic.service_s * self.chance.uniform(0.3, 1.7))
            self.flight.append(job)
            self.most = max(self.most, len(self.flight))
            self._at(self.now + self._way_s(), self._come, job)

    def _come(self, job: Job) -> None:
        job.came = self.now
        self._at(self.now + self.chance.uniform(0.0, self.traffic.overhead_s), self._line_up, job)

    def _line_up(self, job: Job) -> None:
        self.line.append(job)
        self._start()

    def _start(self) -> None:
        while self.line and self.running < self.parallel:
            job = self.line.popleft()
            self.running += 1
            job.start, job.end = self.now, self.now + job.service_s
            first_s = 0.1 * job.service_s if self.traffic.streams else job.service_s
            seen = self.now + first_s + self._way_s()
            self._at(seen, self._began, job)
            self._at(job.end, self._free, job)
            self._at(max(seen, job.end + self._way_s()), self._ended, job)

    def _free(self, _: Job) -> None:
        self.running -= 1
        self._start()

    def _began(self, job: Job) -> None:
        self.slots.began(job.place)

    def _ended(self, job: Job) -> None:
        self.flight.remove(job)
        self.slots.ended(job.place, self.now)
        if self.traffic.tells:
            self.slots.learn(job.place, job.waited_s, job.end - job.came, self.now)
        self.sure.append(self.slots.sure)
        self.waited_s += job.waited_s
        self._send(job)

    def right(self, within: int = 0, since: int = 0) -> int:
        """After how many requests it was never wrong again, by more than that."""
        wrong = (
            at + 1
            for at, sure in enumerate(self.sure[since:])
            if abs(sure - self.parallel) > within
        )
        return max(wrong, default=0)

    @property
    def falls(self) -> int:
        """How often it came to believe in less than before."""
        return sum(b < a for a, b in pairwise(sure for sure, _ in groupby(self.sure)))


def loaded(parallel: int, traffic: Traffic, seed: int, requests: int) -> Loaded:
    return Loaded(parallel, traffic, Random(seed)).serve(requests)


@given(
    st.integers(0, 2**32), st.integers(1, 16), st.floats(0.02, 30.0), st.floats(0.3, 0.9),
    st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_it_never_believes_in_more_than_there_are(
    seed: int,
    parallel: int,
    service_s: float,
    load: float,
    sparse: bool,
    tells: bool,
    streams: bool,
) -> None:
    """Where all times are exact. Until one has waited, half as many more are tried at once."""
    traffic = Traffic(service_s, load=load * sparse, tells=tells, streams=streams)
    node = loaded(parallel, traffic, seed, 150)
    assert max(node.sure) <= parallel
    assert node.most <= parallel + max(1, parallel // 2)
    assert node.falls == 0


@pytest.mark.parametrize(
    ("parallel", "requests"), [(1, 0), (2, 15), (3, 30), (4, 45), (6, 60), (8, 80), (16, 90)]
)
@pytest.mark.parametrize("kind", [kind for kind in TRAFFIC if kind.startswith(("30", "4"))])
def test_it_finds_out_within_some_tens_of_requests(kind: str, parallel: int, requests: int) -> None:
    nodes = [loaded(parallel, TRAFFIC[kind], seed, 300) for seed in SEEDS]
    assert sorted(node.right(parallel // 16) for node in nodes)[-2] <= requests


@pytest.mark.parametrize(
    ("parallel", "requests"), [(1, 0), (2, 15), (3, 30), (4, 45), (6, 60), (8, 60), (16, 90)]
)
@pytest.mark.parametrize("kind", [kind for kind in TRAFFIC if kind.startswith("0")])
def test_short_answers_tell_it_as_well(kind: str, parallel: int, requests: int) -> None:
    """To an eighth: what one more or less makes others wait is less than what times may differ."""
    nodes = [loaded(parallel, TRAFFIC[kind], seed, 300) for seed in SEEDS]
    assert sorted(node.right(parallel // 8) for node in nodes)[-2] <= requests


@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize("kind", TRAFFIC)
def test_it_does_not_oscillate(kind: str, parallel: int) -> None:
    nodes = [loaded(parallel, TRAFFIC[kind], seed, 2000) for seed in range(2)]
    for node in nodes:
        assert node.falls <= 2
        right = [abs(sure - parallel) <= parallel // 8 for sure in node.sure[500:]]
        assert right.count(True) > 0.9 * len(right)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_what_is_tried_in_vain_costs_little(parallel: int) -> None:
    """All that wait on the node for a slot, instead of here."""
    nodes = [loaded(parallel, Traffic(4.0), seed, 200) for seed in SEEDS]
    mean_s = sum(node.waited_s for node in nodes) / len(nodes)
    assert mean_s < (16 if parallel == 1 else 8) * 4.0


@pytest.mark.parametrize("parallel", [1, 4, 16])
def test_once_there_trials_get_rare(parallel: int) -> None:
    node = loaded(parallel, LONG, 1, 500)
    before, began = node.trials, node.now
    node.serve(2000)
    assert node.trials - before < 20 + (node.now - began) / 100


@pytest.mark.parametrize("parallel", [2, 3])
def test_streams_tell_it_without_durations(parallel: int) -> None:
    node = loaded(parallel, Traffic(tells=False), 1, 200)
    assert node.right() < 20


@pytest.mark.parametrize("parallel", [1, 4])
def test_who_ends_before_others_tells_it_without_anything(parallel: int) -> None:
    node = loaded(parallel, Traffic(tells=False, streams=False), 1, 500)
    assert min(parallel, 2) <= node.sure[-1] <= parallel
    assert node.trials < 100


@pytest.mark.parametrize(("before", "after"), [(8, 1), (8, 4), (4, 3), (2, 1), (16, 2), (16, 8)])
@pytest.mark.parametrize("traffic", [LONG, HUNDREDTHS])
def test_it_learns_that_there_are_fewer_now(traffic: Traffic, before: int, after: int) -> None:
    for seed in SEEDS:
        node = loaded(before, traffic, seed, 300)
        node.restart(after)
        node.serve(60)
        assert abs(node.sure[-1] - after) <= after // 8


@pytest.mark.parametrize(("before", "after"), [(1, 4), (2, 4), (2, 8), (4, 16)])
def test_it_learns_that_there_are_more_now(before: int, after: int) -> None:
    for seed in SEEDS:
        node = loaded(before, LONG, seed, 100)
        node.restart(after)
        node.serve(1000)
        assert node.sure[-1] == after


# One by one.


def one(
    slots: Slots, now: float, ahead: int, *, waited_s: float = 0.0, others: Sequence[float] = ()
) -> None:
    """A request comes at `now` with so many before it, of which some end so long after. Then it
    takes 5 s."""
    place = slots.lease(ahead, now)
    for after_s in sorted(others):
        slots.ended(-1, now + after_s)
    slots.ended(place, now + waited_s + 5.0)
    slots.learn(place, waited_s, waited_s + 5.0, now + waited_s + 5.0)


def begun(slots: Slots, ahead: int, now: float) -> None:
    """The answer to one begins that has so many before it, and ends."""
    place = slots.lease(ahead, now)
    slots.began(place)
    slots.ended(place, now)


def with_sure(sure: int) -> Slots:
    """That was long before."""
    slots, at = Slots(), -1e6
    while slots.sure < sure:
        one(slots, at, slots.sure)
        at += 10.0
    return slots


def rested(slots: Slots) -> Slots:
    """Two trials have failed, so that it does not rise any more. The second ended at 0."""
    one(slots, -30.0, 0)
    for at in (-16.0, -6.0):
        one(slots, at, slots.sure, waited_s=1.0, others=[1.0])
    return slots


def test_it_tells_its_state_in_one_line() -> None:
    slots = Slots()
    assert repr(slots) == "<Slots 1+>"
    rested(slots)
    assert repr(slots) == "<Slots 1>"
    place = slots.lease(1, 100.0)
    assert repr(slots) == "<Slots 1+>"
    slots.ended(place - 1, 101.0)
    assert repr(slots) == "<Slots 1+>", "another has ended"
    slots.ended(place, 101.0)
    assert repr(slots) == "<Slots 1>"


@pytest.mark.parametrize(
    ("waited_s", "others", "sure"),
    [
        (0.0, [], 2),
        (0.04, [], 2),
        (0.9, [], 2),  # nobody's end explains it, so it was no wait
        (0.0, [0.06], 2),
        (0.0, [0.04], 1),  # it may have ended before the other came to the node
        (1.0, [1.2], 2),
        (1.0, [1.0], 1),
        (1.0, [0.5], 1),  # that one had ended when it began
    ],
)
def test_what_trials_tell(waited_s: float, others: list[float], sure: int) -> None:
    slots = Slots()
    one(slots, -100.0, 0)
    for at in range(3):
        one(slots, 100.0 * at, 1, waited_s=waited_s, others=others)
    assert slots.sure == sure


def test_three_good_signs_in_a_row_make_them_sure() -> None:
    slots = Slots()
    one(slots, 0.0, 1)
    one(slots, 10.0, 1)
    one(slots, 20.0, 1, waited_s=1.0, others=[1.0])
    one(slots, 30.0, 1)
    one(slots, 40.0, 1)
    assert slots.sure == 1
    one(slots, 50.0, 1)
    assert slots.sure == 2


def test_as_many_are_sure_as_three_tell() -> None:
    slots = with_sure(4)
    one(slots, 0.0, 5)
    one(slots, 10.0, 6)
    one(slots, 20.0, 6)
    assert slots.sure == 6
    one(slots, 30.0, 8)
    assert slots.sure == 7, "as the two before have told as well"


def test_half_as_many_more_are_tried_at_once_until_one_has_waited() -> None:
    assert [with_sure(sure).tries(0.0) for sure in range(1, 10)] == [1, 1, 1, 2, 2, 3, 3, 4, 4]
    slots = with_sure(6)
    one(slots, 0.0, 8, waited_s=1.0, others=[1.0])
    assert (slots.sure, slots.tries(6.0)) == (6, 1)
    one(slots, 10.0, 8, waited_s=1.0, others=[1.0])
    one(slots, 20.0, 8, waited_s=1.0, others=[1.0])
    assert (slots.sure, slots.tries(26.0)) == (8, 1), "by those that have waited for the ninth"


def test_after_two_in_vain_one_is_tried_at_a_time_and_ever_more_rarely() -> None:
    slots, at, waits = rested(with_sure(4)), 0.0, []
    for _ in range(7):
        waits.append(next(s for s in range(999) if slots.tries(at + s)))
        at += waits[-1]
        place = slots.lease(4, at)
        assert slots.tries(at + 1e9) == 0, "it has not ended"
        slots.ended(-1, at + 1.0)
        slots.ended(place, at + 6.0)
        slots.learn(place, 1.0, 6.0, at + 6.0)
    assert waits == [10, 26, 46, 86, 166, 306, 306]


def test_one_that_went_well_is_followed_by_others_at_once() -> None:
    slots = rested(with_sure(4))
    assert not slots.tries(9.0)
    one(slots, 100.0, 4)
    assert slots.tries(106.0) == 1
    slots.lease(4, 106.0)
    assert slots.tries(106.0) == 1
    one(slots, 120.0, 4)
    one(slots, 140.0, 4)
    assert slots.sure == 5


def test_trials_that_tell_nothing_are_made_ever_more_rarely() -> None:
    slots, at, times = Slots(), 0.0, []
    for _ in range(60):
        slots.ended(slots.lease(1, at), at)
        while not slots.tries(at):
            at += 1.0
        times.append(at)
    between = [b - a for a, b in pairwise(times)]
    assert between[:8] == [0, 0, 0, 0, 0, 0, 0, 10]
    assert [(s, len([*same])) for s, same in groupby(between[8:])][:6] == [
        (20, 4), (40, 4), (80, 4), (160, 4), (300, 35),
    ]  # fmt: skip


def test_first_records_tell_it_until_durations_do() -> None:
    slots = Slots()
    for at in range(3):
        begun(slots, 1, at)
    assert slots.sure == 2
    slots = Slots()
    one(slots, 0.0, 0)
    for at in range(9):
        begun(slots, 1, 10.0 + at)
    assert slots.sure == 1, "one may have overtaken another"
    for at in range(3):
        begun(slots, 2, 20.0 + at)
    assert slots.sure == 2


def test_a_request_counts_once() -> None:
    slots = Slots()
    place = slots.lease(1, 0.0)
    for _ in range(9):
        slots.began(place)
    slots.ended(place, 5.0)
    slots.learn(place, 0.0, 5.0, 5.0)
    assert slots.sure == 1


def test_places_in_another_line_tell_nothing() -> None:
    slots, other = Slots(LINE), Slots(2 * LINE)
    for at in range(9):
        place = other.lease(at, 0.0)
        slots.learn(place, 0.0, 1.0, 1.0)
        other.learn(slots.lease(at, 0.0), 0.0, 1.0, 1.0)
    assert slots.sure == other.sure == 1


def test_of_too_many_ends_none_is_known_to_be_the_first() -> None:
    slots = Slots()
    for at in range(256):
        slots.ended(-1, 10.0 + at)
    for at in range(9):
        place = slots.lease(1, 0.0)
        slots.ended(place, 300.0 + at)
        slots.learn(place, 0.0, 300.0 + at, 300.0 + at)
    assert slots.sure == 1


def test_what_is_spent_on_every_answer_is_no_wait() -> None:
    slots = Slots()
    for at in range(0, 900, 100):
        one(slots, at, 0, waited_s=2.0)
    for at in range(1000, 1300, 100):
        one(slots, at, 1, waited_s=2.0, others=[2.0])
    assert slots.tries(1300.0) == 1, "none of them has waited"


def test_more_that_waited_in_vain_than_that_did_not_are_as_few_as_they_tell() -> None:
    slots = rested(with_sure(4))
    for at in (100.0, 200.0):
        one(slots, at, 3, waited_s=1.0, others=[1.0])
    one(slots, 300.0, 3, others=[0.01])
    one(slots, 400.0, 3, waited_s=1.0, others=[1.0])
    assert slots.sure == 4
    one(slots, 500.0, 3)
    for at in (600.0, 700.0):
        one(slots, at, 3, waited_s=1.0, others=[1.0])
    assert slots.sure == 4
    one(slots, 800.0, 3, waited_s=1.0, others=[0.5, 1.0])
    assert slots.sure == 3


def test_it_takes_more_signs_to_believe_again_in_what_was_wrong() -> None:
    slots = with_sure(4)
    for at in (0.0, 10.0, 20.0):
        one(slots, at, 3, waited_s=1.0, others=[1.0])
    assert slots.sure == 3
    signs = 0
    while slots.sure == 3:
        signs += 1
        one(slots, 100.0 * signs, 3)
    assert signs == 6


def test_at_once_it_comes_down_by_half_at_most() -> None:
    slots = with_sure(9)
    for at in (0.0, 10.0, 20.0):
        one(slots, at, 8, waited_s=1.0, others=[0.1] * 6 + [1.0])
    assert slots.sure == 4, "and not two"


def test_nobody_that_is_alone_waits_for_a_slot_of_ours() -> None:
    slots = with_sure(2)
    for at in range(0, 90, 10):
        one(slots, at, 0, waited_s=1.0, others=[1.0])
    assert slots.sure == 2


def test_there_is_a_most() -> None:
    slots = with_sure(60)
    assert slots.sure == 60
    assert slots.tries(0.0) == 4
    for at in (0.0, 10.0, 20.0):
        one(slots, at, 80)
    assert slots.sure == 64
    assert slots.tries(1e9) == 0
