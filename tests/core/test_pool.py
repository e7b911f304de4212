"""The pool: what a name means, who gets a lease, what a new configuration keeps."""

from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core import dialect
from router.core.lease import Lease, Queued
from router.core.names import parse
from router.core.policy import Attempt, Target
from router.core.pool import Pool
from router.core.rates import Waits
from router.core.retry import Verdict
from router.core.trail import Trail
from router.core.types import (
    Ejection,
    Failure,
    FailureKind,
    Flip,
    Health,
    Model,
    NodeSpec,
    Observation,
    Outcome,
    Reason,
    Refusal,
    Rejected,
    Resilience,
    Sign,
)
from router.core.usage import Usage
from tests.core.build import (
    RULES,
    ask,
    attempt,
    felt,
    in_flight,
    lease,
    models,
    ready,
    seen,
    spec,
    topology,
)

GPU_1, GPU_2 = spec("gpu-1"), spec("gpu-2")
HAS = {
    "gpu-1": ["llama3:8b", "phi:latest", "ollama/odd:latest"],
    "gpu-2": ["llama3:8b", "codellama:34b"],
}
ALIASES = {
    "chat": "llama3:8b",
    "code": "codellama:34b@gpu-1",
    "big:v2": "hf.co/Org/Big:Q4",
    "phi:3b": "ollama/phi",
    "there": "phi",
    "far": "kimi:cloud",
}


@pytest.fixture
def pool() -> Pool:
    return ready(topology([GPU_1, GPU_2], aliases=ALIASES), HAS)


def refused(pool: Pool, text: str) -> Refusal:
    verdict = ask(pool, text)
    assert isinstance(verdict, Rejected), verdict
    return verdict.refusal


def reset(kind: FailureKind = FailureKind.RESET) -> Outcome:
    return Outcome(Failure(kind, detail=f"it was {kind}"))


DONE = Outcome()

# what the client wrote: what the node is told, the key, the pin
RESOLVED: dict[str, tuple[str, str, str | None]] = {
    "llama3:8b": ("llama3:8b", "llama3:8b", None),
    "phi": ("phi", "phi:latest", None),
    "LLaMA3:8B": ("LLaMA3:8B", "llama3:8b", None),
    "no-such": ("no-such", "no-such:latest", None),
    "phi:local": ("phi:local", "phi:latest", None),
    "gpt-oss:20b-cloud": ("gpt-oss:20b-cloud", "gpt-oss:20b-cloud", None),
    # a pin is taken off
    "llama3:8b@gpu-2": ("llama3:8b", "llama3:8b", "gpu-2"),
    "LLaMA3@http://gpu-2:11434": ("LLaMA3", "llama3:latest", "http://gpu-2:11434"),
    "gpt-oss:20b-cloud@gpu-2": ("gpt-oss:20b-cloud", "gpt-oss:20b-cloud", "gpu-2"),
    " phi @ gpu-2 ": ("phi", "phi:latest", "gpu-2"),
    # the prefix is taken off, unless a node has a model that is called so
    "ollama/llama3:8b": ("llama3:8b", "llama3:8b", None),
    "OLLAMA/llama3:8b": ("llama3:8b", "llama3:8b", None),
    "ollama/no-such": ("no-such", "no-such:latest", None),
    "ollama/odd": ("ollama/odd", "ollama/odd:latest", None),
    "ollama/odd:8b": ("odd:8b", "odd:8b", None),
    "ollama/hf.co/a/b:Q4": ("hf.co/a/b:Q4", "hf.co/a/b:q4", None),
    "ollama/ollama/odd": ("ollama/odd", "ollama/odd:latest", None),
    "ollama/llama3:8b@gpu-2": ("llama3:8b", "llama3:8b", "gpu-2"),
    "ollama/odd@gpu-2": ("ollama/odd", "ollama/odd:latest", "gpu-2"),
    # aliases
    "chat": ("llama3:8b", "llama3:8b", None),
    "CHAT:latest": ("llama3:8b", "llama3:8b", None),
    "chat:8b": ("chat:8b", "chat:8b", None),
    "chat@gpu-2": ("llama3:8b", "llama3:8b", "gpu-2"),
    "ollama/chat": ("llama3:8b", "llama3:8b", None),
    "code": ("codellama:34b", "codellama:34b", "gpu-1"),
    "code@gpu-2": ("codellama:34b", "codellama:34b", "gpu-2"),
    "big:V2": ("hf.co/Org/Big:Q4", "hf.co/org/big:q4", None),
    "big": ("big", "big:latest", None),
    "phi:3b": ("phi", "phi:latest", None),
    "far": ("kimi:cloud", "kimi:cloud", None),
}


@pytest.mark.parametrize(("text", "expected"), RESOLVED.items(), ids=RESOLVED)
def test_resolve(pool: Pool, text: str, expected: tuple[str, str, str | None]) -> None:
    target = pool.registry.resolve(text)
    assert isinstance(target, Target)
    assert target.model is not None
    assert (target.sent, target.model.key, target.pin and target.pin.text) == expected


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("llama3:8b", "llama3:8b"),
        (" llama3:8b", " llama3:8b"),
        ("no-such ", "no-such "),
        ("LLaMA3:8B", "LLaMA3:8B"),
        ("ph\\u0069", "ph\\u0069"),
        ("ph\\u0069\\n", "ph\\u0069\\n"),
        (" llama3:8b@gpu-1 ", "llama3:8b"),
        ("phi\\u0040gpu-1", "phi"),
        ("ollama/Phi", "Phi"),
        ("chat", "llama3:8b"),
    ],
)
def test_a_body_goes_out_byte_for_byte_unless_something_is_taken_off(
    pool: Pool, written: str, sent: str
) -> None:
    route = dialect.find("/api/chat")
    assert route is not None
    body = f'{{ "model":"{written}" }}'.encode()
    call = dialect.parse(route, body)
    target = pool.registry.resolve(call.model)
    assert isinstance(target, Target)
    assert b"".join(dialect.rename(body, call, target.sent)) == f'{{ "model":"{sent}" }}'.encode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a b",
        "ollama/",
        "ollama/a b",
        "a:b:c",
        "hf.co/model",
        "phi@",
        "@gpu-1",
        "phi@sha256:abc",
        "phi@me@gpu-1",
        "phi@http://gpu-1/path",
        "phi@gpu-1:cloud",
        "a b@gpu-1",
        "chat@gpu-1@gpu-2",
        "phi:cloud:local",
    ],
)
def test_a_bad_name_is_refused_whatever_the_nodes_do(pool: Pool, text: str) -> None:
    assert refused(pool, text) is Refusal.BAD_NAME
    down = ready(topology([GPU_1, GPU_2], aliases=ALIASES), HAS, down=["gpu-1", "gpu-2"])
    assert refused(down, text) is Refusal.BAD_NAME


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("no-such", Refusal.NO_MODEL),
        ("llama3", Refusal.NO_MODEL),
        ("phi@gpu-9", Refusal.UNKNOWN_PIN),
        ("phi@10.0.0.1:22", Refusal.UNKNOWN_PIN),
        ("phi@gpu-2", Refusal.NOT_ON_PIN),
        ("code", Refusal.NOT_ON_PIN),
    ],
)
def test_no_lease(pool: Pool, text: str, refusal: Refusal) -> None:
    assert refused(pool, text) is refusal
    assert pool.in_flight == 0


def test_the_exact_name_wins_over_the_prefix_on_a_node_that_is_down_too() -> None:
    pool = ready(topology([GPU_1, GPU_2]), {**HAS, "gpu-2": ["odd:latest"]}, down=["gpu-1"])
    assert ask(pool, "ollama/odd") == Rejected(Refusal.NODES_DOWN, (GPU_1,))


def test_an_alias_is_read_once_and_leads_to_a_model_of_its_own_name() -> None:
    pool = ready(topology([GPU_1], aliases={"phi": "llama3:8b", "llama3:8b": "phi"}), HAS)
    target = pool.registry.resolve("phi")
    assert isinstance(target, Target)
    assert target.sent == "llama3:8b"


def test_an_alias_does_not_catch_the_cloud_model_of_its_name() -> None:
    pool = ready(topology([GPU_1], aliases={"kimi": "phi"}), HAS)
    target = pool.registry.resolve("kimi:cloud")
    assert isinstance(target, Target)
    assert target.sent == "kimi:cloud"


def test_a_lease_tells_the_node_and_why(pool: Pool) -> None:
    assert lease(pool, "phi").reason is Reason.ONLY
    assert lease(pool, "phi").node == GPU_1
    assert lease(pool, "llama3:8b").reason is Reason.LEAST_IN_FLIGHT
    assert lease(pool, "llama3:8b@gpu-1").reason is Reason.PINNED


def test_a_rejection_names_the_nodes_it_is_about(pool: Pool) -> None:
    assert ask(pool, "phi@gpu-9") == Rejected(Refusal.UNKNOWN_PIN, (GPU_1, GPU_2))
    pool.observe(GPU_1.url, felt(Sign.REFUSED), now=1.0)
    assert ask(pool, "phi") == Rejected(Refusal.NODES_DOWN, (GPU_1,))
    assert ask(pool, "phi@gpu-1") == Rejected(Refusal.PIN_DOWN, (GPU_1,))


def test_a_node_that_was_tried_is_not_asked_again(pool: Pool) -> None:
    assert lease(pool, "llama3:8b", tried=[GPU_1.url]).node == GPU_2
    assert ask(pool, "llama3:8b", tried=[GPU_1.url, GPU_2.url]) == Rejected(
        Refusal.ALL_TRIED, (GPU_1, GPU_2)
    )


def nodes(count: int, slots: int = 1) -> list[NodeSpec]:
    return [spec(f"n{i}", slots=slots) for i in range(count)]


@given(st.integers(1, 6), st.integers(0, 60), st.integers(1, 3))
def test_a_burst_over_equal_nodes_spreads_at_most_one_apart(
    size: int, burst: int, slots: int
) -> None:
    specs = nodes(size, slots)
    pool = ready(topology(specs), {spec.name: ["m:latest"] for spec in specs})
    for i in range(burst):
        lease(pool, "m")
        counts = in_flight(pool).values()
        assert max(counts) - min(counts) <= 1
        assert sum(counts) == i + 1


def test_ties_rotate() -> None:
    specs = nodes(3)
    pool = ready(topology(specs), {spec.name: ["m:latest"] for spec in specs})
    order = ""
    for _ in range(6):
        one = attempt(pool, "m")
        verdict = pool.submit(one, now=0.0)
        assert isinstance(verdict, Lease)
        order += verdict.node.name
        pool.leave(one, DONE, now=0.0)
    assert order == "n0n1n2n0n1n2"


def test_a_burst_over_unequal_nodes_fills_them_to_their_size() -> None:
    specs = [spec("small"), spec("wide", slots=4), spec("fast", weight=2.0)]
    pool = ready(topology(specs), {spec.name: ["m:latest"] for spec in specs})
    for _ in range(21):
        lease(pool, "m")
    assert in_flight(pool) == {"small": 3, "wide": 12, "fast": 6}


def test_slots_are_no_cap(pool: Pool) -> None:
    for _ in range(50):
        lease(pool, "phi")
    assert in_flight(pool) == {"gpu-1": 50, "gpu-2": 0}


def test_load_counts_every_model_of_a_node(pool: Pool) -> None:
    lease(pool, "phi")
    lease(pool, "phi")
    assert [lease(pool, "llama3:8b").node.name for _ in range(2)] == ["gpu-2", "gpu-2"]


def test_an_attempt_leaves_once(pool: Pool) -> None:
    one = attempt(pool, "phi")
    other = attempt(pool, "phi")
    pool.submit(one, now=0.0)
    pool.submit(other, now=0.0)
    for _ in range(3):
        assert not pool.leave(one, DONE, now=0.0)
        assert in_flight(pool) == {"gpu-1": 1, "gpu-2": 0}
    assert pool.in_flight == 1


def test_equal_attempts_are_two(pool: Pool) -> None:
    target = attempt(pool, "phi").target
    assert Attempt(target) != Attempt(target)


@pytest.mark.parametrize("outcome", [DONE, reset(FailureKind.REFUSED)])
def test_leaving_without_a_lease_changes_nothing(pool: Pool, outcome: Outcome) -> None:
    before = (pool.registry.snapshot(), pool.registry.revision)
    rejected = attempt(pool, "no-such")
    assert isinstance(pool.submit(rejected, now=0.0), Rejected)
    assert not pool.leave(rejected, outcome, now=1.0)
    assert not pool.leave(attempt(pool, "phi"), outcome, now=1.0)
    assert (pool.registry.snapshot(), pool.registry.revision) == before


def test_a_refused_connection_takes_the_node_down_at_once(pool: Pool) -> None:
    one = attempt(pool, "phi")
    pool.submit(one, now=0.0)
    flips = pool.leave(one, reset(FailureKind.REFUSED), now=7.0)
    assert flips == [Flip("gpu-1", Health.UP, Health.DOWN, "it was refused")]
    assert pool.registry.snapshot()[0].since == 7.0
    assert refused(pool, "phi") is Refusal.NODES_DOWN


def test_the_second_refusal_is_no_second_flip(pool: Pool) -> None:
    attempts = [attempt(pool, "phi") for _ in range(2)]
    for one in attempts:
        pool.submit(one, now=0.0)
    flips = [pool.leave(one, reset(FailureKind.REFUSED), now=1.0) for one in attempts]
    assert [len(flip) for flip in flips] == [1, 0]


@pytest.mark.parametrize("kind", [kind for kind in FailureKind if kind is not FailureKind.REFUSED])
def test_one_other_failure_is_left_to_the_probes(pool: Pool, kind: FailureKind) -> None:
    one = attempt(pool, "phi")
    pool.submit(one, now=0.0)
    assert not pool.leave(one, reset(kind), now=1.0)
    assert pool.registry.snapshot()[0].health is Health.UP


def test_observe_tells_each_flip_once() -> None:
    pool = Pool(topology([GPU_1], up_after=2, down_after=2), now=0.0)
    signs = [Sign.GOOD, Sign.GOOD, Sign.BAD, None, Sign.BAD, Sign.BAD, Sign.GOOD, Sign.GOOD]
    looks = [pool.observe(GPU_1.url, felt(sign, f"look {i}"), i) for i, sign in enumerate(signs)]
    assert [flip for flips in looks for flip in flips] == [
        Flip("gpu-1", Health.UNKNOWN, Health.UP, "look 0"),
        Flip("gpu-1", Health.UP, Health.DOWN, "look 4"),
        Flip("gpu-1", Health.DOWN, Health.UP, "look 7"),
    ]


def test_a_node_that_is_loading_or_busy_is_not_down(pool: Pool) -> None:
    for _ in range(20):
        assert not pool.observe(GPU_1.url, felt(None), now=1.0)
    assert pool.registry.snapshot()[0].health is Health.UP
    assert not pool.registry.suspect(GPU_1.url)


def test_what_is_learned_of_a_busy_node_is_taken(pool: Pool) -> None:
    pool.observe(GPU_1.url, seen("new:latest", sign=None, version="0.9.0"), now=1.0)
    assert pool.registry.snapshot()[0].present == models(["new:latest"])
    assert pool.registry.snapshot()[0].version == "0.9.0"


def test_a_probe_of_a_node_that_is_gone_is_passed_over(pool: Pool) -> None:
    before = pool.registry.revision
    assert not pool.observe("http://gone:11434", seen("m:latest"), now=1.0)
    assert pool.registry.revision == before
    assert not pool.registry.suspect("http://gone:11434")


def test_models_come_and_go_with_observations(pool: Pool) -> None:
    pool.observe(GPU_2.url, seen("new:latest"), now=1.0)
    assert lease(pool, "new").node == GPU_2
    assert refused(pool, "codellama:34b") is Refusal.NO_MODEL
    assert lease(pool, "llama3:8b").node == GPU_1


def test_revision_grows_with_what_a_listing_shows_and_with_nothing_else(pool: Pool) -> None:
    steps = [
        (felt(Sign.GOOD), 0),
        (felt(Sign.BAD), 0),
        (felt(None), 0),
        (felt(Sign.REFUSED), 1),
        (felt(Sign.REFUSED), 0),
        (seen("a:latest", sign=None), 1),
        (seen("a:latest", sign=None), 0),
        (seen("a:latest", sign=None, resident=["a:latest"]), 1),
    ]
    for observation, grows in steps:
        before = pool.registry.revision
        pool.observe(GPU_1.url, observation, now=1.0)
        assert pool.registry.revision - before == grows
    before = pool.registry.revision
    lease(pool, "llama3:8b")
    assert pool.registry.revision == before
    pool.reconfigure(topology([GPU_1]), now=1.0)
    assert pool.registry.revision > before


def test_probed_and_any_up() -> None:
    pool = Pool(topology([GPU_1], [GPU_2]), now=0.0)
    states = [(pool.registry.probed, pool.registry.any_up)]
    for url, sign in [(GPU_1.url, Sign.BAD), (GPU_2.url, Sign.REFUSED), (GPU_2.url, Sign.GOOD)]:
        pool.observe(url, felt(sign), now=1.0)
        states.append((pool.registry.probed, pool.registry.any_up))
    pool.observe(GPU_2.url, felt(Sign.GOOD), now=1.0)
    states.append((pool.registry.probed, pool.registry.any_up))
    assert states == [(False, False), (False, False), (True, False), (True, False), (True, True)]
    assert [view.up for view in pool.registry.snapshot()] == [False, True]


def test_a_pool_without_nodes() -> None:
    pool = Pool(topology(), now=0.0)
    assert pool.registry.snapshot() == []
    assert pool.registry.probed
    assert not pool.registry.any_up
    assert ask(pool, "m") == Rejected(Refusal.NODES_DOWN)


def test_a_snapshot_does_not_change_afterwards(pool: Pool) -> None:
    before = pool.registry.snapshot()
    lease(pool, "phi")
    pool.observe(GPU_1.url, seen("b:latest", sign=Sign.REFUSED), now=9.0)
    assert [(view.in_flight, view.health) for view in before] == [(0, Health.UP)] * 2
    assert "phi:latest" in before[0].present


def test_repr_tells_the_state(pool: Pool) -> None:
    lease(pool, "phi")
    assert repr(pool) == "<Pool [<gpu-1 up 1 in flight>, <gpu-2 up 0 in flight>] 1 leases>"
    assert repr(pool.registry) == "<Registry [<gpu-1 up 1 in flight>, <gpu-2 up 0 in flight>]>"


# A new configuration.


def test_a_node_that_stays_keeps_its_state(pool: Pool) -> None:
    one = attempt(pool, "phi")
    pool.submit(one, now=0.0)
    pool.observe(GPU_1.url, seen(*HAS["gpu-1"], resident=["phi:latest"], version="0.9"), now=4.0)
    before = pool.registry.snapshot()[0]
    renamed = spec("first", GPU_1.url, slots=8, weight=3.0)
    pool.reconfigure(topology([GPU_2], [renamed]), now=5.0)
    after = pool.registry.snapshot()[1]
    assert (after.spec, after.pool, after.leaving) == (renamed, "pool-1", False)
    assert (after.health, after.since, after.detail) == (before.health, before.since, before.detail)
    assert (after.in_flight, after.version) == (1, "0.9")
    assert (after.present, after.resident) == (before.present, before.resident)
    assert pool.registry.specs() == [GPU_2, renamed]
    pool.leave(one, DONE, now=6.0)
    assert in_flight(pool) == {"gpu-2": 0, "first": 0}


def test_signs_that_were_counted_stay_counted() -> None:
    pool = ready(topology([GPU_1], down_after=3), HAS)
    pool.observe(GPU_1.url, felt(Sign.BAD), now=1.0)
    pool.reconfigure(topology([GPU_1], down_after=2), now=2.0)
    assert pool.registry.suspect(GPU_1.url)
    [flip] = pool.observe(GPU_1.url, felt(Sign.BAD), now=3.0)
    assert flip.now is Health.DOWN


def test_a_removed_node_gets_no_lease_and_goes_with_its_last(pool: Pool) -> None:
    attempts = [attempt(pool, "phi") for _ in range(2)]
    for one in attempts:
        pool.submit(one, now=0.0)
    pool.reconfigure(topology([GPU_2]), now=1.0)
    assert [(view.spec.name, view.leaving) for view in pool.registry.snapshot()] == [
        ("gpu-2", False),
        ("gpu-1", True),
    ]
    assert refused(pool, "phi") is Refusal.NO_MODEL
    assert refused(pool, "phi@gpu-1") is Refusal.UNKNOWN_PIN
    assert not pool.observe(GPU_1.url, seen("phi:latest"), now=1.0)
    assert not pool.registry.knows("phi:latest")
    pool.leave(attempts[0], DONE, now=2.0)
    assert in_flight(pool) == {"gpu-2": 0, "gpu-1": 1}
    pool.leave(attempts[1], reset(), now=3.0)
    assert in_flight(pool) == {"gpu-2": 0}
    assert pool.in_flight == 0


def test_an_idle_node_is_removed_at_once(pool: Pool) -> None:
    pool.reconfigure(topology([GPU_2]), now=1.0)
    assert in_flight(pool) == {"gpu-2": 0}


def test_a_node_that_comes_back_while_leaving_is_the_same_node(pool: Pool) -> None:
    one = attempt(pool, "phi")
    pool.submit(one, now=0.0)
    pool.reconfigure(topology([GPU_2]), now=1.0)
    pool.reconfigure(topology([GPU_2]), now=2.0)
    pool.reconfigure(topology([GPU_1, GPU_2]), now=3.0)
    assert in_flight(pool) == {"gpu-1": 1, "gpu-2": 0}
    assert lease(pool, "phi").node == GPU_1
    pool.leave(one, DONE, now=4.0)
    assert in_flight(pool) == {"gpu-1": 1, "gpu-2": 0}


def test_a_node_that_comes_back_after_it_left_is_a_new_one(pool: Pool) -> None:
    pool.reconfigure(topology([GPU_2]), now=1.0)
    pool.reconfigure(topology([GPU_1, GPU_2]), now=2.0)
    view = pool.registry.snapshot()[0]
    assert (view.health, view.since, view.present) == (Health.UNKNOWN, 2.0, {})


def test_a_new_address_under_an_old_name_is_a_new_node(pool: Pool) -> None:
    one = attempt(pool, "phi")
    pool.submit(one, now=0.0)
    moved = spec("gpu-1", "http://elsewhere:11434")
    pool.reconfigure(topology([moved, GPU_2]), now=1.0)
    assert [(view.spec, view.leaving, view.in_flight) for view in pool.registry.snapshot()] == [
        (moved, False, 0),
        (GPU_2, False, 0),
        (GPU_1, True, 1),
    ]


def test_names_may_change_places(pool: Pool) -> None:
    lease(pool, "phi")
    swapped = [spec("gpu-2", GPU_1.url), spec("gpu-1", GPU_2.url)]
    pool.reconfigure(topology(swapped), now=1.0)
    assert in_flight(pool) == {"gpu-2": 1, "gpu-1": 0}
    assert lease(pool, "phi@gpu-2").node.url == GPU_1.url


def test_a_refusal_by_a_leaving_node_harms_nobody(pool: Pool) -> None:
    one = attempt(pool, "phi")
    pool.submit(one, now=0.0)
    pool.reconfigure(topology([GPU_2]), now=1.0)
    pool.leave(one, reset(FailureKind.REFUSED), now=2.0)
    assert in_flight(pool) == {"gpu-2": 0}
    assert pool.registry.snapshot()[0].health is Health.UP


def test_aliases_and_globs_are_those_in_force(pool: Pool) -> None:
    few = spec("gpu-1", GPU_1.url, models=("!phi*",))
    pool.reconfigure(topology([few, GPU_2], aliases={"chat": "codellama:34b"}), now=1.0)
    assert refused(pool, "phi") is Refusal.NO_MODEL
    assert refused(pool, "phi@gpu-1") is Refusal.NOT_ON_PIN
    assert lease(pool, "chat").node == GPU_2
    assert refused(pool, "there") is Refusal.NO_MODEL


# What real traffic does.


M = "m:latest"


def three(rules: Resilience = RULES, slots: int = 4) -> Pool:
    """Three equal nodes, `n0` to `n2`, that all have the model `m`."""
    specs = nodes(3, slots)
    return ready(topology(specs, rules=rules), {spec.name: [M] for spec in specs})


def fail(pool: Pool, text: str, kind: FailureKind, times: int = 1, now: float = 0.0) -> None:
    for _ in range(times):
        one = attempt(pool, text)
        assert isinstance(pool.submit(one, now), Lease)
        pool.leave(one, reset(kind), now)


def run(pool: Pool, text: str, now: float, times: int = 1) -> list[str]:
    """The names of the nodes that answered as many requests, one after the other."""
    found = []
    for _ in range(times):
        one = attempt(pool, text)
        verdict = pool.submit(one, now)
        assert isinstance(verdict, Lease)
        found.append(verdict.node.name)
        pool.leave(one, DONE, now)
    return found


def test_an_ejected_node_gets_one_trial_when_it_is_time_and_all_once_that_was_good() -> None:
    pool = three()
    fail(pool, "m@n0", FailureKind.RESET, times=3)
    assert set(run(pool, "m", now=0.9, times=9)) == {"n1", "n2"}
    leases = [lease(pool, "m", now=1.0) for _ in range(9)]
    trials = [one for one in leases if one.node.name == "n0"]
    assert len(trials) == 1
    assert [flip.now for flip in trials[0].flips] == [Ejection.TRIAL]
    [flip] = pool.leave(trials[0].attempt, DONE, now=2.0)
    assert (flip.node, flip.now) == ("n0", Ejection.CLOSED)
    assert lease(pool, "m", now=2.0).node.name == "n0"


def test_a_readmitted_node_begins_with_a_small_share() -> None:
    pool = three()
    fail(pool, "m@n0", FailureKind.RESET, times=3)
    run(pool, "m@n0", now=1.0)
    for _ in range(36):
        lease(pool, "m", now=1.0)
    assert in_flight(pool) == {"n0": 4, "n1": 16, "n2": 16}
    for _ in range(12):
        lease(pool, "m", now=31.0)
    assert in_flight(pool) == {"n0": 16, "n1": 16, "n2": 16}


def test_so_does_one_that_was_down() -> None:
    pool = three()
    pool.observe("http://n0:11434", felt(Sign.REFUSED), now=1.0)
    for _ in range(2):
        pool.observe("http://n0:11434", felt(Sign.GOOD), now=10.0)
    for _ in range(36):
        lease(pool, "m", now=10.0)
    assert in_flight(pool) == {"n0": 4, "n1": 16, "n2": 16}


def test_one_that_was_never_seen_before_does_not() -> None:
    pool = three()
    pool.reconfigure(topology(nodes(4, slots=4)), now=5.0)
    pool.observe("http://n3:11434", seen(M), now=6.0)
    for _ in range(16):
        lease(pool, "m", now=6.0)
    assert set(in_flight(pool).values()) == {4}


def test_where_all_are_ejected_all_are_tried() -> None:
    pool = three()
    for name in ("n0", "n1", "n2"):
        fail(pool, f"m@{name}", FailureKind.RESET, times=3)
    for _ in range(3):
        lease(pool, "m", now=0.1)
    assert in_flight(pool) == {"n0": 1, "n1": 1, "n2": 1}


def test_a_full_node_gets_nothing_until_a_request_of_its_ends(pool: Pool) -> None:
    first = lease(pool, "phi")
    fail(pool, "phi", FailureKind.BUSY)
    assert ask(pool, "phi", now=0.5) == Rejected(Refusal.BUSY, (GPU_1,), until=1.0)
    assert ask(pool, "phi@gpu-1", now=0.5) == Rejected(Refusal.BUSY, (GPU_1,), until=1.0)
    assert lease(pool, "llama3:8b@gpu-1", now=0.5).node == GPU_1
    pool.leave(first.attempt, DONE, now=0.6)
    assert lease(pool, "phi", now=0.6).node == GPU_1


def test_or_until_its_back_off_has_passed(pool: Pool) -> None:
    fail(pool, "phi", FailureKind.BUSY)
    assert lease(pool, "phi", now=1.0).node == GPU_1
    assert ask(pool, "phi", now=1.0) == Rejected(Refusal.BUSY, (GPU_1,), until=3.0)


def test_chance_is_what_the_pool_was_given() -> None:
    pool = ready(topology([GPU_1]), HAS, roll=lambda: 0.0)
    fail(pool, "phi", FailureKind.BUSY)
    assert ask(pool, "phi", now=0.4) == Rejected(Refusal.BUSY, (GPU_1,), until=0.5)


def test_what_a_node_answers_does_not_take_a_model_from_the_list_of_all_others(
    pool: Pool,
) -> None:
    """The next probe does, if it is so: anybody may have a name answered with 404."""
    revision = pool.registry.revision
    fail(pool, "llama3:8b@gpu-1", FailureKind.MISSING, times=9)
    assert pool.registry.revision == revision
    assert set(run(pool, "llama3:8b", 0.0, times=4)) == {"gpu-1", "gpu-2"}


def test_who_was_believed_to_have_a_model_that_it_was_asked_for(pool: Pool) -> None:
    target = pool.registry.resolve("llama3:8b")
    assert isinstance(target, Target)
    assert pool.registry.believed(GPU_1.url, target)
    pool.observe(GPU_1.url, seen("phi"), now=0.0)
    assert pool.registry.believed(GPU_1.url, target), "it was, when it was asked"
    pool.reconfigure(topology(), now=0.0)
    assert pool.registry.believed(GPU_1.url, target)
    assert not pool.registry.believed(GPU_1.url, Target())
    assert not pool.registry.believed(GPU_1.url, Target(parse("x:cloud"), None, "x:cloud"))


def test_a_request_that_all_fail_ejects_nobody() -> None:
    pool = three()
    target = pool.registry.resolve("m")
    assert isinstance(target, Target)
    for _ in range(20):
        fail(pool, "m@n0", FailureKind.ANSWERED)
        pool.forgive("http://n0:11434", target)
    for gone in ("http://gone:11434", "http://n1:11434"):
        pool.forgive(gone, target)
    pool.forgive("http://n1:11434", Target())
    assert set(run(pool, "m", 0.0, times=6)) == {"n0", "n1", "n2"}


def test_who_may_be_asked_at_all_is_no_matter_of_breakers() -> None:
    pool = three()
    fail(pool, "m@n0", FailureKind.RESET, times=3)
    fail(pool, "m@n1", FailureKind.ANSWERED, times=5)
    fail(pool, "m@n2", FailureKind.BUSY)
    assert lease(pool, "m@n0", now=9.0).flips
    target = pool.registry.resolve("m")
    assert isinstance(target, Target)
    assert pool.registry.eligible(target) == pool.registry.specs()


def test_an_alias_stands_for_its_first_model_though_a_breaker_keeps_it_away() -> None:
    pool = ready(topology([GPU_1], aliases={"any": ("llama3:8b", "phi")}), HAS)
    fail(pool, "llama3:8b", FailureKind.BUSY)
    target = pool.registry.resolve("any")
    assert isinstance(target, Target)
    assert target.sent == "llama3:8b"
    assert refused(pool, "any") is Refusal.BUSY


@pytest.mark.parametrize("kind", [FailureKind.ANSWERED, FailureKind.BUSY, FailureKind.RESET])
@pytest.mark.parametrize("at_once", [1, 50])
def test_a_node_that_fails_at_once_beside_three_good_ones_is_seen_by_no_client(
    kind: FailureKind, at_once: int
) -> None:
    """Of 10,000 requests of three seconds each, 100 a second, it gets at most one in a hundred."""
    specs = nodes(4, slots=4)
    pool = ready(topology(specs), {spec.name: [M] for spec in specs})
    target = pool.registry.resolve("m")
    assert isinstance(target, Target)
    running, failed = deque[tuple[float, Attempt]](), 0
    for now in (step / 100 for step in range(0, 10_000, at_once)):
        while running and running[0][0] <= now:
            pool.leave(running.popleft()[1], DONE, now)
        bad = []
        for trail in [Trail(target) for _ in range(at_once)]:
            one = trail.attempt()
            verdict = pool.submit(one, now)
            assert isinstance(verdict, Lease)
            if verdict.node == specs[0]:
                bad.append((trail, one))
            else:
                running.append((now + 3.0, one))
        for trail, one in bad:
            failure = Failure(kind, sent=True)
            pool.leave(one, trail.outcome(failure), now)
            assert trail.failed(specs[0], failure, RULES) is Verdict.ELSEWHERE
            again = trail.attempt()
            verdict = pool.submit(again, now)
            assert isinstance(verdict, Lease)
            assert verdict.node != specs[0]
            running.append((now + 3.0, again))
        failed += len(bad)
    assert 0 < failed <= 100


# The budget of what is tried again after an answer.


def again(pool: Pool, text: str, failed: str, now: float = 0.0) -> Lease | Queued | Rejected:
    """The second attempt of a request that this node has answered with a failure."""
    target, url = pool.registry.resolve(text), f"http://{failed}:11434"
    assert isinstance(target, Target)
    return pool.submit(Attempt(target, frozenset([url]), "", url), now)


def test_five_and_a_fifth_of_what_is_in_flight_may_be_tried_again() -> None:
    pool = three()
    verdicts = [again(pool, "m", "n0") for _ in range(9)]
    assert [isinstance(one, Lease) for one in verdicts] == [True] * 5 + [False] * 4
    assert verdicts[-1] == Rejected(Refusal.BUDGET)
    for _ in range(24):
        lease(pool, "m")
    assert isinstance(again(pool, "m", "n0"), Lease)  # 5 of 29 are such
    assert isinstance(again(pool, "m", "n0"), Rejected)  # 6 of 30
    leases = [one for one in verdicts if isinstance(one, Lease)]
    pool.leave(leases[0].attempt, DONE, now=0.0)
    assert isinstance(again(pool, "m", "n0"), Lease)
    assert isinstance(again(pool, "m", "n0", now=10.0), Lease)  # a few more, after some time


def test_a_rejected_attempt_takes_nothing_of_it() -> None:
    pool = three()
    for _ in range(9):
        again(pool, "m", "n0")
    assert pool.in_flight == 5
    assert in_flight(pool)["n0"] == 0


@pytest.mark.parametrize("kind", [FailureKind.RESET, FailureKind.ANSWERED, FailureKind.BUSY])
def test_leaving_a_node_that_gets_no_more_of_them_costs_nothing(kind: FailureKind) -> None:
    pool = three()
    fail(pool, "m@n0", kind, times=1 if kind is FailureKind.BUSY else 5)
    assert all(isinstance(again(pool, "m", "n0"), Lease) for _ in range(50))


@pytest.mark.parametrize("how", ["down", "drained", "removed", "without the model"])
def test_nor_does_leaving_one_that_is_gone(how: str) -> None:
    pool = three()
    if how == "down":
        pool.observe("http://n0:11434", felt(Sign.REFUSED), now=0.0)
    elif how == "drained":
        pool.registry.drain("n0", draining=True)
    elif how == "removed":
        pool.reconfigure(topology(nodes(3)[1:]), now=0.0)
    else:
        pool.observe("http://n0:11434", seen("other"), now=0.0)
    assert all(isinstance(again(pool, "m", "n0"), Lease) for _ in range(50))


@pytest.mark.parametrize("text", ["m", "x:cloud", None])
def test_whatever_is_asked_for_counts(text: str | None) -> None:
    pool = three()
    target = Target() if text is None else pool.registry.resolve(text)
    assert isinstance(target, Target)
    url = "http://n0:11434"
    attempts = [Attempt(target, frozenset([url]), "", url) for _ in range(9)]
    assert sum(isinstance(pool.submit(one, 0.0), Lease) for one in attempts) == 5


def test_others_go_before_those_that_have_failed_a_request_before() -> None:
    pool = three()
    target = pool.registry.resolve("m")
    assert isinstance(target, Target)
    met = {"http://n0:11434", "http://n1:11434"}
    for _ in range(4):
        verdict = pool.submit(Attempt(target, met=met), 0.0)
        assert isinstance(verdict, Lease)
        assert verdict.node.name == "n2"
    pool.registry.drain("n2", draining=True)
    assert isinstance(pool.submit(Attempt(target, met=met), 0.0), Lease)
    assert isinstance(pool.submit(Attempt(target, tried=met, met=met), 0.0), Rejected)


def test_moving_off_a_broken_connection_costs_nothing() -> None:
    pool = three()
    for _ in range(50):
        lease(pool, "m", tried=["http://n0:11434"])


# The very same model.


def digests(*words: str) -> Pool:
    """Nodes from words such as `one=x`: which model `m` is there; a `/` begins the next pool."""
    pools: list[list[NodeSpec]] = [[]]
    has = {}
    for word in words:
        if word == "/":
            pools.append([])
            continue
        name, _, digest = word.partition("=")
        pools[-1].append(spec(name))
        has[name] = digest
    pool = Pool(topology(*pools), 0.0)
    for one in pool.registry.specs():
        present = {M: Model(M, has[one.name], {})} if has[one.name] else {}
        pool.observe(one.url, Observation(Sign.GOOD, present=present), 0.0)
    return pool


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ("one=x two=y three=x", "three"),
        ("one=x two=y three=y", None),
        ("one=x two=", None),
        ("one=x two=y / three=x", "three"),
        ("one=x / two=y / three=x", "three"),
        ("one=x / two=x / three=x", "two"),
    ],
)
def test_what_goes_on_needs_a_node_with_the_same_digest(words: str, chosen: str | None) -> None:
    pool = digests(*words.split())
    target = pool.registry.resolve("m")
    assert isinstance(target, Target)
    digest = pool.registry.digest("http://one:11434", target)
    assert digest == "x"
    verdict = pool.submit(Attempt(target, frozenset(["http://one:11434"]), digest), 0.0)
    assert (verdict.node.name if isinstance(verdict, Lease) else None) == chosen
    assert pool.in_flight == (chosen is not None)


@pytest.mark.parametrize(
    ("url", "text", "digest"),
    [
        ("http://one:11434", "m", "x"),
        ("http://one:11434", "other", ""),
        ("http://gone:11434", "m", ""),
        ("http://one:11434", None, ""),
    ],
)
def test_digest(url: str, text: str | None, digest: str) -> None:
    pool = digests("one=x")
    target = Target() if text is None else pool.registry.resolve(text)
    assert isinstance(target, Target)
    assert pool.registry.digest(url, target) == digest


# Drain.


def test_a_drained_node_gets_nothing_new_and_finishes_what_it_has(pool: Pool) -> None:
    held = lease(pool, "phi")
    revision = pool.registry.revision
    assert pool.registry.drain("gpu-1", draining=True) == GPU_1
    assert pool.registry.revision > revision
    assert ask(pool, "phi") == Rejected(Refusal.DRAINED, (GPU_1,))
    assert ask(pool, "phi@gpu-1") == Rejected(Refusal.DRAINED, (GPU_1,))
    assert set(run(pool, "llama3:8b", 0.0, times=4)) == {"gpu-2"}
    assert [(view.draining, view.up, view.in_flight) for view in pool.registry.snapshot()] == [
        (True, True, 1),
        (False, True, 0),
    ]
    pool.leave(held.attempt, DONE, now=1.0)
    assert in_flight(pool)["gpu-1"] == 0
    assert pool.registry.drain("gpu-1", draining=False) == GPU_1
    assert lease(pool, "phi").node == GPU_1


def test_draining_twice_is_draining_once(pool: Pool) -> None:
    pool.registry.drain("gpu-1", draining=True)
    revision = pool.registry.revision
    assert pool.registry.drain("http://gpu-1:11434", draining=True) == GPU_1
    assert pool.registry.revision == revision
    assert pool.registry.drained == [GPU_1.url]


@pytest.mark.parametrize("sign", Sign)
def test_no_probe_ends_a_drain(pool: Pool, sign: Sign) -> None:
    pool.registry.drain("gpu-1", draining=True)
    for _ in range(5):
        pool.observe(GPU_1.url, felt(sign), now=1.0)
    assert not isinstance(ask(pool, "phi"), Lease)
    assert pool.registry.drained == [GPU_1.url]


def test_only_one_node_that_there_is_can_be_drained(pool: Pool) -> None:
    unknown = Rejected(Refusal.UNKNOWN_PIN, (GPU_1, GPU_2))
    assert pool.registry.drain("gpu-9", draining=True) == unknown
    assert pool.registry.drain("pool-0", draining=True) == Rejected(Refusal.AMBIGUOUS_PIN)
    assert pool.registry.drained == []


def test_a_new_configuration_keeps_who_is_drained_and_who_is_ejected() -> None:
    pool = three()
    pool.registry.drain("n0", draining=True)
    fail(pool, "m@n1", FailureKind.RESET, times=3)
    renamed = [spec("new", "http://n0:11434"), spec("n1", slots=9), spec("n2")]
    pool.reconfigure(topology(renamed), now=0.5)
    assert pool.registry.drained == ["http://n0:11434"]
    assert [bool(view.ejected) for view in pool.registry.snapshot()] == [False, True, False]
    assert set(run(pool, "m", now=0.9, times=9)) == {"n2"}
    pool.reconfigure(topology(renamed, rules=replace(RULES, panic_share=0.9)), now=0.9)
    assert set(run(pool, "m", now=0.9, times=9)) == {"n1", "n2"}


def test_a_node_that_is_down_and_drained_comes_back_drained(pool: Pool) -> None:
    pool.registry.drain("gpu-1", draining=True)
    pool.observe(GPU_1.url, felt(Sign.REFUSED), now=1.0)
    assert refused(pool, "phi") is Refusal.NODES_DOWN
    for _ in range(2):
        pool.observe(GPU_1.url, felt(Sign.GOOD), now=2.0)
    assert refused(pool, "phi") is Refusal.DRAINED


def test_another_process_may_take_over_who_is_drained() -> None:
    pool, other = three(), three()
    pool.registry.drain("n0", draining=True)
    pool.registry.drain("n2", draining=True)
    revision = other.registry.revision
    other.registry.keep_drained(["http://gone:11434", *pool.registry.drained])
    assert other.registry.drained == ["http://n0:11434", "http://n2:11434"]
    assert other.registry.revision > revision
    assert set(run(other, "m", 0.0, times=4)) == {"n1"}


# How long an answer may take to begin.


WAITS = Waits(first_byte_s=600.0, first_byte_min_s=60.0, between_s=600.0, silent_down_s=60.0)
TOLD = Usage(prompt_tokens=1000, completion_tokens=100, load_s=20.0, eval_s=10.0, prompt_s=5.0)


def test_what_is_told_of_a_model_on_a_node_holds_there_and_nowhere_else() -> None:
    pool = three()
    for name in ("n0", "n1"):
        run(pool, f"m@{name}", 0.0)
    for _ in range(3):
        pool.learn("http://n0:11434", M, TOLD)
        pool.learn("http://n0:11434", "other:latest", TOLD)
        pool.learn("http://gone:11434", M, TOLD)
    first, second = lease(pool, "m@n0"), lease(pool, "m@n1")
    assert pool.first_byte_s(first, WAITS, 400, streams=True) == 3 * (20 + 100 * 0.005)
    assert pool.first_byte_s(second, WAITS, 400, streams=True) == 600.0


def test_what_is_ahead_on_the_same_model_counts_and_a_body_has_only_so_many_tokens() -> None:
    pool = three()
    leases = [lease(pool, "m@n0") for _ in range(3)]
    for _ in range(3):
        pool.learn("http://n0:11434", M, TOLD)
    assert pool.first_byte_s(leases[2], WAITS, 0, streams=True) == 3 * (20 + 2 * 15)
    huge = pool.first_byte_s(leases[2], WAITS, 1 << 40, streams=True)
    assert huge == pytest.approx(3 * (20 + 2 * 15 + 262_144 * 0.005))


def test_an_answer_that_was_given_up_too_soon_gets_longer_the_next_time() -> None:
    pool = three()
    run(pool, "m@n0", 0.0)
    pool.observe("http://n0:11434", seen(M, resident=[M]), 0.0)
    for _ in range(3):
        pool.learn("http://n0:11434", M, Usage(1000, 100, eval_s=10.0, prompt_s=5.0))
    limits = []
    for _ in range(3):
        held = lease(pool, "m@n0")
        limits.append(pool.first_byte_s(held, WAITS, 0, streams=True))
        pool.leave(held.attempt, reset(FailureKind.FIRST_BYTE_TIMEOUT), 0.0)
    assert limits == [60, 120, 240]
