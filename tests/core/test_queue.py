"""Who waits, and whose turn it is: fair to flows, to priorities, and to those that wait long."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.core.policy import Attempt, Target
from router.core.queue import Flow, Queue, Waiting
from router.core.work import Priority, Work

INTERACTIVE, NORMAL, BATCH = Priority
_MOST = 4096
COSTS = st.floats(0.5, 100)


class Door:
    """Requests that come, go in and leave, as a scheduler has them do it; time in seconds."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self.queue = Queue()
        self.weights = weights or {}
        self.now = 0.0
        self.names: dict[Waiting, str] = {}
        self.flows: dict[str, Flow] = {}
        self.running: list[Waiting] = []

    def come(
        self, name: str, cost: float = 1.0, key: str = "m", priority: Priority = NORMAL
    ) -> Waiting:
        """One more of the flow that the first letter of its name tells."""
        who = name[0]
        flow = self.queue.flow(who, self.weights.get(who, 1.0), self.now)
        attempt = Attempt(Target(), work=Work(flow=who, priority=priority))
        one = self.queue.come(attempt, key, flow, cost, self.now)
        self.queue.push(one)
        self.names[one], self.flows[who] = name, flow
        return one

    def all_come(self, names: str, cost: float = 1.0) -> None:
        for name in names.split():
            self.come(name, cost)

    def next(self) -> Waiting:
        """The one whose turn it is gets a node."""
        one = self.queue.order(self.now)[0][0]
        assert self.queue.pop(one.attempt) is one
        self.queue.went(one, self.now)
        self.running.append(one)
        return one

    def end(self) -> Waiting:
        """The one that has had its node for longest gives it back."""
        one = self.running.pop(0)
        self.queue.ended(one, self.now)
        return one

    def drain(self) -> str:
        """The order in which all go that wait."""
        return " ".join(self.names[self.next()] for _ in range(len(self.queue)))


@pytest.mark.parametrize(
    ("come", "expected"),
    [
        ("a1 a2 a3", "a1 a2 a3"),
        ("a1 a2 a3 b1 b2 b3", "a1 b1 a2 b2 a3 b3"),
        ("a1 a2 a3 a4 b1", "a1 b1 a2 a3 a4"),
        ("a1 b1 c1 a2 b2 c2", "a1 b1 c1 a2 b2 c2"),
    ],
)
def test_flows_take_turns_and_each_keeps_its_own_order(come: str, expected: str) -> None:
    door = Door()
    door.all_come(come)
    assert door.drain() == expected


def test_a_flow_with_twice_the_weight_has_twice_as_many() -> None:
    door = Door({"a": 2.0})
    door.all_come("a1 a2 a3 a4 b1 b2")
    assert door.drain() == "a1 b1 a2 a3 b2 a4"


def test_a_flow_whose_requests_are_larger_has_fewer() -> None:
    door = Door()
    door.all_come("a1 a2", cost=3.0)
    door.all_come("b1 b2 b3 b4")
    assert door.drain() == "a1 b1 b2 b3 a2 b4"


def test_behind_a_flood_of_one_flow_another_is_next() -> None:
    door = Door()
    for i in range(300):
        door.come(f"flood{i}", cost=800.0)
    for _ in range(20):
        door.next()
    door.all_come("a1 a2")
    assert [door.names[door.next()][0] for _ in range(3)] == ["a", "a", "f"]


def test_who_was_idle_has_saved_nothing_up() -> None:
    door = Door()
    door.all_come("a1 b1")
    door.drain()
    door.all_come("b2 b3 b4 b5")
    door.drain()
    door.all_come("b6 b7 b8 a2 a3 a4")
    assert door.drain() == "a2 b6 a3 b7 a4 b8"


@given(
    st.lists(COSTS, min_size=5, max_size=60),
    st.lists(COSTS, min_size=5, max_size=60),
    st.sampled_from([0.5, 1.0, 3.0]),
)
def test_what_two_busy_flows_have_been_given_never_differs_by_more_than_a_request_of_each(
    costs: list[float], others: list[float], weight: float
) -> None:
    door = Door({"a": weight})
    spent = {one: cost / weight for cost in costs for one in [door.come("a", cost)]}
    spent |= {one: cost for cost in others for one in [door.come("b", cost)]}
    has, bound = {"a": 0.0, "b": 0.0}, max(costs) / weight + max(others)
    while all(flow.waiting for flow in door.flows.values()):
        one = door.next()
        has[one.flow.name] += spent[one]
        assert abs(has["a"] - has["b"]) <= bound + 1e-6


@given(st.lists(st.tuples(st.sampled_from("abcd"), COSTS), min_size=1, max_size=80))
def test_nobody_waits_for_more_than_one_round_of_those_that_were_there(
    come: list[tuple[str, float]],
) -> None:
    """While others come without end: until it goes, each of them is given at most what it has
    been given itself and one request more."""
    door = Door()
    first = door.come("z1", 1.0)
    turns = 0
    for who, cost in come * 3:
        door.come(who, cost)
        turns += 1
        if door.next() is first:
            break
    assert turns <= len({who for who, _ in come}) + 1


def test_one_that_had_to_wait_for_long_does_not_turn_time_back() -> None:
    door = Door()
    door.come("b1", priority=BATCH)
    for i in range(5):
        door.come(f"a{i}", priority=INTERACTIVE)
    assert door.drain() == "a0 a1 a2 a3 a4 b1"
    assert door.come("c1").start == 4.0


# What a request really took


def busy(guess: float, takes: Mapping[str, list[float]], slots: int = 1) -> Iterator[Door]:
    """A door that all come to at once, and where each has its node for as long as it takes; told
    of whenever one has gone."""
    door = Door()
    left = {door.come(who, guess): took for who, all_ in takes.items() for took in all_}
    ends: dict[Waiting, float] = {}
    while len(door.queue):
        while len(ends) < slots and len(door.queue):
            one = door.next()
            ends[one] = door.now + left[one]
            yield door
        first = min(ends, key=ends.__getitem__)
        door.now = ends.pop(first)
        door.running.remove(first)
        door.queue.ended(first, door.now)


TOOK = st.lists(st.floats(1.0, 40), min_size=5, max_size=40)


@given(TOOK, TOOK, st.sampled_from([0.1, 1.0, 10.0]))
def test_flows_get_the_same_time_if_guesses_were_not_ten_times_what_it_took(
    first: list[float], second: list[float], guess: float
) -> None:
    has, took = {"a": 0.0, "b": 0.0}, {"a": iter(first), "b": iter(second)}
    for door in busy(guess, {"a": first, "b": second}):
        who = door.running[-1].flow.name
        if not all(flow.waiting for flow in door.flows.values()):
            return
        has[who] += next(took[who])
        assert abs(has["a"] - has["b"]) <= max(first) + max(second) + 1e-6


def test_one_whose_requests_take_longer_than_guessed_has_fewer_on_several_slots() -> None:
    long, short = [5.0] * 100, [1.0] * 100
    for door in busy(1.0, {"a": long, "b": short}, slots=4):
        if not door.flows["b"].waiting:
            break
    went = {who: 100 - flow.waiting for who, flow in door.flows.items()}
    assert went["b"] == 100
    assert 16 <= went["a"] <= 28


def test_who_is_charged_less_in_the_end_goes_no_sooner_than_at_once() -> None:
    door = Door()
    door.come("a1", 50.0)
    door.come("b1", 20.0)
    door.come("b2", 20.0)
    for _ in range(3):
        door.next()
    waits = door.come("a2")
    assert waits.start == 50.0
    door.now = 6.0
    door.end()
    assert waits.start == door.running[-1].start == 20.0


def test_one_that_hung_is_charged_a_minute_at_most() -> None:
    door = Door()
    door.all_come("a1 b1")
    door.drain()
    door.now = 6000.0
    door.end()
    assert door.flows["a"].finish == 1.0 + 60.0


def test_nobody_is_charged_for_a_load() -> None:
    door = Door()
    door.all_come("a1 b1")
    door.next().load_s = 20.0
    door.now = 23.0
    door.end()
    assert door.flows["a"].finish == 3.0


def test_what_ended_at_once_was_not_for_nothing() -> None:
    door = Door()
    door.all_come("a1 a2 b1")
    door.next()
    door.end()
    assert door.drain() == "b1 a2"


def test_who_was_alone_owes_nothing() -> None:
    door = Door()
    door.come("a1", 5.0)
    door.next()
    door.now = 50.0
    door.end()
    assert door.flows["a"].finish == 5.0


def test_a_flow_that_waits_for_several_models_is_moved_in_each() -> None:
    door = Door()
    door.all_come("a0 b0")
    for name, key in (("a1", "x"), ("b1", "x"), ("a2", "y"), ("b2", "y")):
        door.come(name, key=key)
    for _ in range(2):
        door.next()
    door.now = 10.0
    door.end()
    assert [door.names[one] for one in door.queue.alike("x", 0.0)] == ["b1", "a1"]
    assert [door.names[one] for one in door.queue.alike("y", 0.0)] == ["b2", "a2"]


# Those that leave


def test_who_leaves_is_forgotten_and_its_flow_is_not_charged() -> None:
    door = Door()
    for _ in range(50):
        door.queue.leave(door.come("a", cost=9.0).attempt)
    door.all_come("a1 b1 a2 b2")
    assert door.drain() == "a1 b1 a2 b2"
    assert (len(door.queue), list(door.queue), door.queue.by_key) == (0, [], {})


def test_who_comes_after_one_that_left_is_not_before_those_of_its_flow_that_stay() -> None:
    door = Door()
    gone = [door.come("a1"), door.come("a2")]
    door.come("a3")
    for one in gone:
        door.queue.leave(one.attempt)
    door.all_come("a4 b1 b2 b3 b4")
    assert door.drain() == "b1 b2 a3 a4 b3 b4"


def test_who_does_not_wait_cannot_leave() -> None:
    door = Door()
    one = door.come("a1")
    door.next()
    door.queue.leave(one.attempt)
    assert door.queue.pop(one.attempt) is None
    assert (one.flow.waiting, one.flow.finish) == (0, 1.0)
    assert one.flow.held == {"m": 1}


# Priorities


def test_the_better_priority_goes_first_whatever_its_flow_has_had() -> None:
    door = Door()
    for name, priority in (("b1", BATCH), ("n1", NORMAL), ("a1", INTERACTIVE), ("a2", INTERACTIVE)):
        door.come(name, 100.0, priority=priority)
    assert door.drain() == "a1 a2 n1 b1"


@pytest.mark.parametrize(
    ("waited_s", "priority", "rank"),
    [
        (0, INTERACTIVE, 0),
        (0, NORMAL, 1),
        (0, BATCH, 2),
        (29, BATCH, 2),
        (30, BATCH, 1),
        (59, BATCH, 1),
        (60, BATCH, 0),
        (30, NORMAL, 0),
        (9000, NORMAL, 0),
        (9000, INTERACTIVE, 0),
    ],
)
def test_every_half_minute_is_worth_a_priority(
    waited_s: float, priority: Priority, rank: int
) -> None:
    one = Door().come("a", priority=priority)
    assert one.rank(waited_s)[0] == rank


@given(st.lists(st.tuples(st.sampled_from("abc"), COSTS, st.sampled_from(Priority)), min_size=1))
def test_so_many_go_before_one_as_stand_before_it(
    come: list[tuple[str, float, Priority]],
) -> None:
    door = Door()
    for who, cost, priority in come:
        door.come(who, cost, priority=priority)
    order = door.queue.alike("m", door.now)
    assert [door.queue.before(one, door.now) for one in order] == [*range(len(come))]


def test_one_that_has_waited_for_a_minute_goes_before_the_urgent() -> None:
    door = Door()
    door.come("b", priority=BATCH)
    door.now = 61.0
    last = door.come("a", 100.0, priority=INTERACTIVE)
    last.start += 1.0
    assert door.queue.before(last, door.now) == 1


@given(
    st.lists(st.tuples(st.sampled_from("abc"), COSTS, st.sampled_from(Priority)), min_size=1),
    st.sampled_from(Priority),
)
def test_no_priority_waits_for_ever(
    come: list[tuple[str, float, Priority]], priority: Priority
) -> None:
    """One comes and one goes each second: after a minute it is its turn, whatever comes."""
    door = Door()
    patient = door.come("z", 100.0, priority=priority)
    while door.now <= 60.0:
        for who, cost, other in come:
            door.now += 1.0
            door.come(who, cost, priority=other)
            if door.next() is patient:
                return
    pytest.fail("it still waits")


# Models


def keys(order: Iterable[Iterable[Waiting]]) -> list[str]:
    return ["".join(one.key for one in alike) for alike in order]


def test_those_for_one_model_stand_together_the_model_first_whose_turn_is_first() -> None:
    door = Door()
    for name, key in (("a1", "x"), ("a2", "y"), ("b1", "y"), ("a3", "x"), ("b2", "z")):
        door.come(name, key=key)
    queue = door.queue
    assert keys(queue.order(0.0)) == ["xx", "yy", "z"]
    assert [door.names[one] for one in queue.alike("y", 0.0)] == ["b1", "a2"]
    assert list(queue.alike("nobody waits for it", 0.0)) == []
    urgent = door.come("b3", key="z", priority=INTERACTIVE)
    assert queue.order(0.0)[0][0] is urgent
    assert queue.order(100.0)[0][0] is not urgent


# Flows


@pytest.mark.parametrize(("after_s", "active"), [(0, 3), (60, 3), (61, 1)])
def test_a_flow_that_was_not_here_for_a_minute_is_forgotten(after_s: float, active: int) -> None:
    door = Door()
    door.all_come("a1 b1")
    door.drain()
    door.end()
    door.end()
    door.now += after_s
    door.come("c1")
    assert len(door.queue.flows) == active


def test_it_is_forgotten_too_when_no_one_new_comes() -> None:
    """Else the one that is left is held to a share for those that are gone."""
    door = Door()
    door.all_come("a1")
    door.next()
    door.end()
    door.now = 1.0
    door.all_come("b1 b2")
    door.queue.order(62.0)
    assert len(door.queue.flows) == 1


def test_nothing_is_forgotten_where_there_is_nothing() -> None:
    assert list(Queue().order(0.0)) == []
    assert (len(Queue().flows), len(Queue())) == (0, 0)


def test_there_are_never_more_idle_flows_than_the_most() -> None:
    queue = Queue()
    for i in range(_MOST + 100):
        queue.flow(f"flow {i}", 1.0, 0.0)
    assert len(queue.flows) <= _MOST + 1


def test_a_flow_that_comes_back_after_it_was_forgotten_starts_with_the_others() -> None:
    door = Door()
    door.come("a", cost=1e6)
    door.next()
    door.end()
    door.now = 100.0
    door.all_come("b1 b2")
    door.drain()
    door.all_come("b3 b4 a1")
    assert door.drain() == "a1 b3 b4"


def test_it_is_known_how_many_of_a_flow_wait() -> None:
    door = Door()
    door.all_come("a1 a2 b1")
    door.next()
    assert {who: flow.waiting for who, flow in door.flows.items()} == {"a": 1, "b": 1}


def test_what_a_flow_holds_is_known_by_model() -> None:
    door = Door()
    for name, key in (("a1", "x"), ("a2", "y"), ("a3", "x")):
        door.come(name, key=key)
    door.drain()
    held = door.flows["a"].held
    assert held == {"x": 2, "y": 1}
    door.now = 9.0
    door.end()
    assert (held, door.flows["a"].active) == ({"x": 1, "y": 1}, 9.0)
    door.end()
    door.end()
    assert held == {}


def test_a_weight_may_change() -> None:
    queue = Queue()
    queue.flow("a", 1.0, 0.0)
    assert queue.flow("a", 3.0, 5.0).weight == 3.0


class Queueing(RuleBasedStateMachine):
    """Whatever comes, goes, leaves and ends: books balance, no flow is lost that is here."""

    def __init__(self) -> None:
        super().__init__()
        self.door = Door()
        self.waiting: dict[Waiting, Flow] = {}

    @rule(
        who=st.sampled_from("abcdefgh"),
        cost=COSTS,
        key=st.sampled_from("xyz"),
        priority=st.sampled_from(Priority),
    )
    def come(self, who: str, cost: float, key: str, priority: Priority) -> None:
        one = self.door.come(who, cost, key, priority)
        self.waiting[one] = one.flow

    @rule(after_s=st.floats(0, 90))
    def wait(self, after_s: float) -> None:
        self.door.now += after_s

    @precondition(lambda self: self.waiting)
    @rule()
    def go(self) -> None:
        del self.waiting[self.door.next()]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(sorted(self.waiting)))
        self.door.queue.leave(one.attempt)
        del self.waiting[one]

    @precondition(lambda self: self.door.running)
    @rule()
    def end(self) -> None:
        self.door.end()

    @rule(who=st.sampled_from("abcdefgh"))
    def a_flow_that_holds_or_waits_is_the_same_again(self, who: str) -> None:
        busy = {one.flow for one in [*self.waiting, *self.door.running] if one.flow.name == who}
        if busy:
            assert busy == {self.door.queue.flow(who, 1.0, self.door.now)}

    @invariant()
    def books_balance(self) -> None:
        queue = self.door.queue
        assert (len(queue), set(queue)) == (len(self.waiting), set(self.waiting))
        order = queue.order(self.door.now)
        assert {one for alike in order for one in alike} == set(self.waiting)
        for alike in order:
            for priority in Priority:
                equals = [one for one in alike if one.attempt.work.priority is priority]
                assert equals == sorted(equals)
            assert {one.key for one in alike} == {alike[0].key}
        waits = Counter(self.waiting.values())
        holds = Counter((one.flow, one.key) for one in self.door.running)
        for flow in self.door.flows.values():
            assert flow.waiting == waits[flow]
            assert flow.held == {key: many for (one, key), many in holds.items() if one is flow}

    @invariant()
    def nobody_of_a_flow_starts_after_its_end(self) -> None:
        for one in self.waiting:
            assert one.start <= one.flow.finish + 1e-9


TestQueueing = Queueing.TestCase
