"""Which node a request gets, and when: tables in seconds that can be worked out by hand.

Every model here has 3.5 GB: it loads in 2.75 s, reads 3000 tokens a second and writes 100. A
request writes 100 tokens unless it says otherwise, so that it takes one second, of which 0.3 count.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.lease import Lease, Lost, Queued
from router.core.names import parse, split_pin
from router.core.policy import Attempt, Target
from router.core.pool import Pool
from router.core.types import (
    Failure,
    FailureKind,
    Model,
    NodeSpec,
    Observation,
    Outcome,
    Policy,
    PoolSpec,
    QueueLimits,
    Resilience,
    Sign,
    Topology,
)
from router.core.usage import Usage
from router.core.work import Priority, Work
from tests.core.quickly import agrees

GB = 10**9
ALL = "uvwxyz"
LOAD_S, PRICE_S = 2.75, 4.125  # what a load takes, and what it counts when nothing has to go
FAILED = Outcome(Failure(FailureKind.RESET))


@dataclass(frozen=True)
class Has:
    """A node: slots of each model, the memory of each of its GPUs, what is loaded from the
    beginning, which models it has at all, and with which digest; `same` are names of one model."""

    loaded: str = ""
    slots: int = 1
    gpus: Sequence[int] = (10,)
    present: str = ALL
    digest: str = ""
    auto: bool = False
    same: str = ""

    def spec(self, name: str) -> NodeSpec:
        return NodeSpec(
            name, f"http://{name}:11434", "http", name, 11434, slots=self.slots, auto=self.auto,
            gpus=tuple(gb * GB for gb in self.gpus),
        )  # fmt: skip


def models(
    keys: str, digest: str = "", ctx: int | None = None, same: str = ""
) -> Mapping[str, Model]:
    entry = {"size": 3_500_000_000, "size_vram": 3_500_000_000, "context_length": ctx}
    return {
        f"{key}:latest": Model(f"{key}:latest", "one" if key in same else digest, entry)
        for key in keys
    }


def url(name: str) -> str:
    return f"http://{name}:11434"


class Yard:
    """A pool that schedules, and its clock. `ask` says in words what a request meets."""

    def __init__(self, policy: Policy = Policy.EXPECTED_DELAY, **nodes: Has) -> None:
        self.nodes, self.now = nodes, 0.0
        self.pool = Pool(self.topology(policy), self.now)
        self.asked: dict[str, Attempt] = {}
        self.leases: dict[str, Lease] = {}
        for name, has in nodes.items():
            seen = Observation(Sign.GOOD, "", models(has.present, has.digest, same=has.same))
            self.pool.observe(url(name), seen, self.now)
            self.look(name, has.loaded)
        for key in ALL:  # so many are expected as are asked for
            self.pool._scheduler.scores.costs._lengths.learn(f"{key}:latest", "", 1_000_000)
        self.now = 1000.0

    def topology(self, policy: Policy, **nodes: Has) -> Topology:
        specs = tuple(has.spec(name) for name, has in (nodes or self.nodes).items())
        rules = Resilience(budget_least=1)
        return Topology((PoolSpec("all", specs),), policy=policy, resilience=rules, up_after=1)

    def look(self, name: str, loaded: str, ctx: int | None = None) -> None:
        resident = models(loaded, "", ctx, self.nodes[name].same)
        self.pool.observe(url(name), Observation(resident=resident), self.now)

    def ask(
        self, name: str, *, pin: str = "", tokens: int = 0, out: int = 100,
        blocks: Sequence[int] = (), ctx: int | None = None, flow: str = "",
        priority: Priority = Priority.NORMAL, within_s: float = inf, weight: float = 1.0,
        tried: Sequence[str] = (), digest: str = "", answered: str = "", body_bytes: int = 0,
        infers: bool = True,
    ) -> str:  # fmt: skip
        """A request whose name begins with its model; what comes of it."""
        deadline = self.now + within_s
        work = Work(
            flow, tokens, blocks, out, ctx, priority, deadline, weight, body_bytes, infers=infers
        )
        left, pinned = split_pin(name[0] + (f"@{pin}" if pin else ""))
        one = Attempt(
            Target(parse(left), pinned, left), frozenset(map(url, tried)), digest, answered, work
        )
        self.asked[name] = one
        assert agrees(self.pool, one, self.now)
        verdict = self.pool.submit(one, self.now)
        if isinstance(verdict, Lease):
            self.leases[name] = verdict
            return self.said(verdict)
        if isinstance(verdict, Queued):
            return f"waits {verdict.expected_s:.2f}"
        after = "" if verdict.after_s is None else f" {verdict.after_s:.2f}"
        return f"{verdict.refusal.value}{after}"

    @staticmethod
    def said(lease: Lease) -> str:
        return f"{lease.node.name} {lease.reason.value}"

    def settle(self, after_s: float = 0.0) -> dict[str, str]:
        """Those that get a node now, and how, or wait no longer."""
        self.now += after_s
        names = {one: name for name, one in self.asked.items()}
        found = {}
        for one in self.pool.granted(self.now):
            name = names[one.attempt]
            if isinstance(one, Lost):
                found[name] = one.rejected.refusal.value
            else:
                self.leases[name] = one
                found[name] = self.said(one)
        return found

    def begin(self, name: str) -> None:
        self.pool.began(self.asked[name], self.now)

    def end(self, name: str, outcome: Outcome | None = None) -> dict[str, str]:
        """It ends, or its client leaves; who gets a node for that?"""
        if name in self.leases and outcome is None:
            self.begin(name)
        self.leases.pop(name, None)
        self.pool.leave(self.asked.pop(name), outcome or Outcome(), self.now)
        return self.settle()

    def terms(
        self, model: str, *, tokens: int = 0, out: int = 100, blocks: Sequence[int] = (),
        ctx: int | None = None,
    ) -> dict[str, object]:  # fmt: skip
        """Of each node the seconds to wait, to load and to begin, or why there are none."""
        work = Work("", tokens, blocks, out, ctx)
        told = self.pool.explain(Target(parse(model), None, model), work, self.now)
        return {one.node.name: one.barred or (one.wait_s, one.load_s, one.answer_s) for one in told}

    def served(self, model: str) -> None:
        """Some answers of it have been seen where it is used, as quick as was guessed."""
        for node in self.pool.registry.nodes.values():
            if f"{model}:latest" in node.replicas:
                for _ in range(9):
                    node.replicas[f"{model}:latest"].rates.learn(Usage(0, 100, None, 1.0, None))

    def demand(self, model: str, times: int) -> None:
        """So many have asked for it just now."""
        for _ in range(times):
            self.pool._scheduler.scores._demand.count(f"{model}:latest", self.now)


def terms(wait_s: float, load_s: float, answer_s: float) -> object:
    return pytest.approx((wait_s, load_s, answer_s))


# Where.


def test_what_is_loaded_and_free_goes_before_a_load() -> None:
    yard = Yard(a=Has(), b=Has("x"))
    assert yard.terms("x") == {"a": terms(0, PRICE_S, 0.3), "b": terms(0, 0, 0.3)}
    assert yard.ask("x") == "b warm"


def test_a_short_wait_is_better_than_a_load() -> None:
    yard = Yard(a=Has(), b=Has("x"))
    yard.ask("x1")
    assert yard.terms("x") == {"a": terms(0, PRICE_S, 0.3), "b": terms(1.0, 0, 0.3)}
    assert yard.ask("x2") == "waits 1.00"
    assert yard.end("x1") == {"x2": "b warm"}


def test_a_load_is_better_than_a_long_wait() -> None:
    yard = Yard(a=Has(), b=Has("x"))
    yard.ask("x1", out=600)
    assert yard.terms("x")["b"] == terms(6.0, 0, 0.3)
    assert yard.ask("x2") == "a load"


def test_a_node_that_does_not_tell_what_it_has_in_memory_counts_as_empty() -> None:
    yard = Yard(a=Has("x", slots=4), b=Has(slots=4))
    del yard.pool._scheduler.scores.memories[yard.pool.registry.nodes[url("b")]]
    yard.ask("x0", flow="other")
    yard.end("x0")
    assert [yard.ask(f"x{i}", flow="f", out=10) for i in range(1, 5)] == ["a warm"] * 4


def test_a_short_wait_is_better_than_a_slow_node_that_is_free() -> None:
    yard = Yard(a=Has("x"), b=Has("x"))
    yard.ask("x0", pin="a")
    yard.end("x0")
    yard.pool.learn(url("a"), "x:latest", Usage(0, 100, eval_s=10.0), "", 0, yard.now)
    assert yard.ask("x1") == "b warm"
    assert yard.terms("x") == {"a": terms(0, 0, 3.0), "b": terms(1.0, 0, 0.3)}
    assert yard.ask("x2") == "waits 1.00"


def test_nobody_waits_for_ever_for_what_may_hang() -> None:
    yard = Yard(a=Has(), b=Has("x"))
    yard.ask("x1")
    assert yard.ask("x2") == "waits 1.00"
    assert yard.settle(1.5) == {}
    assert yard.settle(PRICE_S) == {"x2": "a load"}


def test_nor_for_a_load_that_may() -> None:
    yard = Yard(a=Has(slots=2), b=Has(slots=2))
    assert yard.ask("x1") == "a load"
    assert yard.ask("x2").startswith("waits")
    assert yard.settle(1.0) == {}
    assert yard.settle(3 * PRICE_S) == {"x2": "b load"}


def test_those_that_wait_are_seen_by_those_behind() -> None:
    yard = Yard(a=Has(), b=Has("x"))
    yard.ask("x1")
    assert [yard.ask(f"x{i}")[:5] for i in range(2, 7)] == ["waits"] * 5
    assert yard.terms("x")["b"] == terms(5.0, 0, 0.3), "in the fifth second, after four of them"
    assert yard.settle() == {"x6": "a load"}


def test_what_is_behind_a_load_waits_for_it() -> None:
    yard = Yard(a=Has(slots=2))
    assert yard.ask("x1") == "a load"
    assert yard.ask("x2") == "waits 2.75"
    assert yard.settle(1.0) == {}
    yard.begin("x1")
    assert yard.settle() == {"x2": "a warm"}


def test_a_node_loads_one_model_at_a_time() -> None:
    yard = Yard(a=Has(gpus=(20,)))
    assert yard.ask("x") == "a load"
    assert yard.ask("y") == "waits inf"
    assert yard.terms("z") == {"a": "no room for the model"}
    yard.begin("x")
    assert yard.settle() == {"y": "a load"}


def test_a_load_that_fails_is_none() -> None:
    yard = Yard(a=Has())
    yard.ask("x1")
    yard.ask("x2")
    assert yard.end("x1", FAILED) == {"x2": "a load"}


def test_two_slots_serve_two() -> None:
    yard = Yard(a=Has("x", slots=2))
    assert [yard.ask(f"x{i}") for i in "123"] == ["a warm", "a warm", "waits 1.00"]


def test_whatever_is_at_work_has_its_slot_however_short_it_was_thought() -> None:
    yard = Yard(a=Has("x"))
    assert [yard.ask(f"x{i}", out=0) for i in "12"] == ["a warm", "waits 0.01"]
    assert yard.settle(0.005) == {}
    assert [yard.ask(f"x{i}", out=0) for i in "34"] == ["waits 0.01", "waits 0.01"]
    assert yard.end("x1") == {"x2": "a warm"}


def test_nobody_else_is_driven_out_where_the_last_copy_would_be() -> None:
    """`y` is on `a` alone, `v` on `c` too; both are asked for as often."""
    yard = Yard(a=Has("yz"), b=Has("vz"), c=Has("vz", present="vz"))
    yard.demand("y", 5)
    yard.demand("v", 5)
    again = (1 - exp(-2)) * LOAD_S
    assert yard.terms("x") == {
        "a": terms(0, PRICE_S + 8 * again, 0.3),
        "b": terms(0, PRICE_S + 4 * again, 0.3),
        "c": "does not have the model",
    }
    assert yard.ask("x") == "b load"


def test_many_that_wait_share_the_price_of_what_goes_for_them() -> None:
    yard = Yard(a=Has("yz", gpus=(7,)), b=Has("x"))
    yard.demand("y", 5)
    yard.ask("x1", out=1000)
    assert yard.ask("x2") == "waits 10.00"
    assert yard.settle() == {}
    yard.ask("x3")
    price_s = PRICE_S + 8 * (1 - exp(-2)) * LOAD_S / 2  # as two wait already
    assert yard.terms("x")["a"] == terms(0, price_s, 0.3)


def test_what_is_waited_for_is_not_driven_out() -> None:
    yard = Yard(a=Has("yz"), b=Has("y", present="y"))
    yard.ask("y1", pin="b")
    yard.ask("y2", pin="b")
    assert yard.ask("x") == "waits inf"
    assert yard.end("y2") == {"x": "a load"}


def test_what_has_just_been_loaded_is_not_driven_out() -> None:
    yard = Yard(a=Has(), b=Has("y", present="y"))
    yard.look("a", "yz")
    yard.ask("y", pin="b")
    yard.now += 5.0
    assert yard.ask("x") == "waits inf"
    assert yard.settle(5.9) == {}
    assert yard.settle(0.3) == {"x": "a load"}


def test_where_nothing_is_at_work_anywhere_nobody_waits_for_a_load() -> None:
    """Not even for what has just been loaded: one user who goes to and fro."""
    yard = Yard(a=Has(gpus=(5,)))
    for name in ("x", "y", "x", "y"):
        assert yard.ask(name) == "a load"
        yard.end(name)


def test_what_is_at_work_is_not_driven_out() -> None:
    yard = Yard(a=Has("yz"))
    yard.ask("y", out=100)
    yard.ask("z", out=100)
    assert yard.ask("x") == "waits inf"
    assert yard.end("z") == {"x": "a load"}


def test_those_behind_a_busy_model_are_not_blocked_by_it() -> None:
    yard = Yard(a=Has("xy"))
    yard.ask("x1")
    for i in range(9):
        yard.ask(f"x{i + 2}")
    assert yard.ask("y1") == "a warm"
    yard.ask("y2")
    assert yard.end("y1") == {"y2": "a warm"}


def test_more_than_are_looked_at_do_not_block_those_with_a_free_node() -> None:
    """All of the first wait for one node; the last may have another."""
    yard = Yard(a=Has("x"), b=Has("x"))
    yard.ask("x-a", pin="a")
    yard.ask("x-b", pin="b")
    for i in range(100):
        yard.ask(f"x{i}", pin="a", flow="f")
    yard.ask("x-last", pin="b", flow="f")
    yard.pool.leave(yard.asked["x-b"], Outcome(), yard.now)
    assert yard.settle() == {"x-last": "b pinned"}


def test_no_more_are_looked_at_than_is_worth_it() -> None:
    """Each has a slot to hope for, which it does not take: it waits for all to end."""
    yard = Yard(a=Has(slots=100, gpus=(10,)))
    yard.look("a", "x", ctx=4096)
    yard.now += 100.0
    yard.ask("x-first", ctx=4096)
    for i in range(70):
        yard.ask(f"x{i}", ctx=8192)
    yard.ask("x-last", ctx=4096, flow="f", tried=["b"])
    assert "x-last" in yard.leases
    assert yard.settle() == {}
    assert yard.terms("x", ctx=8192)["a"] == terms(1.0, PRICE_S, 0.3)


# Contexts, prefixes, GPUs.


def test_another_context_is_a_load_and_waits_until_all_have_ended() -> None:
    yard = Yard(a=Has(slots=2))
    yard.look("a", "x", ctx=4096)
    yard.now += 100.0
    assert yard.terms("x", ctx=8192) == {"a": terms(0, PRICE_S, 0.3)}
    assert yard.terms("x", ctx=4096) == {"a": terms(0, 0, 0.3)}
    yard.ask("x1", ctx=4096)
    yard.ask("x2", out=200)
    assert yard.terms("x", ctx=8192) == {"a": terms(2.0, PRICE_S, 0.3)}
    assert yard.ask("x3", ctx=8192)[:5] == "waits"
    assert yard.end("x1") == {}
    assert yard.end("x2") == {"x3": "a load"}


def test_who_waits_for_another_context_has_its_turn_among_those_that_do_not() -> None:
    yard = Yard(a=Has("x", slots=3))
    yard.look("a", "x", ctx=4096)
    for one in ("x1", "x2", "x3"):
        assert yard.ask(one, ctx=4096) == "a warm"
    assert yard.ask("x4", ctx=8192).startswith("waits")
    assert yard.ask("x5", ctx=4096).startswith("waits")
    assert yard.ask("x6", ctx=4096).startswith("waits")
    yard.pool.leave(yard.asked.pop("x1"), Outcome(), yard.now)
    yard.pool.leave(yard.asked.pop("x2"), Outcome(), yard.now)
    assert yard.settle() == {"x5": "a warm"}, "one slot of the two is kept for the first"


def test_another_context_has_to_wait_for_what_the_node_loads() -> None:
    yard = Yard(a=Has("x", gpus=(20,)), b=Has("z"))
    yard.look("a", "x", ctx=4096)
    yard.ask("y", pin="a")
    told = yard.terms("x", ctx=8192)["a"]
    assert told == terms(LOAD_S, PRICE_S, 0.3 * 1.7)
    yard.now += 1.0
    assert yard.terms("x", ctx=8192)["a"] == terms(LOAD_S - 1, PRICE_S, 0.3 * 1.7)


def test_who_asks_for_another_context_does_not_wait_for_ever() -> None:
    """After eight seconds no more of those begin that it waits for."""
    yard = Yard(a=Has(slots=2))
    yard.look("a", "x", ctx=4096)
    yard.now += 100.0
    yard.ask("x1")
    yard.ask("x2")
    yard.ask("x-big", ctx=8192)
    assert yard.settle(7.9) == {}
    yard.end("x1")
    assert yard.ask("x3") == "a warm"
    assert yard.settle(0.2) == {}
    assert yard.end("x2") == {}
    assert yard.ask("x4")[:5] == "waits"
    assert yard.end("x3") == {"x-big": "a load"}
    yard.begin("x-big")
    assert yard.settle() == {}
    assert yard.end("x-big") == {"x4": "a load"}


def test_who_asked_for_another_context_and_leaves_keeps_nobody_waiting() -> None:
    yard = Yard(a=Has(slots=2))
    yard.look("a", "x", ctx=4096)
    yard.now += 100.0
    yard.ask("x1")
    yard.ask("x-big", ctx=8192)
    yard.settle(9.0)
    assert yard.ask("x2")[:5] == "waits"
    assert yard.end("x-big") == {"x2": "a warm"}


def test_of_two_contexts_each_goes_where_it_is_loaded() -> None:
    yard = Yard(a=Has(), b=Has())
    yard.look("a", "x", ctx=4096)
    yard.look("b", "x", ctx=8192)
    yard.now += 100.0
    assert yard.ask("x1", ctx=8192) == "b warm"
    assert yard.ask("x2", ctx=4096) == "a warm"


# Names of one model, which a node has in its memory but once


def test_a_model_is_in_memory_under_all_of_its_names() -> None:
    yard = Yard(a=Has("u", same="uv"))
    assert yard.ask("v1") == "a warm"
    yard.look("a", "u")
    assert yard.end("v1") == {}
    assert yard.ask("w1") == "a load"


def test_they_share_its_slots() -> None:
    yard = Yard(a=Has("u", slots=2, same="uv"))
    assert [yard.ask(one) for one in ("u1", "v1", "u2")] == ["a warm", "a warm", "waits 1.00"]
    assert yard.end("v1") == {"u2": "a warm"}


def test_they_share_a_load_and_what_is_read() -> None:
    yard = Yard(a=Has(same="uv", slots=2))
    assert [yard.ask(one, blocks=[1]) for one in ("u1", "v1")] == ["a load", "waits 2.75"]
    yard.now += 2
    yard.begin("u1")
    assert yard.settle() == {"v1": "a cached"}


def test_what_is_loaded_by_one_name_is_not_loaded_for_nobody_by_another() -> None:
    yard = Yard(a=Has(same="uv"))
    yard.ask("u1")
    node = yard.pool.registry.nodes[url("a")]
    assert yard.pool._scheduler.scores.preload_s(node, "v:latest", yard.now) is None


def test_what_is_waited_for_by_another_name_is_not_driven_out() -> None:
    yard = Yard(a=Has("uz", same="uv", gpus=(8,)))
    yard.ask("u1")
    assert yard.ask("v1").startswith("waits")
    yard.ask("z1")
    yard.end("z1")
    assert yard.ask("w1") == "a load", "of those that have to go z is not waited for"


def test_room_that_is_made_for_one_name_is_there_for_the_other() -> None:
    yard = Yard(a=Has("uz", same="vw", gpus=(8,)))
    yard.ask("u1", out=10_000)
    yard.ask("z1", out=10_000)
    yard.ask("v1")
    yard.settle(9)
    memory = yard.pool._scheduler.scores.memories[yard.pool.registry.nodes[url("a")]]
    assert memory.wanted == "one"
    yard.ask("w1")
    yard.pool.leave(yard.asked.pop("v1"), Outcome(), yard.now)
    assert memory.wanted == "one"
    yard.pool.leave(yard.asked.pop("w1"), Outcome(), yard.now)
    assert memory.wanted == ""


def test_requests_by_all_names_tell_how_soon_it_is_wanted_again() -> None:
    yard = Yard(a=Has("uz", same="uv", gpus=(8,)))
    few = yard.terms("w")["a"]
    yard.demand("v", 50)
    assert few < yard.terms("w")["a"]  # type: ignore[operator]


def test_a_copy_elsewhere_counts_by_whatever_name() -> None:
    yard = Yard(a=Has("u", same="uv", gpus=(4,)), b=Has("v", same="uv", present="uvz"))
    yard.demand("u", 50)
    two = yard.terms("w")["a"]
    yard.now += 10
    yard.look("b", "")
    yard.demand("u", 5)
    assert two < yard.terms("w")["a"]  # type: ignore[operator]


def test_the_slots_that_a_model_has_are_told_of_all_its_names() -> None:
    yard = Yard(a=Has("u", auto=True, same="uv"))
    yard.ask("v1")
    (view,) = yard.pool.registry.snapshot()
    assert view.slots == {"u:latest": 1, "v:latest": 1}


def test_what_was_learned_of_a_model_is_forgotten_with_it() -> None:
    yard = Yard(a=Has("uv", present="uv"))
    memory = yard.pool._scheduler.scores.memories[yard.pool.registry.nodes[url("a")]]
    assert memory.sizes.keys() == {"u:latest", "v:latest"}
    yard.pool.observe(url("a"), Observation(Sign.GOOD, "", models("u")), yard.now)
    yard.look("a", "u")
    yard.now += 10
    yard.look("a", "u")
    assert memory.sizes.keys() == {"u:latest"}


def test_a_digest_that_the_list_does_not_know_is_the_models_of_that_name() -> None:
    yard = Yard(a=Has("u"))
    yard.pool.observe(url("a"), Observation(Sign.GOOD, "", models("u", "new")), yard.now)
    yard.pool.observe(url("a"), Observation(resident=models("u", "old")), yard.now)
    assert yard.ask("u1") == "a warm"


# What is in the cache


def test_what_a_node_has_read_before_it_need_not_read_again() -> None:
    yard = Yard(a=Has("x"), b=Has("x"))
    yard.ask("x1", pin="b", tokens=1500, blocks=[1, 2])
    yard.end("x1")
    assert yard.terms("x", tokens=1536, blocks=[1, 2, 3]) == {
        "a": terms(0, 0, 0.3 + 1536 / 3000),
        "b": terms(0, 0, 0.3 + 512 / 3000),
    }
    assert yard.ask("x2", tokens=1536, blocks=[1, 2, 3]) == "b cached"
    assert yard.ask("x3", tokens=1536, blocks=[4, 2, 3]) == "a warm"


def test_what_was_read_is_forgotten_with_the_load() -> None:
    yard = Yard(a=Has("x"))
    yard.ask("x1", blocks=[1, 2])
    yard.end("x1")
    yard.now += 100.0
    yard.look("a", "")
    yard.look("a", "x")
    assert yard.ask("x2", blocks=[1, 2]) == "a warm"


def test_no_prompt_is_longer_than_the_context() -> None:
    yard = Yard(a=Has())
    yard.look("a", "x", ctx=3000)
    assert yard.terms("x", tokens=90_000) == {"a": terms(0, 0, 1.3)}


def test_of_one_that_is_longer_nothing_is_cached_as_its_beginning_is_left_out() -> None:
    yard = Yard(a=Has("x"))
    blocks = range(10)
    yard.ask("x1", tokens=2500, blocks=blocks)
    yard.end("x1")
    yard.look("a", "x", ctx=3000)
    cached, cut = (yard.terms("x", tokens=tokens, blocks=blocks)["a"] for tokens in (3000, 3001))
    assert (cached, cut) == (terms(0, 0, 0.3), terms(0, 0, 1.3))
    assert yard.ask("x2", tokens=3001, blocks=blocks) == "a cached"
    assert yard.leases["x2"].expected_s == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("gpus", "others", "factor"),
    [((20,), "", 1.0), ((20,), "y", 1.7), ((20,), "yz", 2.4), ((9, 9), "y", 1.0),
     ((9, 9), "yz", 1.35), ((), "y", 1.7)],
)  # fmt: skip
def test_models_that_are_at_work_share_the_gpus(
    gpus: Sequence[int], others: str, factor: float
) -> None:
    yard = Yard(a=Has("xyz", gpus=gpus))
    for other in others:
        yard.ask(other)
    assert yard.terms("x", tokens=3000) == {"a": terms(0, 0, 1.3 * factor)}


def test_what_was_learned_goes_before_what_is_guessed() -> None:
    yard = Yard(a=Has("x"))
    yard.ask("x")
    yard.end("x")
    told = Usage(1000, 50, eval_s=5.0, prompt_s=10.0)
    yard.pool.learn(url("a"), "x:latest", told, "", 0, yard.now)
    assert yard.terms("x", tokens=100, out=10) == {"a": terms(0, 0, 1.0 + 0.3)}


def test_a_model_that_has_another_size_now_is_loaded_for_as_long_as_that_takes() -> None:
    yard = Yard(a=Has("y", gpus=(20,)))
    yard.ask("y1")
    yard.end("y1")
    yard.served("y")
    assert yard.terms("x") == {"a": terms(0, PRICE_S, 0.3)}
    grown = {**models("y"), "x:latest": Model("x:latest", "", {"size": 7_000_000_000})}
    yard.pool.observe(url("a"), Observation(present=grown), yard.now)
    yard.ask("y2")
    yard.end("y2")
    yard.pool.learn(url("a"), "y:latest", Usage(0, 100, eval_s=1.0), "", 0, yard.now)
    assert yard.terms("x") == {"a": terms(0, 1.5 * (1 + 3.5), 0.6)}


# When no node can have it.


def test_the_price_of_a_load_falls_with_waiting() -> None:
    yard = Yard(a=Has(), b=Has("x"))
    yard.ask("x1", out=1300)  # 3.9 s of it are always to come
    yard.now += 10.0
    assert yard.ask("x2")[:5] == "waits"
    assert yard.settle(5.0) == {}
    assert yard.settle(1.0) == {"x2": "a load"}


def test_after_eight_seconds_a_node_makes_room() -> None:
    yard = Yard(a=Has("yz", slots=2))
    yard.ask("y1", out=1000)
    yard.ask("z1", out=1000)
    yard.ask("x")
    assert yard.settle(7.9) == {}
    assert yard.ask("y2") == "a warm"
    assert yard.settle(0.3) == {}
    assert yard.ask("y3") == "waits inf"
    assert yard.ask("z2") == "a warm"
    assert yard.end("y1") == {}
    assert yard.end("y2") == {"x": "a load"}
    yard.begin("x")
    assert yard.pool._scheduler.scores.memories[yard.pool.registry.nodes[url("a")]].wanted == ""


def test_of_two_nodes_the_one_that_is_ready_first_makes_room() -> None:
    yard = Yard(a=Has("yz"), b=Has("yz"), c=Has("x", present="u"))
    for name, out in [("a", 2000), ("b", 1500)]:
        yard.ask(f"y{name}", pin=name, out=out)
        yard.ask(f"z{name}", pin=name, out=out)
    yard.ask("x")
    yard.ask("x-too")
    yard.settle(8.0)
    wanted = {n.spec.name: m.wanted for n, m in yard.pool._scheduler.scores.memories.items()}
    assert wanted == {"a": "", "b": "x:latest", "c": ""}
    yard.ask("w")
    yard.settle(8.0)
    wanted = {n.spec.name: m.wanted for n, m in yard.pool._scheduler.scores.memories.items()}
    assert wanted == {"a": "w:latest", "b": "x:latest", "c": ""}


def test_so_it_does_whichever_of_them_is_looked_at_first() -> None:
    yard = Yard(a=Has("yz"), b=Has("yz"))
    for name, out in [("a", 1500), ("b", 2000)]:
        yard.ask(f"y{name}", pin=name, out=out)
        yard.ask(f"z{name}", pin=name, out=out)
    yard.ask("x")
    yard.settle(8.0)
    wanted = {n.spec.name: m.wanted for n, m in yard.pool._scheduler.scores.memories.items()}
    assert wanted == {"a": "x:latest", "b": ""}


def test_after_many_have_waited_for_a_slot_the_model_is_loaded_once_more() -> None:
    """None of them would wait for as long as a load takes, but together they have."""
    yard = Yard(a=Has("x"), b=Has("", present="x"))
    for number in range(30):
        yard.ask(f"x{number}", out=100)
        yard.settle(0.1)
        if yard.ask("x-next", out=100) == "b load":
            break
        yard.settle(0.7)
        assert yard.end(f"x{number}") == {"x-next": "a warm"}
        yard.end("x-next")
        yard.settle(0.5)
    assert 5 <= number < 20
    yard.end("x-next")
    assert yard.ask("x-other") == "b warm", "and a slot that is free goes before a load"
    assert yard.terms("x")["b"] != yard.terms("x")["a"]


def test_of_nodes_that_cost_the_same_the_one_with_less_in_flight_is_taken() -> None:
    yard = Yard(a=Has("x", slots=4), b=Has("x", slots=4))
    found = [yard.ask(f"x{number}") for number in range(4)]
    assert found == ["a warm", "b warm", "a warm", "b warm"]


def wanted(yard: Yard) -> dict[str, str]:
    """What each node makes room for."""
    memories = yard.pool._scheduler.scores.memories
    return {node.spec.name: memory.wanted[:1] for node, memory in memories.items()}


def test_room_is_made_where_the_fewest_wait_for_what_has_to_go() -> None:
    yard = Yard(a=Has("y", present="xy", gpus=[5]), b=Has("z", present="xz", gpus=[5], slots=2))
    yard.ask("y1", out=100)
    for name in ("z1", "z2"):
        yard.ask(name, out=2000)
    for number in range(2, 8):
        yard.ask(f"y{number}")
    yard.ask("x")
    yard.settle(8.0)
    assert wanted(yard) == {"a": "", "b": "x"}


def test_a_node_that_many_wait_for_makes_room_only_after_long() -> None:
    yard = Yard(a=Has("y", present="xy", gpus=[5]))
    for number in range(5):
        yard.ask(f"y{number}", out=1000)
    yard.ask("x")
    yard.settle(8.0)
    assert wanted(yard) == {"a": ""}
    waits_s = next(s for s in range(9, 300) if not yard.settle(1.0) and wanted(yard)["a"])
    assert 20 < waits_s < 50, "four wait for as long as it would take until y is there again"


def test_a_flow_that_goes_on_asking_keeps_no_node_from_another_flow() -> None:
    """However many wait for what has to go: after half a minute no more of those whose turn comes
    later count than two for each that waits for the room."""
    yard = Yard(a=Has("y", present="xy", gpus=[5]))
    for number in range(60):
        yard.ask(f"y{number}", flow="f")
    yard.ask("x", flow="g")
    running, asked, began = "y0", 60, yard.now
    while running != "x":
        yard.ask(f"y{asked}", flow="f")
        yard.now += 1.0
        [running] = yard.end(running) or yard.settle(0.3)
        asked += 1
        assert yard.now < began + 40
    assert yard.said(yard.leases["x"]) == "a load"


def long_change(within_s: float) -> tuple[Yard, float]:
    """One asks for x while y has 100 s to go and sixty others wait for it; when room is made."""
    yard = Yard(a=Has("y", present="xy", gpus=[5]))
    yard.ask("y0", out=10_000, flow="f")
    for number in range(1, 61):
        yard.ask(f"y{number}", flow="f")
    yard.ask("x", flow="g", within_s=within_s)
    return yard, next(s for s in range(1, 300) if not yard.settle(1.0) and wanted(yard)["a"])


def test_a_change_that_takes_long_is_waited_for_twice_as_long() -> None:
    """Else a node that has work enough would do little else than load."""
    _, waits_s = long_change(inf)
    assert waits_s == pytest.approx(2 * (100 - waits_s + 2 * LOAD_S), abs=2.0)


def test_who_has_waited_for_half_of_its_time_waits_for_nobody_whose_turn_is_later() -> None:
    _, waits_s = long_change(100.0)
    assert waits_s == 50


def test_how_much_a_model_takes_is_told_by_the_others_there() -> None:
    """On disk x is as large as y; y takes 7 GB there, and x has not been seen."""
    yard = Yard(a=Has(gpus=(10,)), b=Has(gpus=(10,)))
    for name in "ab":
        yard.ask("w", pin=name)
        yard.end("w")
        big = Model("w:latest", "", {"size_vram": 7_000_000_000})
        yard.pool.observe(url(name), Observation(resident={"w:latest": big}), yard.now)
        yard.now += 200.0
    yard.ask("w1", pin="a", out=1000)
    assert yard.ask("x", pin="a") == "waits inf", "beside w there is no room for twice its size"


def test_a_load_that_waits_for_room_on_the_node_gets_it() -> None:
    """Nobody has told that y takes so much; while y gets work it would wait for ever."""
    yard = Yard(a=Has("y", slots=2, gpus=(99,)), b=Has("", present="u"))
    yard.ask("y1", out=1000)
    assert yard.ask("x") == "a load"
    yard.settle(2 * LOAD_S + 5.1)
    yard.look("a", "y")
    assert yard.ask("y2") == "waits inf"
    assert yard.end("y1") == {}
    yard.begin("x")
    assert wanted(yard)["a"] == ""
    assert yard.settle() == {"y2": "a load"}, "y is what has made room"


def test_no_node_makes_room_for_what_nobody_waits_for() -> None:
    yard = Yard(a=Has("yz", slots=2))
    yard.ask("y1")
    yard.ask("z1")
    yard.ask("x")
    yard.settle(9.0)
    assert yard.ask("y2") == "waits inf"
    assert yard.end("x") == {"y2": "a warm"}


def test_no_node_makes_room_for_what_others_have_loaded_there() -> None:
    yard = Yard(a=Has("yz", slots=2))
    yard.ask("y1")
    yard.ask("z1")
    yard.ask("x1")
    yard.settle(9.0)
    yard.look("a", "xyz")
    assert yard.settle() == {"x1": "a warm"}
    assert yard.ask("y2") == "a warm"


def test_no_node_that_loads_makes_room() -> None:
    yard = Yard(a=Has("yz"))
    yard.ask("x")
    yard.ask("w")
    assert yard.settle(9.0) == {}
    yard.begin("x")
    assert yard.settle(20.0) == {"w": "a load"}


# Who may.


def flood(yard: Yard, flow: str, count: int) -> Counter[str]:
    return Counter(yard.ask(f"x-{flow}{i}", flow=flow)[:5] for i in range(count))


def test_a_flow_that_is_alone_gets_all_slots() -> None:
    assert flood(Yard(a=Has("x", slots=4)), "f", 9) == {"a war": 4, "waits": 5}


def test_beside_another_a_flow_gets_seven_tenths() -> None:
    yard = Yard(a=Has("x", slots=4))
    yard.ask("x-other", flow="o")
    yard.end("x-other")
    assert flood(yard, "f", 4) == {"a war": 3, "waits": 1}
    assert yard.ask("x-other", flow="o") == "a warm"


def test_a_flow_with_a_backlog_leaves_a_slot_of_each_model_to_others() -> None:
    yard = Yard(a=Has("xyz", slots=4, gpus=(20,)))
    yard.ask("y-other", flow="o")
    assert flood(yard, "f", 12) == {"a war": 4, "waits": 8}, "of twelve slots in all"
    assert yard.end("x-f0") == {}
    assert yard.end("x-f1") == {}
    assert yard.end("x-f2") == {"x-f4": "a warm"}, "two are its share of four"
    assert yard.ask("x-other", flow="o") == "a warm"


def test_a_flow_with_a_backlog_has_no_more_slots_than_each_other_that_waits() -> None:
    yard = Yard(a=Has("x", slots=4))
    yard.ask("x-o0", flow="o")
    flood(yard, "f", 12)
    for flow in "ghijk":
        yard.ask(f"x-{flow}0", flow=flow)
    assert sorted(yard.leases) == ["x-f0", "x-f1", "x-f2", "x-o0"]
    assert yard.end("x-f0") == {"x-g0": "a warm"}
    assert yard.end("x-f1") == {"x-h0": "a warm"}
    assert yard.end("x-o0") == {"x-i0": "a warm"}, "f has one, as each of the others"
    assert yard.end("x-g0") == {"x-f3": "a warm"}, "three flows wait for four slots"
    assert yard.end("x-h0") == {"x-j0": "a warm"}
    assert yard.end("x-i0") == {"x-k0": "a warm"}
    assert yard.end("x-j0") == {}, "nobody else waits, and its share is two"


def test_what_a_flow_with_a_backlog_has_of_a_model_is_by_its_weight() -> None:
    yard = Yard(a=Has("x", slots=8))
    for number in range(8):
        yard.ask(f"x-o{number}", flow="o")
    for number in range(20):
        yard.ask(f"x-f{number}", flow="f", weight=3.0)
        yard.ask(f"x-g{number}", flow="g")
    for number in range(8):
        yard.end(f"x-o{number}")
    assert Counter(name[2] for name in yard.leases) == {"f": 5, "g": 2}


def test_what_others_leave_a_flow_with_a_backlog_has_at_once() -> None:
    yard = Yard(a=Has("x", slots=2), b=Has("x", slots=6))
    yard.pool.registry.drain(url("b"), draining=True)
    yard.ask("y", flow="g")
    flood(yard, "f", 14)
    for flow in "ghi":
        yard.ask(f"x-{flow}0", flow=flow, priority=Priority.BATCH)
    assert sorted(yard.leases) == ["x-f0", "x-f1", "y"]
    yard.pool.registry.drain(url("b"), draining=False)
    assert sorted(yard.settle()) == ["x-g0", "x-h0", "x-i0"], "four flows wait, and f has two of 8"
    assert sorted(yard.settle()) == ["x-f2", "x-f3", "x-f4"], "no other waits: its share is five"


def test_flows_that_all_have_a_backlog_leave_no_slot_free() -> None:
    yard = Yard(a=Has("x", slots=4))
    for number in range(12):
        for flow in "fgh":
            yard.ask(f"x-{flow}{number}", flow=flow)
    for name in [*yard.leases]:
        yard.end(name)
    assert len(yard.leases) == 4


def test_a_flow_may_always_have_one() -> None:
    yard = Yard(a=Has())
    yard.ask("y", flow="o")
    yard.end("y")
    assert yard.ask("x", flow="f") == "a load"


def test_a_flow_beside_another_may_have_nodes_that_are_empty() -> None:
    yard = Yard(a=Has("y"), b=Has(), c=Has(), d=Has())
    yard.ask("y-other", flow="o")
    yard.end("y-other")
    assert yard.ask("y", flow="f") == "a warm"
    assert yard.ask("x", flow="f") == "b load"
    assert yard.ask("w", flow="f") == "c load"
    assert yard.ask("v", flow="f") == "waits 1.00", "three are its share of four"
    assert yard.ask("z", flow="o") == "d load"


def test_a_backlog_does_not_keep_a_flow_from_a_node_that_is_empty() -> None:
    yard = Yard(a=Has("x"), b=Has(), c=Has())
    yard.ask("x-other", flow="o")
    yard.end("x-other")
    flood(yard, "f", 12)
    yard.settle(30.0)
    assert {lease.node.name for lease in yard.leases.values()} >= {"a", "b"}


def test_others_that_are_gone_for_long_get_nothing_kept() -> None:
    yard = Yard(a=Has("x", slots=4))
    yard.ask("x-other", flow="o")
    yard.end("x-other")
    yard.now += 61.0
    assert flood(yard, "f", 4) == {"a war": 4}


def test_flows_take_turns_whoever_came_first() -> None:
    """One that floods does not have the others wait for all that it has sent before them."""
    yard = Yard(a=Has("x"))
    flood(yard, "f", 100)
    for flow in "gh":
        yard.ask(f"x-{flow}", flow=flow)
    order = [next(iter(yard.end(name))) for name in ("x-f0",)]
    while len(order) < 4:
        order.append(next(iter(yard.end(order[-1]))))
    assert set(order) >= {"x-g", "x-h"}


def test_a_flood_that_has_waited_long_goes_before_nobody() -> None:
    """Ageing is for other priorities: among equals flows take turns."""
    yard = Yard(a=Has("x"))
    flood(yard, "f", 50)
    yard.now += 31.0
    yard.ask("x-other", flow="o")
    order = ["x-f0"]
    while len(order) < 4:
        order += yard.end(order[-1])
    assert "x-other" in order


def test_the_urgent_go_first() -> None:
    yard = Yard(a=Has("x"))
    yard.ask("x1")
    yard.ask("x-batch", priority=Priority.BATCH)
    yard.ask("x-normal")
    yard.ask("x-now", priority=Priority.INTERACTIVE)
    order = ["x1"]
    while len(order) < 4:
        order += yard.end(order[-1])
    assert order == ["x1", "x-now", "x-normal", "x-batch"]


@pytest.mark.parametrize("weight", [1, 3])
@given(outs=st.lists(st.integers(10, 150), min_size=4, max_size=30))
def test_two_flows_that_are_always_busy_get_their_shares_of_the_slots(
    weight: int, outs: Sequence[int]
) -> None:
    """In seconds of slots, for their weights, within what one request of each takes; as long as
    none waits so long that it goes before others for that."""
    yard = Yard(a=Has("x", slots=1))
    had = {"f": 0.0, "g": 0.0}
    cost: dict[str, float] = {}
    weights = {"f": 1, "g": weight}
    sizes = {"f": outs, "g": outs[::-1]}
    count = Counter[str]()

    def come(flow: str) -> None:
        name = f"x-{flow}{count[flow]}"
        out = sizes[flow][count[flow] % len(outs)]
        count[flow] += 1
        cost[name] = out / 100
        yard.ask(name, flow=flow, out=out, weight=weights[flow])

    for _ in range(3):
        come("f")
        come("g")
    bound = max(outs) / 100 * (1 + 1 / weight)
    for _ in range(60):
        [(name, _)] = [(n, one) for n, one in yard.leases.items()]
        had[name[2]] += cost[name]
        yard.now += cost[name]
        yard.end(name)
        come(name[2])
        assert abs(had["f"] - had["g"] / weight) <= bound + 1e-6


# What is refused, and what limits the choice.


def test_who_cannot_be_served_in_time_is_told_so_at_once() -> None:
    yard = Yard(a=Has("x"))
    yard.ask("x1")
    yard.served("x")
    assert yard.ask("x2", within_s=0.9) == "late 1.00"
    assert yard.pool.waiting == 0
    assert yard.ask("x3", within_s=1.1) == "waits 1.00"
    assert yard.ask("x4", within_s=1.1) == "late 2.00", "behind the other"
    assert yard.ask("y1", within_s=0.0) == "a load"
    assert yard.ask("z", within_s=0.0) == "waits inf", "nobody knows how long"


def test_who_goes_before_a_flood_is_not_refused_for_its_sake() -> None:
    yard = Yard(a=Has("x"))
    flood(yard, "f", 100)
    yard.served("x")
    assert yard.ask("x-other", flow="o", within_s=3.0) == "waits 1.00"
    assert yard.ask("x-third", flow="g", within_s=3.0) == "waits 2.00", "behind that one alone"
    assert yard.ask("x-now", flow="h", within_s=3.0, priority=Priority.INTERACTIVE) == "waits 1.00"
    assert yard.ask("x-batch", flow="h", within_s=3.0, priority=Priority.BATCH) == "late 103.00"


def test_who_has_its_share_is_told_how_long_its_own_take() -> None:
    """Of the four slots two are a flow's share; the others stay free."""
    yard = Yard(a=Has("x", slots=4), b=Has("y", present="y"))
    yard.ask("y", flow="g")
    for number in range(12):
        yard.ask(f"x{number}", flow="f")
    yard.served("x")
    held = sum(name.startswith("x") for name in yard.leases)
    waiting = 12 - held
    said = yard.ask("x-next", flow="f", within_s=1000.0)
    assert said == f"waits {(waiting + 1) / 2:.2f}"
    assert yard.ask("x-late", flow="f", within_s=1.0) == f"late {(waiting + 2) / 2:.2f}"
    assert yard.ask("z-too", flow="f") == "waits 1.70", "that is no matter to those of x"
    yard.settle(1.0)
    assert yard.ask("x-other", flow="f", within_s=1000.0) == f"waits {(waiting + 2) / 2:.2f}"


def test_where_there_is_no_room_nobody_knows_how_long_a_share_takes() -> None:
    yard = Yard(a=Has("x", slots=1, gpus=(4,)))
    yard.ask("x1", flow="g", out=1000)
    yard.ask("x2", flow="f", out=1000)
    assert yard.ask("y", flow="g") == "waits inf"


def test_a_load_of_its_own_is_no_time_that_a_request_waits() -> None:
    yard = Yard(a=Has("x"))
    yard.look("a", "x", ctx=4096)
    yard.ask("x1", ctx=4096)
    yard.served("x")
    assert yard.ask("x2", ctx=8192, within_s=1.5) == "waits 1.00"


def test_nobody_is_refused_for_a_guess() -> None:
    yard = Yard(a=Has("x"))
    yard.ask("x1")
    assert yard.ask("x2", within_s=0.9) == "waits 1.00"


def test_so_many_of_one_flow_may_wait() -> None:
    yard = Yard(a=Has("x"))
    yard.ask("x", flow="f")
    assert flood(yard, "f", 257) == {"waits": 256, "flow-": 1}
    assert yard.ask("x-other", flow="o")[:5] == "waits"


def test_so_many_may_wait_in_all() -> None:
    yard = Yard(a=Has("x"))
    yard.ask("x")
    for flow in "abcdefgh":
        assert flood(yard, flow, 256) == {"waits": 256}
    assert yard.pool.waiting == 2048
    assert yard.ask("x-more", flow="o") == "queue-full"
    assert yard.ask("x-a", flow="a") == "queue-full"


@pytest.mark.parametrize(("answered", "left"), [("", 1), (url("b"), 0)])
def test_who_is_refused_or_leaves_takes_nothing_from_the_budget(answered: str, left: int) -> None:
    """The budget has room for one."""
    yard = Yard(a=Has("x"), b=Has("x"))
    yard.ask("x-a", pin="a")
    yard.ask("x-b", pin="b")
    flood(yard, "f", 256)
    for _ in range(3):
        assert yard.ask("x-more", flow="f", answered=answered) == "flow-full"
        yard.now += 100.0
    assert yard.pool._budget.running == 0
    yard.ask("x-one", flow="o", answered=answered)
    assert yard.pool._budget.running == 1 - left
    yard.end("x-one")
    assert yard.pool._budget.running == 0
    yard.now += 100.0
    yard.ask("x-two", flow="o", answered=answered)
    assert yard.end("x-a") == {"x-two": "a warm"} or "x-two" not in yard.leases
    yard.end("x-two")
    assert yard.pool._budget.running == 0


def test_a_pin_leaves_one_node() -> None:
    yard = Yard(a=Has(), b=Has("x"))
    assert yard.ask("x1", pin="a") == "a pinned"
    yard.ask("x2", pin="b", out=9000)
    assert yard.ask("x3", pin="b") == "waits 90.00"
    assert yard.ask("x4", pin="c") == "unknown-pin"


def test_what_only_asks_about_a_model_takes_no_slot_and_loads_nothing() -> None:
    yard = Yard(a=Has("x"))
    assert yard.ask("x1") == "a warm"
    assert yard.ask("x2", infers=False) == "a only-node"
    assert yard.ask("y1", infers=False) == "a only-node"
    assert yard.settle() == {}
    assert yard.end("x2") == {}
    assert yard.ask("y2") == "a load"


def test_the_very_same_model_is_asked_where_that_matters() -> None:
    yard = Yard(a=Has("x", digest="one"), b=Has(digest="two"))
    assert yard.ask("x1", digest="two") == "b load"
    assert yard.ask("x2", digest="three") == "nodes-down"


def test_a_node_that_was_tried_is_not_tried_again() -> None:
    yard = Yard(a=Has(), b=Has("x"))
    assert yard.ask("x", tried=["b"]) == "a load"


# What the nodes do meanwhile.


def test_a_node_that_returns_is_empty() -> None:
    yard = Yard(a=Has("x"))
    yard.pool.observe(url("a"), Observation(Sign.REFUSED), yard.now)
    yard.pool.observe(url("a"), Observation(Sign.GOOD), yard.now)
    assert yard.ask("x") == "a load"


def test_what_has_not_ended_on_a_node_that_seemed_down_still_counts() -> None:
    yard = Yard(a=Has("y"))
    yard.ask("x1")
    for sign in (Sign.REFUSED, Sign.GOOD):
        yard.pool.observe(url("a"), Observation(sign), yard.now)
    assert yard.ask("x2") == "waits 3.75"
    yard.begin("x1")
    yard.pool.observe(url("a"), Observation(Sign.REFUSED), yard.now)
    assert yard.settle() == {}
    yard.pool.observe(url("a"), Observation(Sign.GOOD), yard.now)
    assert yard.settle() == {}
    assert yard.end("x1") == {"x2": "a warm"}


def test_a_node_on_trial_gets_one_request_of_those_that_wait() -> None:
    yard = Yard(a=Has("x", slots=4))
    for i in range(6):
        yard.ask(f"x{i}")
    for i in range(3):
        yard.end(f"x{i}", FAILED)
    yard.end("x3")
    for name in [*yard.leases]:
        yard.end(name, FAILED)
    for i in range(9):
        yard.ask(f"x-{i}")
    views = yard.pool.registry.snapshot()
    assert max(view.in_flight for view in views) <= 4


def test_those_that_wait_wait_on_when_all_nodes_are_down_for_a_while() -> None:
    yard = Yard(a=Has("x"))
    yard.ask("x1")
    yard.ask("x2")
    yard.pool.observe(url("a"), Observation(Sign.REFUSED), yard.now)
    assert yard.end("x1", FAILED) == {}
    assert yard.settle(20.0) == {}
    yard.pool.observe(url("a"), Observation(Sign.GOOD), yard.now)
    assert yard.settle() == {"x2": "a load"}


def test_nobody_waits_for_nodes_that_stay_down() -> None:
    yard = Yard(a=Has("x"))
    yard.ask("x1")
    yard.ask("x2", pin="a")
    yard.ask("x3")
    yard.pool.observe(url("a"), Observation(Sign.REFUSED), yard.now)
    assert yard.end("x1", FAILED) == {}
    assert yard.settle(29.0) == {}
    assert yard.settle(1.0) == {"x2": "pin-down", "x3": "nodes-down"}
    assert (yard.pool.waiting, yard.settle()) == (0, {})


@pytest.mark.parametrize("how", ["drained", "removed", "deleted"])
def test_who_waits_in_vain_is_told_what_one_who_comes_now_is(how: str) -> None:
    yard = Yard(a=Has("x y"), b=Has("x y"))
    for name in ("x1", "x2", "x3", "x4"):
        yard.ask(name, pin="a" if name == "x4" else "")
    yard.ask("y1", pin="b")
    yard.ask("y2", pin="b")
    if how == "drained":
        yard.pool.registry.drain("a", draining=True)
        yard.pool.registry.drain("b", draining=True)
    elif how == "removed":
        yard.pool.reconfigure(yard.topology(Policy.EXPECTED_DELAY, b=Has("y")), yard.now)
    for name in ("a", "b") if how == "deleted" else ():
        yard.pool.observe(url(name), Observation(present=models("y")), yard.now)
    if how == "removed":
        yard.pool.observe(url("b"), Observation(present=models("y")), yard.now)
    told = yard.settle(1.0)
    assert told.keys() == {"x3", "x4"} | ({"y2"} if how == "drained" else set())
    assert told["x3"] == yard.ask("x5")
    assert told["x4"] == yard.ask("x6", pin="a")
    assert yard.pool.waiting == (0 if how == "drained" else 1)


def test_who_waits_for_a_node_that_nobody_has_looked_at_waits_on() -> None:
    yard = Yard(a=Has("x"))
    yard.ask("x1")
    yard.ask("x2")
    yard.pool.reconfigure(yard.topology(Policy.EXPECTED_DELAY, b=Has(), c=Has()), yard.now)
    yard.pool.observe(url("b"), Observation(Sign.GOOD, "", models("y")), yard.now)
    assert yard.settle(40.0) == {}
    yard.pool.observe(url("c"), Observation(Sign.GOOD, "", models("x")), yard.now)
    assert yard.settle() == {"x2": "c load"}


def test_who_waits_for_a_full_node_waits_on() -> None:
    yard = Yard(a=Has("x", slots=2))
    for name in ("x1", "x2", "x3"):
        yard.ask(name)
    busy = Outcome(Failure(FailureKind.BUSY))
    assert yard.end("x1", busy) == {}
    assert yard.settle(0.5) == {}
    assert yard.pool.waiting == 1


# How many may wait.


def limited(**limits: int) -> Yard:
    """A yard with two models, one of which is at work already."""
    yard = Yard(a=Has("x"), b=Has("y"))
    yard.pool.reconfigure(
        replace(yard.topology(Policy.EXPECTED_DELAY), queue=QueueLimits(**limits)), yard.now
    )
    yard.ask("x0", flow="first")
    return yard


def test_no_more_wait_than_may() -> None:
    yard = limited(in_all=3)
    said = [yard.ask(f"x{i}", flow=f"f{i}").split()[0] for i in range(1, 6)]
    assert said == ["waits"] * 3 + ["queue-full"] * 2
    assert yard.end("x0") == {"x1": "a warm"}
    assert yard.ask("x6").startswith("waits")
    assert (yard.pool.waiting, yard.ask("x7")) == (3, "queue-full")


def test_no_more_of_a_flow_wait_than_may_and_others_still_do() -> None:
    yard = limited(of_flow=2)
    said = [yard.ask(f"x{i}", flow="f").split()[0] for i in range(1, 5)]
    assert said == ["waits", "waits", "flow-full", "flow-full"]
    assert yard.ask("x5", flow="g").startswith("waits")


def test_what_waits_of_a_flow_has_a_limit_in_bytes_and_one_may_be_of_any_size() -> None:
    yard = limited(flow_bytes=100)
    said = [
        yard.ask(f"x{i}", flow=flow, body_bytes=size).split()[0]
        for i, (flow, size) in enumerate([("f", 500), ("f", 1), ("g", 60), ("g", 40), ("g", 1)], 1)
    ]
    assert said == ["waits", "flow-full", "waits", "waits", "flow-full"]
    yard.end("x4")
    assert yard.ask("x6", flow="g", body_bytes=40).startswith("waits")
    assert yard.ask("x7", flow="g", body_bytes=1) == "flow-full"


def test_however_many_wait_for_one_model_an_idle_one_is_had_at_once() -> None:
    yard = limited(in_all=2, of_flow=1)
    yard.ask("x1", flow="f")
    yard.ask("x2", flow="g")
    assert yard.ask("x3", flow="f") == "queue-full"
    assert yard.ask("y1", flow="f") == "b warm"


def test_a_retry_that_may_not_wait_gives_its_part_of_the_budget_back() -> None:
    yard = limited(in_all=1)
    yard.ask("x1")
    for i in range(2, 5):
        assert yard.ask(f"x{i}", answered="a") == "queue-full"


def test_a_node_that_leaves_is_forgotten_with_its_last_request() -> None:
    yard = Yard(a=Has("x"), b=Has("x"))
    yard.ask("x1", pin="b")
    yard.pool.reconfigure(yard.topology(Policy.EXPECTED_DELAY, a=Has()), yard.now)
    assert len(yard.pool._scheduler.scores.memories) == 2
    yard.end("x1")
    assert len(yard.pool._scheduler.scores.memories) == 1
    yard.pool.learn(url("b"), "x:latest", Usage(), "", 0, yard.now)


def test_those_that_wait_are_served_when_the_policy_changes() -> None:
    yard = Yard(a=Has("x"))
    yard.ask("x1")
    yard.ask("x2")
    yard.pool.reconfigure(yard.topology(Policy.LEAST_IN_FLIGHT), yard.now)
    assert yard.ask("x3") == "a only-node"
    assert yard.settle() == {"x2": "a only-node"}
    assert yard.pool.waiting == 0


def test_so_is_what_is_at_work_however_often_it_changes() -> None:
    yard = Yard(policy=Policy.LEAST_IN_FLIGHT, a=Has("x", slots=2))
    for turn in range(3):
        yard.pool.reconfigure(yard.topology(Policy.LEAST_IN_FLIGHT), yard.now)
        first, second, third, other = (f"{one}{turn}" for one in ("x1", "x2", "x3", "y1"))
        assert yard.ask(first) == yard.ask(other) == "a only-node"
        yard.pool.reconfigure(yard.topology(Policy.EXPECTED_DELAY), yard.now)
        assert yard.ask(second) == "a warm"
        assert yard.ask(third)[:5] == "waits"
        assert yard.pool.leave(yard.asked.pop(other), Outcome(), yard.now) == ()
        assert yard.settle() == {}
        assert yard.pool.leave(yard.asked.pop(first), Outcome(), yard.now) == ()
        assert yard.settle() == {third: "a warm"}
        assert yard.end(second) == yard.end(third) == {}
        yard.settle(60)


def test_what_is_loaded_is_known_as_soon_as_the_policy_changes() -> None:
    yard = Yard(Policy.LEAST_IN_FLIGHT, a=Has("y"), b=Has("x"))
    yard.pool.reconfigure(yard.topology(Policy.EXPECTED_DELAY), yard.now)
    assert yard.ask("x") == "b warm"


def test_what_a_node_had_before_it_went_down_is_not_known_when_the_policy_changes() -> None:
    yard = Yard(Policy.LEAST_IN_FLIGHT, a=Has("x"))
    yard.pool.observe(url("a"), Observation(Sign.REFUSED), yard.now)
    yard.pool.reconfigure(yard.topology(Policy.EXPECTED_DELAY), yard.now)
    yard.pool.observe(url("a"), Observation(Sign.GOOD), yard.now)
    assert yard.ask("x") == "a load"


def test_who_is_at_work_through_several_changes_of_the_policy_has_one_slot() -> None:
    yard = Yard(Policy.LEAST_IN_FLIGHT, a=Has("x", digest="old"))
    yard.ask("x1")
    yard.pool.reconfigure(yard.topology(Policy.EXPECTED_DELAY), yard.now)
    yard.pool.reconfigure(yard.topology(Policy.LEAST_IN_FLIGHT), yard.now)
    yard.pool.observe(url("a"), Observation(present=models(ALL, "new")), yard.now)
    yard.pool.reconfigure(yard.topology(Policy.EXPECTED_DELAY), yard.now)
    yard.end("x1")
    yard.look("a", "x")
    assert yard.ask("x2") == "a warm"


def test_what_is_in_memory_by_a_name_that_may_not_be_used_is_there_by_another_of_it() -> None:
    yard = Yard(a=Has(same="xy"), b=Has())
    topology = yard.topology(Policy.EXPECTED_DELAY)
    [pool] = topology.pools
    nodes = tuple(replace(node, models=("!y", "*")) for node in pool.nodes)
    yard.pool.reconfigure(replace(topology, pools=(replace(pool, nodes=nodes),)), yard.now)
    yard.look("a", "yz")
    assert yard.ask("x") == "a warm"
    node = yard.pool.registry.nodes[url("a")]
    assert node.resides("x:latest")
    assert [*node.resident] == ["z:latest"]


def test_what_is_driven_out_costs_the_same_when_the_name_that_loaded_it_is_gone() -> None:
    yard = Yard(a=Has("y", gpus=(4,), same="yz"))
    yard.demand("z", 50)
    before = yard.terms("x")
    present = models("uvwxz", same="z")
    yard.pool.observe(url("a"), Observation(present=present), yard.now)
    yard.look("a", "y")
    assert yard.terms("x") == before != {"a": terms(0, PRICE_S, 0.3)}


def test_answers_of_the_model_that_had_the_name_before_tell_nothing_of_its_slots() -> None:
    yard = Yard(a=Has("x", auto=True, digest="old"))
    node = yard.pool.registry.nodes[url("a")]
    slots = yard.pool._scheduler.scores.memories[node].learned("old")
    slots.sure = 8
    for i in range(8):
        yard.ask(f"x{i}")
    leases = [*yard.leases.values()]
    yard.pool.observe(url("a"), Observation(present=models(ALL, "new")), yard.now)
    yard.now += 1.0
    for i, lease in enumerate(leases):
        yard.end(f"x{i}")
        told = Usage(0, 100, eval_s=1.0, prompt_s=0.0, total_s=1.0)
        yard.pool.learn(url("a"), "x:latest", told, "", lease.place, yard.now)
    assert yard.pool._scheduler.learned(node)["x:latest"] == 1


def test_slots_are_learned_where_none_are_configured() -> None:
    yard = Yard(a=Has("x", auto=True))
    for i in range(40):
        yard.ask(f"x{i}", out=400)
    came: dict[str, float] = {}
    memory = yard.pool._scheduler.scores.memories[yard.pool.registry.nodes[url("a")]]
    served = 0
    while memory.learned("x:latest").sure < 4 and served < 30:
        came = dict.fromkeys(yard.leases, yard.now) | came
        yard.settle(2.0)
        name, lease = next(iter(yard.leases.items()))
        yard.end(name)
        took_s = yard.now - came[name]
        told = Usage(10, 10, eval_s=took_s - 1.0, prompt_s=1.0, total_s=took_s)
        yard.pool.learn(url("a"), "x:latest", told, "", lease.place, yard.now)
        served += 1
    assert memory.learned("x:latest").sure == 4
    yard.settle(2.0)
    assert len(yard.leases) == 6, "two try"


def test_it_tells_its_state_in_one_line() -> None:
    yard = Yard(a=Has("x"))
    yard.ask("x1")
    yard.ask("x2")
    assert repr(yard.pool._scheduler) == "<Scheduler 1 waiting>"
    assert repr(yard.pool._scheduler.scores) == "<Scores [<a up 1 in flight>]>"
    assert repr(yard.pool._scheduler._shares) == "<Shares of 1 flows>"
    assert repr(yard.pool._scheduler._room) == "<Room {}>"


def test_what_did_not_begin_by_its_order_has_its_slot_until_it_ends() -> None:
    yard = Yard(policy=Policy.LEAST_IN_FLIGHT, a=Has("x"))
    yard.ask("x1")
    yard.pool.reconfigure(yard.topology(Policy.EXPECTED_DELAY), yard.now)
    yard.begin("x1")
    assert yard.ask("x2")[:5] == "waits"
    assert yard.end("x1") == {"x2": "a warm"}


def test_who_tells_nothing_teaches_nothing() -> None:
    yard = Yard(a=Has("x"))
    yard.ask("x")
    before = yard.terms("x")
    yard.pool.learn(url("a"), "x:latest", Usage(), "", 0, yard.now)
    assert yard.terms("x") == before


def test_those_that_wait_are_counted_by_priority() -> None:
    yard = Yard(a=Has("x"))
    for i, priority in enumerate([*Priority, Priority.BATCH]):
        yard.ask(f"x{i}", priority=priority)
    assert yard.pool.queued() == {"interactive": 0, "normal": 1, "batch": 2}


def test_what_is_known_of_slots_can_be_asked() -> None:
    yard = Yard(a=Has("x", auto=True))
    scheduler, node = yard.pool._scheduler, yard.pool.registry.nodes[url("a")]
    yard.ask("x")
    assert scheduler.learned(node) == {"x:latest": 1}
    scheduler.scores.keep([])
    assert scheduler.learned(node) == {}
