"""What is kept in memory: which replica is loaded or asked for again, and when none is.

Nodes are `a` to `d`, models `u` to `z` of 4 GB each on disk. What is to be done is said in words:
`a loads u`, or `a keeps u` where its time is only to begin anew.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.lease import Lease, Warming
from router.core.policy import Attempt, Target
from router.core.pool import Pool
from router.core.types import (
    Digest,
    Failure,
    FailureKind,
    Kept,
    Model,
    NodeSpec,
    Observation,
    Outcome,
    Placement,
    Policy,
    PoolSpec,
    Resilience,
    Sign,
    Topology,
    Wish,
)
from router.core.work import Work
from router.sim.models import GB, SimModel, SimSpec
from router.sim.node import Scheduler as Ollama
from router.sim.runner import Job, Phase

ALL = "uvwxyz"
LIF, DELAY = Policy.LEAST_IN_FLIGHT, Policy.EXPECTED_DELAY
BOTH = pytest.mark.parametrize("policy", [LIF, DELAY])
WALL = 2e9  # what clocks on walls show at 0
GOOD = Outcome()
FAILED = Outcome(Failure(FailureKind.ANSWERED, status=500))
RESET = Outcome(Failure(FailureKind.RESET))


def at(wall: float) -> str:
    return datetime.fromtimestamp(wall, UTC).isoformat()


def named(key: str) -> str:
    return f"{key}:latest"


def url(name: str) -> str:
    return f"http://{name}:11434"


def spec(name: str, gb: int = 0, models: tuple[str, ...] = ()) -> NodeSpec:
    return NodeSpec(
        name, url(name), "http", name, 11434, models=models, gpus=(gb * GB,) if gb else ()
    )


class Barn:
    """A pool and its clock. `warm` and what nodes have is spelled in letters: `uuv` wants u twice
    and v once."""

    def __init__(
        self, warm: str, *pools: str, policy: Policy = DELAY, gb: int = 100,
        has: Mapping[str, str] | None = None, placements: Sequence[Placement] = (),
        digest: Digest = Digest.ANY,
    ) -> None:  # fmt: skip
        self.now, self.policy, self.gb = 1000.0, policy, gb
        self.pools, self.placements, self.digest = pools or ("abc",), tuple(placements), digest
        self.has = {name: (has or {}).get(name, ALL) for name in "".join(self.pools)}
        self.pool = Pool(self.topology(warm), self.now)
        self.doing: dict[str, Warming] = {}
        for name in self.has:
            self.up(name)
            self.look(name)

    def topology(self, warm: str) -> Topology:
        pools = tuple(
            PoolSpec(names, tuple(spec(name, self.gb) for name in names)) for names in self.pools
        )
        return Topology(
            pools, policy=self.policy, placements=self.placements, digest=self.digest,
            warm={named(key): warm.count(key) for key in warm}, up_after=1, down_after=1,
            resilience=Resilience(resets=1),
        )  # fmt: skip

    def up(self, name: str, sign: Sign = Sign.GOOD) -> None:
        present = {named(k): Model(named(k), f"is {k}", self.entry(k)) for k in self.has[name]}
        self.pool.observe(url(name), Observation(sign, "", present), self.now)

    @staticmethod
    def entry(key: str, **more: object) -> Mapping[str, object]:
        return {"name": named(key).upper(), "size": 4 * GB, "size_vram": 4 * GB, **more}

    def look(self, name: str, resident: str = "", left_s: float = 300.0, **more: object) -> None:
        """A look at what it has in memory, all of which expires in so many seconds."""
        expires = at(WALL + self.now + left_s)
        entries = {key: {"expires_at": expires, **self.entry(key), **more} for key in resident}
        found = {
            named(key): Model(named(key), f"is {key}", entry) for key, entry in entries.items()
        }
        seen = Observation(resident=found, wall=WALL + self.now)
        self.pool.observe(url(name), seen, self.now)

    def after(self, seconds: float) -> "Barn":
        self.now += seconds
        return self

    def due(self) -> list[str]:
        """What is begun now."""
        found = []
        for one in self.pool.warmings(self.now):
            text = f"{one.lease.node.name} {'loads' if one.loads else 'keeps'} {one.key[0]}"
            self.doing[text] = one
            found.append(text)
        return found

    def done(self, text: str, outcome: Outcome = GOOD) -> None:
        """It has ended; a look shows what it has come to."""
        self.pool.leave(self.doing.pop(text).lease.attempt, outcome, self.now)

    def ask(self, key: str, name: str, work: Work | None = None) -> Attempt | None:
        """A client's request for a model on a node; None where it waits."""
        target = self.pool.registry.resolve(f"{key}@{name}")
        assert isinstance(target, Target)
        attempt = Attempt(target) if work is None else Attempt(target, work=work)
        found = self.pool.submit(attempt, self.now)
        return attempt if isinstance(found, Lease) else None

    def end(self, attempt: Attempt, outcome: Outcome = GOOD) -> None:
        self.pool.leave(attempt, outcome, self.now)


# What is loaded.


@BOTH
@pytest.mark.parametrize(
    ("warm", "nodes", "done"),
    [
        ("", "abc", []),
        ("u", "abc", ["a loads u"]),
        ("uu", "abc", ["a loads u", "b loads u"]),
        ("uuuuu", "ab", ["a loads u", "b loads u"]),
        ("uv", "ab", ["a loads u", "b loads v"]),
        ("uv", "a", ["a loads u"]),
    ],
)
def test_as_many_replicas_are_loaded_as_are_wanted_and_one_at_a_time_on_a_node(
    warm: str, nodes: str, done: list[str], policy: Policy
) -> None:
    barn = Barn(warm, nodes, policy=policy)
    assert barn.due() == done
    assert barn.due() == []
    assert barn.pool.in_flight == len(done)


@BOTH
def test_the_next_one_is_loaded_when_the_first_has_been(policy: Policy) -> None:
    barn = Barn("uv", "a", policy=policy)
    assert barn.due() == ["a loads u"]
    barn.after(3).done("a loads u")
    barn.look("a", "u")
    assert barn.due() == ["a loads v"]
    barn.after(3).done("a loads v")
    barn.look("a", "uv")
    assert barn.due() == []
    assert barn.pool.in_flight == 0


@BOTH
def test_a_node_is_asked_for_the_name_that_it_lists(policy: Policy) -> None:
    barn = Barn("u", "a", policy=policy)
    barn.due()
    one = barn.doing["a loads u"]
    assert (one.key, one.name, one.num_ctx) == ("u:latest", "U:LATEST", None)
    nameless = Barn("u", "a", policy=policy)
    nameless.pool.observe(
        url("a"), Observation(present={named("u"): Model(named("u"), "", {})}), nameless.now
    )
    nameless.due()
    assert nameless.doing["a loads u"].name == "u:latest"


@BOTH
def test_what_is_in_memory_is_not_loaded(policy: Policy) -> None:
    barn = Barn("uu", policy=policy)
    barn.look("b", "u")
    assert barn.due() == ["a loads u"]


@BOTH
def test_nor_what_is_there_under_another_name_of_the_same(policy: Policy) -> None:
    barn = Barn("u", policy=policy)
    other = {named("copy"): Model(named("copy"), "is u", {})}
    barn.pool.observe(url("b"), Observation(resident=other, wall=WALL + barn.now), barn.now)
    assert barn.due() == []


@BOTH
def test_nor_what_a_request_is_having_loaded(policy: Policy) -> None:
    barn = Barn("u", policy=policy)
    assert barn.ask("u", "c") is not None
    assert barn.due() == []


@BOTH
def test_nothing_is_loaded_on_a_node_that_is_loading_something_else(policy: Policy) -> None:
    barn = Barn("u", "ab", policy=policy)
    assert barn.ask("v", "a") is not None
    assert barn.due() == ["b loads u"]


@BOTH
def test_only_nodes_that_have_the_model_and_take_requests_are_asked(policy: Policy) -> None:
    barn = Barn("uuuu", "abcd", policy=policy, has={"a": "v"})
    barn.up("b", Sign.REFUSED)
    barn.pool.registry.drain("c", draining=True)
    assert barn.due() == ["d loads u"]


@BOTH
def test_what_a_breaker_keeps_away_from_is_left_alone(policy: Policy) -> None:
    barn = Barn("uuv", "abc", policy=policy)
    first = barn.ask("w", "a")
    assert first is not None
    barn.end(first, RESET)
    second = barn.ask("u", "b")
    assert second is not None
    barn.end(second, Outcome(Failure(FailureKind.BUSY)))
    assert barn.due() == ["c loads u", "b loads v"]


@BOTH
def test_a_model_lives_only_where_it_may(policy: Policy) -> None:
    there = Placement(("u*",), nodes=("b",))
    assert Barn("uu", policy=policy, placements=[there]).due() == ["b loads u"]
    assert Barn("u", policy=policy, placements=[Placement(("u*",), nodes=("x",))]).due() == []


@BOTH
def test_nodes_that_come_first_have_it_first(policy: Policy) -> None:
    rather = Placement(("u*",), nodes=("c",), wish=Wish.PREFER)
    assert Barn("uu", policy=policy, placements=[rather]).due() == ["c loads u", "a loads u"]
    barn = Barn("uu", "a", "bc", policy=policy)
    barn.look("b", "u")
    barn.look("c", "u")
    assert barn.due() == ["a loads u"], "later pools are for what is left"


@BOTH
def test_another_node_has_it_when_one_dies_or_is_drained(policy: Policy) -> None:
    barn = Barn("u", "abc", policy=policy)
    barn.look("a", "u")
    barn.up("a", Sign.REFUSED)
    assert barn.due() == ["b loads u"]
    barn.done("b loads u")
    barn.look("b", "u")
    barn.pool.registry.drain("b", draining=True)
    assert barn.due() == ["c loads u"]


@BOTH
def test_a_load_that_fails_is_tried_elsewhere_and_there_later_each_time(policy: Policy) -> None:
    barn = Barn("u", "a", policy=policy)
    waits = []
    for _ in range(4):
        assert barn.due() == ["a loads u"]
        barn.after(1).done("a loads u", Outcome(told=False))
        waited = 0
        while not barn.due():
            barn.after(1)
            waited += 1
        barn.done("a loads u", Outcome(told=False))
        waits.append(waited)
        barn.after(601)
    assert waits == [5, 20, 80, 320]
    barn.after(1201)
    assert barn.due() == ["a loads u"]
    barn.done("a loads u", Outcome(told=False))
    assert barn.after(5).due() == ["a loads u"]
    two = Barn("u", "ab", policy=policy)
    assert two.due() == ["a loads u"]
    two.done("a loads u", FAILED)
    assert two.due() == ["b loads u"]


# At whose price.


def test_the_node_that_loses_least_loads_it() -> None:
    barn = Barn("u", "ab", gb=9)
    barn.look("a", "vw")
    barn.look("b", "v")
    assert barn.after(100).due() == ["b loads u"]
    barn = Barn("u", "ab", gb=9, policy=LIF)
    barn.look("a", "vw")
    barn.look("b", "v")
    assert barn.due() == ["b loads u"]


@BOTH
def test_among_nodes_that_lose_nothing_the_emptiest_loads_it(policy: Policy) -> None:
    barn = Barn("u", "ab", policy=policy)
    barn.look("a", "v")
    assert barn.due() == ["b loads u"]


@BOTH
def test_nothing_that_works_is_driven_out(policy: Policy) -> None:
    barn = Barn("u", "a", policy=policy, gb=9)
    barn.look("a", "vw")
    barn.after(100)
    working = [barn.ask(key, "a") for key in "vw"]
    assert barn.due() == []
    for one in working:
        assert one is not None
        barn.end(one)
    assert barn.after(100).due() == ["a loads u"]


def test_nothing_that_is_waited_for_is_driven_out_and_who_waits_for_a_load_goes_first() -> None:
    barn = Barn("u", "a", gb=5)
    barn.look("a", "v")
    barn.after(100)
    first = barn.ask("v", "a")
    assert first is not None
    assert barn.ask("w", "a") is None
    barn.pool.leave(first, Outcome(), barn.now)
    assert barn.due() == [], "w goes there"


@BOTH
def test_nothing_else_that_is_kept_there_is_driven_out(policy: Policy) -> None:
    barn = Barn("uv", "a", policy=policy, gb=5)
    barn.look("a", "v")
    assert barn.after(100).due() == []


def test_what_is_kept_may_go_where_enough_others_have_it() -> None:
    barn = Barn("uv", "ab", gb=5, has={"b": "v"})
    barn.look("a", "v")
    barn.look("b", "v")
    assert barn.after(100).due() == ["a loads u"]


def test_where_nothing_is_known_of_a_nodes_memory_only_an_idle_one_is_asked() -> None:
    barn = Barn("u", "ab", policy=LIF, gb=0)
    barn.look("a", "v")
    barn.look("b", "vw")
    first = barn.ask("v", "a")
    assert barn.due() == ["b loads u"]
    barn.done("b loads u", Outcome(told=False))
    assert barn.due() == []
    assert first is not None
    barn.end(first)
    assert barn.due() == ["a loads u"]


def test_a_size_that_a_node_does_not_tell_is_that_on_disk() -> None:
    barn = Barn("u", "a", policy=LIF, gb=7)
    barn.look("a", "v", size_vram=None)
    first = barn.ask("v", "a")
    assert first is not None
    assert barn.due() == []


def test_others_count_with_a_load_of_what_is_kept_for_certain() -> None:
    def load_s(warm: str) -> float:
        barn = Barn(warm, "ab", gb=5)
        barn.look("a", "v")
        barn.after(100)
        target = barn.pool.registry.resolve("w")
        assert isinstance(target, Target)
        [found] = [
            one for one in barn.pool.explain(target, Work(), barn.now) if one.node.name == "a"
        ]
        assert found.load_s is not None
        return found.load_s

    once = 3.0  # seconds that a model of 4 GB takes to load
    assert load_s("") == pytest.approx(1.5 * once), "nobody has ever asked for v"
    assert load_s("v") == pytest.approx(1.5 * once + 8 * once)


def test_a_load_is_in_the_schedulers_books() -> None:
    barn = Barn("u", "ab", gb=9)
    assert barn.due() == ["a loads u"]
    assert barn.ask("v", "a") is None, "one load at a time"
    waits = barn.pool.submit(Attempt(barn.doing["a loads u"].lease.attempt.target), barn.now)
    assert not isinstance(waits, Lease), "it is quicker to wait for the load than to begin another"
    barn.done("a loads u")
    [first, *_] = barn.pool.granted(barn.now)
    assert isinstance(first, Lease)


def test_a_node_that_dies_while_it_loads_has_nothing() -> None:
    barn = Barn("u", "a")
    barn.due()
    barn.up("a", Sign.REFUSED)
    barn.done("a loads u", Outcome(Failure(FailureKind.REFUSED)))
    barn.up("a")
    assert barn.after(10).due() == ["a loads u"]


# What is asked for again.


@BOTH
def test_it_is_asked_for_again_after_half_of_its_time(policy: Policy) -> None:
    barn = Barn("u", "a", policy=policy)
    barn.look("a", "u", left_s=300, context_length=8192)
    assert (barn.due(), barn.pool.warm.next_at) == ([], barn.now + 150)
    barn.after(100).look("a", "u", left_s=200)
    assert barn.after(49).due() == []
    assert barn.after(1).due() == ["a keeps u"]
    one = barn.doing["a keeps u"]
    assert (one.name, one.num_ctx) == ("U:LATEST", None)
    assert barn.due() == []
    barn.done("a keeps u")
    assert barn.due() == []
    barn.look("a", "u", left_s=300)
    assert (barn.due(), barn.pool.warm.next_at) == ([], barn.now + 150)


def test_with_the_context_that_it_has() -> None:
    barn = Barn("u", "a")
    barn.look("a", "u", context_length=8192)
    barn.after(150).due()
    assert barn.doing["a keeps u"].num_ctx == 8192


@BOTH
def test_what_works_is_not_asked_for(policy: Policy) -> None:
    barn = Barn("u", "a", policy=policy)
    barn.look("a", "u", left_s=10)
    first = barn.ask("u", "a")
    assert first is not None
    assert barn.after(20).due() == []
    barn.end(first)
    barn.look("a", "u", left_s=10)
    assert barn.due() == []
    assert barn.after(5).due() == ["a keeps u"]


@BOTH
def test_what_stays_though_its_time_is_over_is_asked_for_now_and_then(policy: Policy) -> None:
    barn = Barn("u", "a", policy=policy)
    barn.look("a", "u", left_s=-10)
    assert barn.due() == []
    for _ in range(3):
        assert barn.after(5).due() == ["a keeps u"]
        barn.done("a keeps u")
        barn.look("a", "u", left_s=-10 - (barn.now - 1000))
        assert barn.due() == []


@BOTH
@pytest.mark.parametrize("expires", ["2318-11-20T00:00:00Z", "12000-01-01T00:00:00Z", "soon"])
def test_what_stays_for_ever_is_left_alone(policy: Policy, expires: str) -> None:
    barn = Barn("u", "a", policy=policy)
    barn.look("a", "u", expires_at=expires)
    assert barn.after(1e6).due() == []


@BOTH
def test_what_is_more_than_wanted_is_left_to_expire(policy: Policy) -> None:
    barn = Barn("u", "abc", policy=policy)
    barn.look("a", "u", left_s=100)
    barn.look("b", "u", left_s=300)
    barn.look("c", "u", left_s=200)
    assert barn.after(99).due() == []
    assert barn.after(51).due() == ["b keeps u"]


@BOTH
def test_an_expired_one_is_loaded_again(policy: Policy) -> None:
    barn = Barn("u", "a", policy=policy)
    barn.look("a", "u", left_s=10)
    assert barn.after(4).due() == []
    barn.look("a", "")
    assert barn.due() == ["a loads u"]


def test_the_times_of_a_node_without_a_clock_are_not_read() -> None:
    barn = Barn("u", "a")
    seen = {named("u"): Model(named("u"), "is u", {"expires_at": at(WALL)})}
    barn.pool.observe(url("a"), Observation(resident=seen), barn.now)
    assert barn.after(1000).due() == []


# What the operator says.


@BOTH
def test_a_reload_takes_effect_at_once(policy: Policy) -> None:
    barn = Barn("u", "a", policy=policy)
    assert barn.due() == ["a loads u"]
    barn.done("a loads u")
    barn.look("a", "u")
    barn.pool.reconfigure(barn.topology("uv"), barn.now)
    assert barn.due() == ["a loads v"]
    barn.pool.reconfigure(barn.topology("v"), barn.now)
    barn.done("a loads v")
    barn.look("a", "uv")
    assert barn.after(150).due() == ["a keeps v"]
    barn.pool.reconfigure(barn.topology(""), barn.now)
    barn.done("a keeps v")
    assert barn.after(1000).due() == []
    assert repr(barn.pool.warm) == "<Warm {}>"


@BOTH
def test_what_is_kept_can_be_seen(policy: Policy) -> None:
    barn = Barn("uuv", "ab", policy=policy)
    barn.look("b", "u")
    assert barn.pool.warm.kept() == [Kept("u:latest", 2, ("b",)), Kept("v:latest", 1)]
    barn.pool.registry.drain("b", draining=True)
    assert barn.pool.warm.kept() == [Kept("u:latest", 2), Kept("v:latest", 1)]


def test_it_is_no_request_of_a_client() -> None:
    barn = Barn("u", "a")
    before = barn.pool._scheduler.scores._demand.rate("u:latest", barn.now)
    barn.due()
    barn.done("a loads u")
    assert barn.pool._scheduler.scores._demand.rate("u:latest", barn.now) == before == 0.0


# Over nodes that behave as Ollama does.

FARM = SimSpec(
    models=tuple(SimModel(key, size_bytes=2 * GB, load_s=2.0) for key in "uvwx"),
    memory_bytes=7 * GB,
    max_loaded=8,
    keep_alive_s=20.0,
)


class Farm:
    """A pool over models of Ollama nodes, in virtual time."""

    def __init__(self, policy: Policy, warm: str) -> None:
        self.now = 0.0
        self.nodes = {name: Ollama(FARM, 0.0) for name in "abc"}
        nodes = tuple(spec(name, 7) for name in self.nodes)
        self.wanted = {named(key): warm.count(key) for key in warm}
        self.pool = Pool(Topology((PoolSpec("p", nodes),), policy=policy, warm=self.wanted), 0.0)
        self.jobs: dict[Attempt, tuple[str, Job]] = {}
        self.look()

    def look(self) -> None:
        present = {
            model.name: Model(model.name, model.digest, {"size": model.size_bytes})
            for model in FARM.models
        }
        for name, node in self.nodes.items():
            found = {
                one.model.name: Model(
                    one.model.name, one.model.digest,
                    {"size_vram": one.reserved_bytes, "expires_at": at(WALL + one.expires_at)},
                )
                for one in node.resident(self.now)
            }  # fmt: skip
            seen = Observation(Sign.GOOD, "", present, found, wall=WALL + self.now)
            self.pool.observe(url(name), seen, self.now)

    def holds(self, name: str) -> int:
        """How many models a node is thought to hold: three fit, but what went early by chance may
        have taught that fewer do."""
        memory = self.pool._scheduler.scores.memories.get(self.pool.registry.nodes[url(name)])
        return 3 if memory is None else min(3, memory._count_max)

    def begin(self, attempt: Attempt, name: str, job: Job) -> None:
        self.jobs[attempt] = (name, job)
        assert self.nodes[name].submit(job, self.now)

    def ask(self, key: str) -> None:
        target = self.pool.registry.resolve(key)
        assert isinstance(target, Target)
        attempt = Attempt(target, work=Work(max_tokens=100))
        found = self.pool.submit(attempt, self.now)
        if isinstance(found, Lease):
            self.begin(attempt, found.node.name, self.job(key))

    @staticmethod
    def job(key: str) -> Job:
        [model] = [model for model in FARM.models if model.name == named(key[0])]
        return Job(model, prompt_tokens=100, answer_tokens=300)

    def warm(self) -> None:
        for one in self.pool.warmings(self.now):
            node = self.nodes[one.lease.node.name]
            if one.loads:
                self.has_room(node, one)
            job = self.job(one.key)
            job.load_only = True
            self.begin(one.lease.attempt, one.lease.node.name, job)

    def has_room(self, node: Ollama, one: Warming) -> None:
        """What is idle and not wanted is enough to go, whatever the order."""
        assert node.pending == 0, "never two loads at once"
        there = node.resident(self.now)
        busy = sum(r.reserved_bytes for r in there if r.in_flight)
        assert busy + 2.3 * GB <= FARM.memory_bytes, "nothing that works has to go"

    def settle(self) -> None:
        for attempt, (_, job) in list(self.jobs.items()):
            if job.phase is Phase.DONE:
                del self.jobs[attempt]
                self.pool.leave(attempt, Outcome(), self.now)
        for lease in self.pool.granted(self.now):
            assert isinstance(lease, Lease)
            model = lease.attempt.target.model
            assert model is not None
            self.begin(lease.attempt, lease.node.name, self.job(model.key))

    def second(self, asked: str = "") -> None:
        self.now += 1.0
        for node in self.nodes.values():
            node.advance(self.now)
        self.settle()
        for key in asked:
            self.ask(key)
        if self.now % 3 == 0:
            self.look()
        self.warm()


@BOTH
@given(
    st.lists(st.sampled_from("uvwx"), max_size=6).map("".join),
    st.lists(st.text("uvwx", max_size=3), max_size=40),
)
def test_it_comes_to_what_is_wanted_and_never_at_the_price_of_what_works(
    policy: Policy, warm: str, asked: list[str]
) -> None:
    farm = Farm(policy, warm)
    for keys in asked:
        farm.second(keys)
    for _ in range(150):
        farm.second()
    farm.settle()
    assert not farm.jobs
    assert farm.pool.in_flight == 0
    farm.look()
    for kept in farm.pool.warm.kept():
        assert len(kept.nodes) <= kept.wanted
        if len(kept.nodes) < min(kept.wanted, 3):  # then the others are full of what is kept
            for name in farm.nodes.keys() - {*kept.nodes}:
                there = [one.model.name for one in farm.nodes[name].resident(farm.now)]
                assert len(there) >= farm.holds(name)
                assert farm.wanted.keys() >= {*there}
