"""Who may have nodes of later pools, and when; and pools of which each has its own policy.

Times are those of `test_scheduler`: a request takes one second unless it says otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

import pytest

from router.core import reach
from router.core.policy import Eligible
from router.core.types import (
    Failure,
    FailureKind,
    Observation,
    Outcome,
    Policy,
    PoolSpec,
    Reason,
    Refusal,
    Resilience,
    Sign,
    Topology,
)
from router.core.work import Priority
from tests.core.build import node, spec
from tests.core.test_scheduler import Has, Yard, terms, url

LEAST, DELAY = Policy.LEAST_IN_FLIGHT, Policy.EXPECTED_DELAY
LONG = 1000  # tokens: ten seconds


@dataclass(frozen=True)
class Of:
    """A pool: its nodes by name, its policy, and after how long it spills."""

    nodes: Mapping[str, Has] = field(default_factory=dict)
    policy: Policy | None = None
    spill_after_s: float = inf


def of(policy: Policy | None = None, spill_after_s: float = inf, **nodes: Has) -> Of:
    return Of(nodes, policy, spill_after_s)


class Pools(Yard):
    """A yard with several pools."""

    def __init__(self, *pools: Of, policy: Policy = DELAY) -> None:
        self.pools = pools
        super().__init__(policy, **{name: has for one in pools for name, has in one.nodes.items()})

    def topology(self, policy: Policy, **nodes: Has) -> Topology:
        assert not nodes
        pools = tuple(
            PoolSpec(
                f"pool-{i}", tuple(has.spec(name) for name, has in one.nodes.items()),
                one.policy, one.spill_after_s,
            )
            for i, one in enumerate(self.pools)
        )  # fmt: skip
        rules = Resilience(budget_least=1)
        return Topology(pools, policy=policy, resilience=rules, up_after=1)

    def change(self, *pools: Of) -> None:
        self.pools = pools
        self.pool.reconfigure(self.topology(DELAY), self.now)

    def down(self, name: str) -> None:
        self.pool.observe(url(name), Observation(Sign.REFUSED), self.now)

    def in_flight(self) -> dict[str, int]:
        return {view.spec.name: view.in_flight for view in self.pool.registry.snapshot()}


def busy(*pools: Of) -> Pools:
    """The first request has the only slot of the first pool, for as long as the test likes."""
    yard = Pools(*pools)
    assert yard.ask("x1", out=LONG) == "a warm"
    return yard


# When.


def test_a_request_waits_for_the_first_pool_where_nothing_is_said() -> None:
    yard = busy(of(a=Has("x")), of(b=Has("x")))
    assert yard.ask("x2") == "waits 10.00"
    assert yard.settle(1000.0) == {}
    assert yard.end("x1") == {"x2": "a warm"}


def test_who_has_waited_long_enough_may_have_the_next_pool() -> None:
    yard = busy(of(None, 5.0, a=Has("x")), of(b=Has("x")))
    assert yard.ask("x2") == "waits 5.00"
    assert yard.settle(4.9) == {}
    assert yard.settle(0.25) == {"x2": "b later-pool"}


def test_it_is_the_first_pool_s_for_as_long_as_it_waits() -> None:
    yard = busy(of(None, 5.0, a=Has("x")), of(b=Has("x")))
    for name in ("x2", "x3"):
        yard.ask(name)
    assert yard.end("x1") == {"x2": "a warm"}
    assert yard.settle(6.0) == {"x3": "b later-pool"}
    yard.ask("x4")
    assert yard.settle(6.0) == {}
    assert yard.end("x2") == {"x4": "a warm"}


def test_only_those_may_who_have_waited_themselves() -> None:
    yard = busy(of(None, 5.0, a=Has("x")), of(b=Has("x", slots=3)))
    yard.ask("x2")
    assert yard.settle(4.0) == {}
    yard.ask("x3", priority=Priority.INTERACTIVE)
    assert yard.settle(1.1) == {"x2": "b later-pool"}
    assert yard.settle(3.8) == {}
    assert yard.settle(0.25) == {"x3": "b later-pool"}


def test_slots_of_the_later_pool_hold() -> None:
    yard = busy(of(None, 5.0, a=Has("x")), of(b=Has("x", slots=2)))
    for name in ("x2", "x3", "x4"):
        yard.ask(name)
    assert yard.settle(6.0) == dict.fromkeys(("x2", "x3"), "b later-pool")
    assert yard.settle(6.0) == {}
    assert yard.end("x3") == {"x4": "b later-pool"}


def test_waits_of_several_pools_add_up() -> None:
    first, second = of(None, 5.0, a=Has("x")), of(None, 3.0, b=Has("x"))
    yard = busy(first, second, of(c=Has("x")))
    assert [yard.ask("x2"), yard.ask("x3")] == ["waits 5.00"] * 2
    assert yard.settle(5.0) == {"x2": "b later-pool"}
    assert yard.settle(2.9) == {}
    assert yard.settle(0.25) == {"x3": "c later-pool"}


@pytest.mark.parametrize("gone", ["no node", "down", "tried"])
def test_nobody_waits_for_a_pool_that_has_no_node_for_it(gone: str) -> None:
    present = "y" if gone == "no node" else "xy"
    yard = busy(
        of(None, 5.0, a=Has("x")), of(None, 3.0, b=Has(present=present)), of(c=Has("x"))
    )  # fmt: skip
    if gone == "down":
        yard.down("b")
    yard.ask("x2", tried=["b"] if gone == "tried" else [])
    assert yard.settle(5.0) == {"x2": "c later-pool"}


def test_a_pool_that_never_spills_ends_it() -> None:
    yard = busy(of(None, 5.0, a=Has("x")), of(b=Has("x")), of(None, 1.0, c=Has("x")))
    yard.ask("x2")
    assert yard.settle(5.0) == {"x2": "b later-pool"}
    yard.ask("x3")
    assert yard.settle(1000.0) == {}


def test_without_the_first_pool_it_is_about_the_second() -> None:
    yard = Pools(of(a=Has("x")), of(None, 5.0, b=Has("x")), of(c=Has("x")))
    yard.down("a")
    assert yard.ask("x1") == "b warm"
    yard.ask("x2")
    assert yard.settle(5.0) == {"x2": "c later-pool"}


def test_a_model_is_loaded_in_a_later_pool_only_where_that_is_quicker() -> None:
    yard = busy(of(None, 5.0, a=Has("x")), of(b=Has()))
    yard.ask("x2")
    assert yard.settle(8.0) == {}, "two seconds more are better than a load"
    yard = Pools(of(None, 5.0, a=Has("x")), of(b=Has()))
    yard.ask("x1", out=10 * LONG)
    yard.ask("x2")
    assert yard.settle(5.0) == {"x2": "b later-pool"}


def test_a_pin_is_kept_however_long_it_takes() -> None:
    yard = busy(of(None, 5.0, a=Has("x")), of(b=Has("x")))
    assert yard.ask("x2", pin="a") == "waits 10.00"
    assert yard.settle(1000.0) == {}


def test_a_reload_may_let_those_go_on_that_wait() -> None:
    yard = busy(of(a=Has("x")), of(b=Has("x")))
    yard.ask("x2")
    assert yard.settle(60.0) == {}
    yard.change(of(None, 50.0, a=Has("x")), of(b=Has("x")))
    assert yard.settle() == {"x2": "b later-pool"}


# What is said before.


@pytest.mark.parametrize(
    ("spill_after_s", "within_s", "said"),
    [
        (inf, 9.0, "late 10.00"),
        (5.0, 9.0, "waits 5.00"),
        (5.0, 4.0, "late 5.00"),
        (20.0, 9.0, "late 10.00"),
        (20.0, 11.0, "waits 10.00"),
    ],
)
def test_nobody_is_late_for_the_first_pool_s_sake_alone(
    spill_after_s: float, within_s: float, said: str
) -> None:
    yard = busy(of(None, spill_after_s, a=Has("x")), of(b=Has("x")))
    yard.served("x")
    assert yard.ask("x2", within_s=within_s) == said


def test_a_wait_of_which_nothing_is_known_is_nobody_s_reason_to_refuse() -> None:
    yard = Pools(of(None, 5.0, a=Has("y", gpus=(4,))), of(b=Has("x")))
    yard.ask("y1")
    assert yard.ask("x1", within_s=1.0) == "waits inf"
    assert yard.settle(5.0) == {"x1": "b later-pool"}


def test_a_later_pool_s_nodes_are_told_with_when_they_may_be_had() -> None:
    yard = Pools(
        of(None, 5.0, a=Has("x")), of(None, 2.5, b=Has("x")), of(c=Has("x")), of(d=Has("x"))
    )
    told = {
        "a": terms(0, 0, 0.3),
        "b": "of a later pool: may be had after 5 s",
        "c": "of a later pool: may be had after 7.5 s",
        "d": "others go before it",
    }
    assert yard.terms("x") == told
    yard.ask("x1")
    assert yard.terms("x") == {**told, "a": terms(1.0, 0, 0.3)}


def test_nodes_that_have_failed_a_request_are_its_last_resort() -> None:
    near, far = spec("near"), spec("far")
    first, second = node(near, "x"), node(far, "x")
    for one in (first, second):
        one.schedules, one.spill_s = True, 5.0
    found = Eligible([first], Reason.ONLY, Eligible([second], Reason.LATER_POOL))
    shown = [(one.after_s, list(one.nodes)) for one in reach.ranges(found, {near.url})]
    assert shown == [(0.0, [first]), (5.0, [second])]
    shown = [(one.after_s, list(one.nodes)) for one in reach.ranges(found, {near.url, far.url})]
    assert shown == [(0.0, [first]), (5.0, [first, second])]


# Pools with policies of their own.


def test_a_pool_has_its_own_policy_before_that_of_all() -> None:
    yard = Pools(of(DELAY, a=Has("x", present="x")), of(b=Has("y")), policy=LEAST)
    assert yard.pool.schedules
    assert [yard.pool.registry.schedules_at(url(name)) for name in "ab"] == [True, False]
    assert yard.ask("x1") == "a warm"
    assert yard.ask("x2") == "waits 1.00"
    assert [yard.ask("y1"), yard.ask("y2")] == ["b later-pool"] * 2
    assert yard.terms("y") == {"a": "does not have the model", "b": (None, None, None)}


def test_where_all_is_least_in_flight_nothing_waits() -> None:
    yard = Pools(of(LEAST, 5.0, a=Has("x")), of(LEAST, b=Has("x")))
    assert not yard.pool.schedules
    assert {yard.ask(f"x{i}") for i in range(9)} == {"a only-node"}
    assert yard.terms("x") == {"a": (None, None, None), "b": "others go before it"}


def test_a_least_in_flight_pool_takes_all_at_once_that_may_go_there() -> None:
    yard = busy(of(None, 5.0, a=Has("x")), of(LEAST, b=Has(), c=Has()))
    for i in range(2, 7):
        assert yard.ask(f"x{i}") == "waits 5.00"
    assert yard.terms("x")["b"] == "of a later pool: may be had after 5 s"
    given = yard.settle(5.0)
    assert sorted(given) == [f"x{i}" for i in range(2, 7)]
    assert {said.split()[1] for said in given.values()} == {"later-pool"}
    assert yard.in_flight() == {"a": 1, "b": 3, "c": 2}
    assert yard.ask("x7") == "waits 5.00"
    for name in given:
        yard.end(name)
    assert yard.in_flight() == {"a": 1, "b": 0, "c": 0}


def test_whoever_has_a_turn_in_the_first_pool_goes_there() -> None:
    yard = busy(of(None, 5.0, a=Has("x")), of(LEAST, b=Has("x")))
    yard.ask("x2")
    yard.ask("x3")
    yard.now += 5.0
    assert yard.end("x1") == {"x2": "a warm", "x3": "b later-pool"}


def test_a_least_in_flight_pool_that_is_first_has_no_queue() -> None:
    yard = Pools(of(LEAST, 5.0, a=Has("x")), of(b=Has("x")))
    assert {yard.ask(f"x{i}") for i in range(1, 4)} == {"a only-node"}
    yard.down("a")
    assert yard.ask("x4") == "b warm"
    assert yard.ask("x5") == "waits 1.00"
    yard.pool.observe(url("a"), Observation(Sign.GOOD), yard.now)
    assert yard.settle() == {"x5": "a only-node"}


def test_what_goes_there_needs_no_room_in_a_memory() -> None:
    yard = Pools(of(None, 5.0, a=Has("y", gpus=(4,))), of(LEAST, b=Has("y", gpus=(4,))))
    yard.ask("y1")
    yard.ask("x1")
    yard.ask("x2")
    assert yard.settle(5.0) == dict.fromkeys(("x1", "x2"), "b later-pool")
    yard.begin("x1")
    assert repr(yard.pool._scheduler.scores) == "<Scores [<a up 1 in flight>]>"


def test_room_is_made_no_longer_for_who_goes_to_another_pool() -> None:
    yard = Pools(of(None, 10.0, a=Has("y", gpus=(4,))), of(LEAST, b=Has()))
    yard.ask("y1")
    yard.ask("x1")
    yard.settle(9.0)
    memory = yard.pool._scheduler.scores.memories[yard.pool.registry.nodes[url("a")]]
    assert memory.wanted == "x:latest"
    assert yard.settle(1.0) == {"x1": "b later-pool"}
    assert memory.wanted == ""


def test_a_node_on_trial_takes_one_at_a_time() -> None:
    yard = busy(of(None, 5.0, a=Has("x")), of(LEAST, b=Has()))
    yard.ask("x0", pin="b")
    full = Failure(FailureKind.BUSY, status=503)
    yard.pool.leave(yard.asked.pop("x0"), Outcome(full), yard.now)
    yard.ask("x2")
    yard.ask("x3")
    assert yard.settle(6.0) == {"x2": "b later-pool"}
    assert yard.end("x2") == {"x3": "b later-pool"}


def test_what_is_tried_again_is_paid_for_there_too() -> None:
    yard = busy(of(None, 5.0, a=Has("x")), of(LEAST, b=Has()))
    yard.ask("x2", answered="http://a:11434")
    assert yard.pool._budget.running == 1
    assert yard.settle(5.0) == {"x2": "b later-pool"}
    assert yard.pool._budget.running == 1
    yard.end("x2")
    assert yard.pool._budget.running == 0


def test_what_has_gone_there_counts_for_its_flow() -> None:
    yard = busy(of(None, 5.0, a=Has("x")), of(LEAST, b=Has()))
    for i in range(2, 5):
        yard.ask(f"x{i}", flow="often")
    assert len(yard.settle(5.0)) == 3
    yard.ask("x5", flow="often")
    yard.ask("x6", flow="seldom")
    assert yard.end("x1") == {"x6": "a warm"}


def test_a_reload_to_least_in_flight_leaves_nobody_waiting() -> None:
    yard = busy(of(a=Has("x")), of(b=Has("x")))
    yard.ask("x2")
    yard.ask("x3")
    yard.change(of(LEAST, a=Has("x")), of(b=Has("x")))
    assert yard.settle() == dict.fromkeys(("x2", "x3"), "a only-node")
    for name in ("x1", "x2", "x3"):
        yard.end(name)
    assert (yard.pool.waiting, yard.pool.in_flight) == (0, 0)
    yard.change(of(a=Has("x")), of(b=Has("x")))
    yard.look("a", "x")
    assert yard.ask("x4") == "a warm"
    assert yard.ask("x5") == "waits 1.00"


def test_nobody_goes_to_a_pool_that_has_no_node_for_it_any_more() -> None:
    yard = busy(of(None, 5.0, a=Has("x")), of(LEAST, b=Has()))
    yard.ask("x2")
    yard.down("a")
    yard.down("b")
    assert yard.settle(60.0) == {"x2": Refusal.NODES_DOWN.value}
    assert yard.ask("x3") == Refusal.NODES_DOWN.value
