"""What nodes may have in memory since anybody looked, and what has to go for something else."""

from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.memory import Loaded, Loads, Memory, Run
from router.core.policy import Target
from router.core.pool import Pool
from router.core.types import Model, NodeSpec, Outcome, Scope
from router.core.work import Work
from router.sim.models import SimModel, SimSpec
from router.sim.node import Scheduler
from router.sim.runner import EventKind, Job, Resident
from tests.core.build import attempt, lease, ready, seen, spec, topology

M = "llama3:8b"
HAS = {"a": [M], "b": [M], "c": []}


def pool_of_three(down: Iterable[str] = ()) -> Pool:
    return ready(topology([spec("a"), spec("b"), spec("c")]), HAS, down)


def names(specs: Iterable[NodeSpec]) -> list[str]:
    return [one.name for one in specs]


def holding(pool: Pool, text: str = M) -> list[str]:
    target = pool.registry.resolve(text)
    assert isinstance(target, Target)
    return names(pool.registry.holding(target))


def unseen(pool: Pool, scope: Scope | None = None) -> list[str]:
    return names(node for node, _ in pool.registry.unseen(scope))


def looked(pool: Pool) -> None:
    for node, used in pool.registry.unseen(None):
        pool.registry.saw(node.url, used)


def test_a_node_is_unseen_from_the_beginning_of_a_request_and_again_from_its_end() -> None:
    pool = pool_of_three()
    assert unseen(pool) == []
    wanted = attempt(pool, f"{M}@a")
    pool.submit(wanted, now=0.0)
    assert unseen(pool) == ["a"]
    looked(pool)
    assert unseen(pool) == []
    pool.leave(wanted, Outcome(), 1.0)
    assert unseen(pool) == ["a"]
    assert unseen(pool, Scope("b", frozenset(["http://b:11434"]))) == []
    looked(pool)
    pool.registry.saw("http://gone:1", 5)
    assert unseen(pool) == []


def test_what_happens_during_a_look_is_not_seen_by_it() -> None:
    pool = pool_of_three()
    pool.submit(attempt(pool, f"{M}@a"), now=0.0)
    ((node, used),) = pool.registry.unseen(None)
    pool.submit(attempt(pool, f"{M}@a"), now=0.0)
    pool.registry.saw(node.url, used)
    assert unseen(pool) == ["a"]


def test_the_model_may_be_where_it_was_listed_and_where_it_was_used_since() -> None:
    pool = pool_of_three()
    assert holding(pool) == []
    pool.observe("http://b:11434", seen(M, resident=[M]), 1.0)
    assert holding(pool) == ["b"]
    assert unseen(pool) == ["b"], "asking is to free it"
    pool.submit(attempt(pool, f"{M}@a"), now=0.0)
    assert holding(pool) == ["a", "b"]
    assert holding(pool, f"{M}@b") == ["b"]
    assert holding(pool, f"{M}@nowhere") == []


def test_a_node_that_is_down_holds_nothing() -> None:
    pool = pool_of_three(down=["b"])
    pool.observe("http://b:11434", seen(M, sign=None, resident=[M]), 1.0)
    assert holding(pool) == []
    assert names(pool.registry.holding(Target())) == []
    assert lease(pool, M).node.name == "a"


# The memory of one node: what is there, and what has to go for something else.

GB = 10**9
WALL = 1_760_000_000.0  # at second 0


def listed(what: str, now: float = 0.0, **entry: object) -> dict[str, Model]:
    """An answer of `/api/ps`: a letter for each model, its size in GB behind it."""
    left = {"expires_at": datetime.fromtimestamp(WALL + now + 300, UTC).isoformat()}
    return {
        one[0]: Model(one[0], "", {"size_vram": int(one[1:]) * GB, **left, **entry})
        for one in what.split()
    }


def told(limit_gb: int | None, what: str) -> Memory:
    """A node that has these loaded; `*` is busy, `~` on its way."""
    memory = Memory([] if limit_gb is None else [limit_gb * GB])
    memory.see(listed(what.replace("*", "").replace("~", "")), 0.0, WALL)
    for one in what.split():
        if one[-1] in "*~":
            memory.loaded[one[0]].runs[one] = Run(0.0, 0.0, 10.0)
        if one[-1] == "~":
            memory.loaded[one[0]].ready = 60.0
    return memory


def keys(found: Collection[Loaded] | None) -> str | None:
    return None if found is None else "".join(one.key for one in found)


def goes(memory: Memory, need_gb: float, key: str = "new", *, busy: bool = False) -> str | None:
    return keys(memory.victims(key, need_gb * GB, busy=busy))


@pytest.mark.parametrize(
    ("loaded", "need_gb", "first", "in_the_end"),
    [
        ("", 5, "", ""),
        ("", 99, "", ""),  # too large for the node: partly in main memory
        ("a5 b5", 14, "", ""),
        ("a5 b5", 15, "a", "a"),
        ("b5 a5", 15, "a", "a"),
        ("a5 b5 c5", 19, "ab", "ab"),
        ("a5 b5 c5", 99, "abc", "abc"),
        # what works does not go, and what is behind it has to wait
        ("a5* b5", 19, "b", "b"),
        ("a5* b5", 20, None, "ba"),
        ("a5* b5*", 14, "", ""),
        ("a5* b5*", 15, None, "a"),
        # what is being loaded neither, however long one waits
        ("a5~ b5", 19, "b", "b"),
        ("a5~ b5", 20, None, None),
        # its own room is free
        ("n20 a4", 20, "", ""),
        ("n20 a4", 21, "a", "a"),
    ],
)
def test_idle_models_go_until_there_is_room_and_no_more(
    loaded: str, need_gb: float, first: str | None, in_the_end: str | None
) -> None:
    memory = told(24, loaded)
    assert goes(memory, need_gb, "n") == first
    assert goes(memory, need_gb, "n", busy=True) == in_the_end


def test_the_one_that_is_kept_for_the_shortest_time_goes_first() -> None:
    memory = told(24, "a5 b5 c5")
    for key, keep_alive_s in (("a", 300.0), ("b", 60.0), ("c", 300.0)):
        memory.loaded[key].keep_alive_s = keep_alive_s
    assert goes(memory, 99) == "bac"


FLEETS = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 4), st.booleans()), max_size=8
)  # size in GB, keep_alive in minutes, busy


def slow(name: str, gb: int) -> SimModel:
    """It is loaded at once, and answers for long."""
    return SimModel(name, gb * GB, load_s=0.0, decode_tps=1.0)


def both(fleet: list[tuple[int, int, bool]], free_gb: int) -> tuple[Scheduler, Memory]:
    """A node with these models loaded, and what is known of its memory."""
    models = [slow(f"m{i}", gb) for i, (gb, _, _) in enumerate(fleet)]
    used = sum(SimSpec().reserved_bytes(model, 4096) for model in models)
    most = max(3, len(fleet))
    node = Scheduler(SimSpec(tuple(models), max_loaded=most, memory_bytes=used + free_gb * GB))
    for model, (_, minutes, _) in zip(models, fleet, strict=True):
        node.submit(Job(model, keep_alive_s=60.0 * minutes, load_only=True), 0.0)
        node.advance(0.0)
    memory = Memory([node.spec.memory_bytes])
    memory.see(as_listed(node.resident(0.0)), 0.0, WALL)
    for model, (_, _, busy) in zip(models, fleet, strict=True):
        if busy:
            node.submit(Job(model, answer_tokens=10**6), 0.0)
            memory.loaded[model.name].runs[model] = Run(0.0, 0.0, 10.0)
    node.advance(0.0)
    return node, memory


@given(FLEETS, st.integers(0, 20), st.integers(1, 60))
def test_what_goes_is_what_a_node_unloads(
    fleet: list[tuple[int, int, bool]], free_gb: int, need_gb: int
) -> None:
    node, memory = both(fleet, free_gb)
    new = slow("new", need_gb)
    node.submit(Job(new), 0.0)
    gone = [one.model.name for one in node.advance(0.0) if one.kind is EventKind.UNLOADED]
    need = node.spec.reserved_bytes(new, 4096)
    found = memory.victims(new.name, need)
    assert node.pending == (found is None), "it waits where something busy has to go"
    if found is None:
        found = [one for one in memory.victims(new.name, need, busy=True) or () if not one.runs]
    assert [one.key for one in found] == gone


def as_listed(resident: Iterable[Resident]) -> dict[str, Model]:
    return {
        one.model.name: Model(one.model.name, "", {
            "size_vram": one.reserved_bytes,
            "expires_at": datetime.fromtimestamp(WALL + one.expires_at, UTC).isoformat(),
        })
        for one in resident
    }  # fmt: skip


# What `/api/ps` tells


@pytest.mark.parametrize(
    ("entry", "size_gb"),
    [
        ({"size_vram": 4 * GB, "size": 9 * GB}, 4),
        ({"size_vram": 0, "size": 9 * GB}, 9),
        ({"size": 9 * GB}, 9),
        ({}, 5),
        ({"size_vram": "4", "size": -1}, 5),
        ({"size": 10**400}, 5),
        ({"size": inf}, 5),
        ({"size": nan}, 5),
    ],
)
def test_a_model_takes_as_much_as_the_node_says(entry: dict[str, object], size_gb: float) -> None:
    memory = Memory([])
    memory.see({"a": Model("a", "", entry)}, 0.0, WALL)
    assert memory.used_bytes == size_gb * GB
    assert memory.need_bytes("a", 99 * GB) == size_gb * GB


def test_before_it_was_seen_it_is_thought_to_take_a_little_more_than_on_disk() -> None:
    memory = Memory([])
    assert [memory.need_bytes("a", disk) for disk in (10.0 * GB, 0.0)] == [12 * GB, 6 * GB]


def test_a_size_that_is_no_longer_told_is_the_last_one_that_was() -> None:
    memory = told(None, "a7")
    memory.see({"a": Model("a", "", {})}, 5.0, WALL + 5)
    assert memory.used_bytes == 7 * GB
    memory.see({}, 10.0, WALL + 10)
    assert (memory.used_bytes, memory.need_bytes("a", 0.0)) == (0, 7 * GB)


@given(
    st.dictionaries(
        st.sampled_from(["size", "size_vram", "context_length", "expires_at"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.none())
        | st.datetimes().map(str) | st.datetimes(timezones=st.timezones()).map(str),
    ),
    st.floats(0, 1e10),
)  # fmt: skip
def test_whatever_a_node_tells_is_a_size_and_a_time(entry: dict[str, object], wall: float) -> None:
    memory = Memory([])
    memory.see({"a": Model("a", "", entry)}, 5.0, wall)
    one = memory.loaded["a"]
    assert 0 < one.size_bytes < inf
    assert 0 <= one.keep_alive_s < inf
    assert one.num_ctx is None or one.num_ctx > 0


@pytest.mark.parametrize(
    ("left_s", "wall", "keep_alive_s"),
    [
        (60.0, WALL + 100, 160.0),  # it has been idle for 100 s
        (61.0, WALL + 100, 160.0),
        (0.0, WALL + 100, 300.0),  # it is just being unloaded
        (-5.0, WALL + 100, 300.0),
        (60.0, 0.0, 300.0),  # nobody knows what time it is there
    ],
)
def test_how_long_it_is_kept_is_told_by_when_it_is_to_go(
    left_s: float, wall: float, keep_alive_s: float
) -> None:
    memory = told(None, "a5")
    at = datetime.fromtimestamp(WALL + 100 + left_s, UTC).isoformat()
    memory.see(listed("a5", expires_at=at), 100.0, wall)
    assert memory.loaded["a"].keep_alive_s == keep_alive_s


def test_what_works_does_not_tell_how_long_it_is_kept() -> None:
    memory = told(None, "a5*")
    memory.see(listed("a5", now=100.0), 100.0, WALL + 100)
    assert memory.loaded["a"].keep_alive_s == 300.0


# The context


@pytest.mark.parametrize(
    ("asked", "has", "wanted", "differs"),
    [
        (None, None, 8192, False),  # nobody knows
        (None, 4096, None, False),
        (None, 4096, 4096, False),
        (None, 4096, 8192, True),
        (8192, None, 8192, False),
        (8192, None, 4096, True),
        (8192, None, None, True),  # it gets the node's default, whatever that is
        (8192, 8192, None, True),
        # the model was not trained for more, and is not loaded anew for those that ask for more
        (99999, 4096, 99999, False),
        (99999, 4096, 4096, False),
        (99999, 4096, 8192, False),
        (99999, 4096, 2048, True),
    ],
)
def test_a_request_for_another_context_has_a_model_loaded_anew(
    asked: int | None, has: int | None, wanted: int | None, *, differs: bool
) -> None:
    memory = Memory([])
    one = memory.load("a", "a", GB, asked, ready=2.0, now=0.0)
    memory.ready(one, 2.0)
    if has is not None:
        memory.see(listed("a1", context_length=has), 5.0, WALL + 5)
    assert one.differs(Work(num_ctx=wanted)) is differs


@pytest.mark.parametrize(
    ("default", "asked", "has", "wanted", "as_sent", "at_least"),
    [
        # who asks for less, or for nothing, is given what is there
        (None, 8192, 8192, 8192, False, False),
        (None, 8192, 8192, 4096, True, False),
        (None, 8192, 8192, 16384, True, True),
        (None, 8192, 8192, None, True, False),
        (None, 8192, None, 4096, True, False),
        (None, 8192, None, 16384, True, True),
        (None, None, 8192, None, False, False),
        (None, None, 8192, 4096, True, False),
        # nobody knows what is there: to raise is not possible yet
        (None, None, None, None, False, False),
        (None, None, None, 4096, False, True),
        # who asks for nothing asks for the default
        (4096, 8192, 8192, None, True, False),
        (4096, 2048, 2048, None, True, True),
        (4096, 4096, 4096, None, False, False),
        (4096, None, 2048, None, True, True),
        (4096, None, None, None, False, False),
        (4096, None, None, 4096, False, False),
        (4096, None, None, 2048, True, False),
        (4096, None, None, 8192, True, True),
        (99999, 99999, 4096, None, False, False),
        # more than the model was trained for
        (None, 99999, 4096, 8192, False, False),
        (None, 99999, 4096, 2048, True, False),
    ],
)
def test_only_a_larger_context_has_a_model_loaded_anew_where_smaller_ones_are_raised(
    default: int | None, asked: int | None, has: int | None, wanted: int | None,
    *, as_sent: bool, at_least: bool,
) -> None:  # fmt: skip
    one = Loaded("a", "a", GB, 0.0, 0.0, asked, has, default)
    assert one.differs(Work(num_ctx=wanted)) is as_sent
    assert one.differs(Work(num_ctx=wanted, at_least=True)) is at_least


def loads(
    memory: Memory, num_ctx: int | None, told: int, now: float, *, at_least: bool = False
) -> Loaded:
    """A request loads `a`, its answer begins, and the node is looked at."""
    one = memory.load("a", "a", GB, num_ctx, ready=now + 2, now=now)
    memory.began(one, Work(num_ctx=num_ctx, at_least=at_least), now + 2)
    memory.see(listed("a1", now, context_length=told), now + 3, WALL + now + 3)
    return one


def test_the_default_is_what_a_request_got_that_asked_for_none() -> None:
    memory = Memory([])
    assert loads(memory, 8192, 8192, 0.0).default is None
    assert loads(memory, None, 4096, 10.0).default == 4096
    assert loads(memory, 8192, 8192, 20.0).default == 4096
    assert loads(memory, None, 2048, 30.0).default == 2048, "it was made anew"
    memory.loaded["a"].runs.clear()
    memory.forget()
    assert loads(memory, 8192, 8192, 40.0).default is None


def test_what_was_raised_tells_no_default() -> None:
    memory = Memory([])
    one = loads(memory, 8192, 8192, 0.0)
    memory.began(one, Work(at_least=True), 5.0)
    memory.see(listed("a1", 5.0, context_length=8192), 6.0, WALL + 6)
    assert one.default is None
    assert loads(memory, None, 4096, 10.0, at_least=True).default == 4096
    memory.see(listed("a1", 20.0, context_length=2048), 21.0, WALL + 21)
    assert memory.loaded["a"].default == 4096, "others have asked for that"


def test_one_that_is_found_loaded_has_the_default_that_is_known() -> None:
    memory = Memory([])
    loads(memory, None, 4096, 0.0)
    memory.see({}, 10.0, WALL + 10)
    memory.see(listed("a1", 20.0, context_length=8192), 20.0, WALL + 20)
    assert memory.loaded["a"].differs(Work())


def test_loads_are_counted_by_their_cause() -> None:
    memory = Memory([])
    loads(memory, None, 4096, 0.0)
    assert memory.loads == Loads(absent=1)
    loads(memory, 8192, 8192, 10.0)
    assert memory.loads == Loads(absent=1, reloads=1)
    memory.see(listed("a1", 20.0, context_length=8192), 20.0, WALL + 20)
    assert memory.loads.external == 0
    memory.see(listed("a1", 30.0, context_length=2048), 30.0, WALL + 30)
    assert memory.loads == Loads(absent=1, reloads=1, external=1)


def test_what_others_load_anew_between_two_looks_is_seen_when_it_is_back() -> None:
    for back, external in ((4096, 0), (8192, 1)):
        memory = Memory([])
        loads(memory, None, 4096, 0.0)
        memory.see({}, 10.0, WALL + 10)
        memory.see(listed("a1", 15.0, context_length=back), 15.0, WALL + 15)
        assert memory.loads == Loads(absent=1, external=external)


def test_a_reload_that_is_listed_late_is_no_others() -> None:
    memory = Memory([])
    loads(memory, None, 2048, 0.0)
    memory.load("a", "a", GB, 4096, ready=12.0, now=10.0)
    for now, ctx in ((15.0, 2048), (20.0, 4096)):
        memory.see(listed("a1", now, context_length=ctx), now, WALL + now)
    assert memory.loads == Loads(absent=1, reloads=1)


def evicted(memory: Memory, *answers: tuple[float, str]) -> int:
    for now, answer in answers:
        memory.see(listed(answer, now), now, WALL + now)
    return memory.loads.evicted


def test_what_makes_room_for_others_is_counted_once_it_has() -> None:
    memory = told(20, "a10 b10")
    new = memory.load("n", "n", 10 * GB, None, ready=12.0, now=10.0)
    assert evicted(memory, (11.0, "a10 b10")) == 0, "it is still there"
    assert evicted(memory, (11.5, "b10")) == 1
    memory.ready(new, 12.0)
    assert evicted(memory, (13.0, "b10 n10"), (30.0, "b10 n10")) == 1


def test_what_is_listed_and_used_while_it_makes_room_is_at_work_until_it_ends() -> None:
    memory = told(20, "a10 b10")
    memory.load("n", "n", 10 * GB, None, ready=12.0, now=10.0)
    assert evicted(memory, (11.0, "a10 b10")) == 0
    memory.loaded["a"].runs["one"] = Run(11.0, 0.0, 1.0)
    assert evicted(memory, (11.5, "b10")) == 1
    assert "a" in memory.loaded


def test_what_was_thought_to_make_room_and_stays_is_not_counted() -> None:
    memory = told(20, "a10 b10")
    memory.ready(memory.load("n", "n", 10 * GB, None, ready=12.0, now=10.0), 12.0)
    assert evicted(memory, (13.0, "a10 b10 n10"), (400.0, "b10 n10")) == 0


def test_what_is_loaded_again_before_anybody_looks_had_made_room() -> None:
    memory = told(10, "a10")
    for key, now in (("n", 10.0), ("a", 20.0)):
        memory.ready(memory.load(key, key, 10 * GB, None, ready=now + 1, now=now), now + 1)
    assert (memory.loads.evicted, memory.loads.absent) == (1, 2)
    assert evicted(memory, (30.0, "a10")) == 2


def test_what_others_drove_out_is_counted_but_not_what_has_had_its_time_or_was_unloaded() -> None:
    assert evicted(told(None, "a10"), (10.0, "a10"), (20.0, "b10")) == 1
    assert evicted(told(None, "a10"), (10.0, "a10"), (400.0, "b10")) == 0
    assert evicted(told(None, "a10"), (10.0, "a10"), (20.0, "")) == 0


def test_what_others_have_had_loaded_anew_has_their_context() -> None:
    memory = Memory([])
    memory.ready(memory.load("a", "a", GB, 8192, ready=2.0, now=0.0), 2.0)
    one = memory.loaded["a"]
    for ctx in (8192, 8192, 4096):
        memory.see(listed("a1", context_length=ctx), 5.0, WALL + 5)
    assert [one.differs(Work(num_ctx=ctx)) for ctx in (8192, 4096)] == [True, False]


def test_until_it_is_loaded_anew_it_is_listed_with_its_old_context() -> None:
    memory = Memory([])
    one = memory.load("a", "a", GB, 99999, ready=20.0, now=0.0)
    memory.see(listed("a1", context_length=2048), 5.0, WALL + 5)
    memory.see(listed("a1", context_length=4096), 25.0, WALL + 25)
    assert not one.differs(Work(num_ctx=99999))


# How much room there is, where nobody says


def test_there_is_room_for_everything_until_something_was_driven_out() -> None:
    assert goes(told(None, "a20 b30"), 500) == ""


def after(
    *answers: str, every_s: float = 10.0, limit_gb: int | None = None, used: str = ""
) -> Memory:
    """A node that has told these, one after the other; `used` were used at each time."""
    memory = told(limit_gb, answers[0])
    for i, answer in enumerate(answers[1:], 1):
        now = i * every_s
        for key in used:
            memory.loaded[key].used = now
        memory.see(listed(answer, now), now, WALL + now)
    return memory


def test_what_was_driven_out_had_no_room_beside_what_came() -> None:
    memory = after("a10", "a10", "b10")
    assert goes(memory, 10, "a") == "b"
    assert goes(memory, 9) == ""


def test_each_of_those_that_were_driven_out_would_have_been_too_much() -> None:
    """The one that goes first was not enough."""
    memory = after("a10 b20", "a10 b20", "c10")
    assert [goes(memory, need_gb) for need_gb in (19, 20)] == ["", "c"]


def test_what_is_seen_together_has_room_whatever_was_thought() -> None:
    memory = after("a10", "b10", "a10 b10")
    assert goes(memory, 10, "a") == ""
    assert goes(memory, 1) == "a"


@pytest.mark.parametrize(
    ("answers", "every_s", "used"),
    [
        (["a10", "a10", "b10"], 301.0, ""),  # it was its time
        (["a10", "a10 b10", "b10"], 10.0, "a"),  # what came was there before it was last used
        (["a10 b10", "b10"], 10.0, ""),  # nothing came: somebody has unloaded it
        (["a10 b10", "", "c1"], 10.0, ""),  # all is gone: the node was started anew
        (["a10", "a10 b10", "", "c1"], 10.0, ""),
    ],
)
def test_what_goes_by_itself_tells_nothing(answers: list[str], every_s: float, used: str) -> None:
    assert goes(after(*answers, every_s=every_s, used=used), 500) == ""


def test_the_room_that_is_configured_is_not_learned() -> None:
    memory = after("a20", "b20", limit_gb=24)
    assert [goes(memory, need_gb) for need_gb in (4, 5)] == ["", "b"]
    assert goes(after("a10", "a10 b10 c10", limit_gb=24, used="a"), 1) == "a"


def test_a_node_keeps_as_many_models_as_three_for_each_gpu() -> None:
    assert [goes(told(99, what), 1) for what in ("a1 b1", "a1 b1 c1")] == ["", "a"]
    memory = Memory([99 * GB, 99 * GB])
    memory.see(listed("a1 b1 c1 d1 e1 f1"), 0.0, WALL)
    assert goes(memory, 1) == "a"
    del memory.loaded["a"]
    assert goes(memory, 1) == ""


def test_if_more_are_seen_it_keeps_more() -> None:
    memory = after("a1 b1 c1 d1 e1", "a1 b1 c1", limit_gb=99)
    assert goes(memory, 1) == ""


def test_if_one_goes_for_another_where_there_is_room_it_keeps_fewer() -> None:
    memory = after("a1 b1", "b1 c1", limit_gb=99)
    assert len(goes(memory, 1) or "") == 1
    memory.configure([50 * GB])
    assert len(goes(memory, 1) or "") == 1
    memory.configure([50 * GB, 50 * GB])
    assert goes(memory, 1) == ""


# A load that waits for room


def loading(others: str) -> Memory:
    """A node with these, told to load another one at 10 s, which is to take 6 s."""
    memory = told(99, others)
    memory.load("n", "n", 5.0 * GB, None, 16.0, 10.0).runs["r"] = Run(10.0, 6.0, 1.0)
    return memory


def test_a_load_that_takes_too_long_waits_for_what_is_busy_to_end() -> None:
    memory = loading("a5* b5*")
    memory.see(listed("a5 b5", 27.0), 27.0, WALL + 27)
    assert (memory.wanted, set(memory.leaving)) == ("", set())
    memory.see(listed("a5 b5", 27.1), 27.1, WALL + 27.1)
    assert (memory.wanted, set(memory.leaving)) == ("n", {"a", "b"})
    memory.release()
    assert memory.wanted == "n", "its request waits on the node"
    memory.see(listed("b5 n5", 33.0), 33.0, WALL + 33)
    assert (memory.wanted, set(memory.leaving), memory.loading) == ("", set(), None)


def test_if_it_fails_all_goes_on() -> None:
    memory = loading("a5*")
    memory.see(listed("a5", 40.0), 40.0, WALL + 40)
    memory.end(memory.loaded["n"], "r", 41.0, good=False)
    assert (memory.wanted, set(memory.leaving), memory.loading) == ("", set(), None)


@pytest.mark.parametrize("others", ["", "a5", "a5* b5"])
def test_where_something_is_idle_it_is_just_slow(others: str) -> None:
    memory = loading(others)
    memory.see(listed(others.replace("*", ""), 99.0), 99.0, WALL + 99)
    assert memory.wanted == ""


def test_room_that_is_made_for_something_else_stays_so() -> None:
    memory = loading("a5* b5*")
    memory.reserve("c", [memory.loaded["a"]])
    memory.see(listed("a5 b5", 99.0), 99.0, WALL + 99)
    assert (memory.wanted, set(memory.leaving)) == ("c", {"a"})


def test_a_new_configuration_holds_at_once_and_none_leaves_what_is_known() -> None:
    memory = told(None, "a10")
    assert memory.gpus == 1
    memory.configure([8 * GB, 8 * GB])
    assert (memory.gpus, goes(memory, 7)) == (2, "a")
    memory.configure([])
    assert (memory.gpus, goes(memory, 7)) == (1, "a")
    memory.see(listed("a10 b10"), 5.0, WALL + 5)
    assert goes(memory, 10, "b") == ""


ROUNDS = st.lists(st.sets(st.sampled_from("abcdef")), min_size=1, max_size=20)


@given(ROUNDS, st.lists(st.integers(1, 30), min_size=6, max_size=6))
def test_what_was_seen_together_last_always_fits(rounds: list[set[str]], gb: list[int]) -> None:
    memory, size = Memory([]), dict(zip("abcdef", gb, strict=True))
    for i, there in enumerate(rounds):
        now = i * 10.0
        memory.see(listed(" ".join(f"{key}{size[key]}" for key in sorted(there)), now), now, WALL)
        assert set(memory.loaded) == there
        assert all(goes(memory, size[key], key) == "" for key in there)


# From the beginning of a load to its end


def test_a_load_takes_the_place_of_what_it_drives_out() -> None:
    memory = told(24, "a10 b10")
    one = memory.load("c", "c", 10.0 * GB, 4096, ready=9.0, now=1.0)
    assert repr(memory) == "<Memory ['b', 'c']>"
    assert memory.loading is memory.loaded["c"] is one
    memory.ready(one, 7.0)
    assert memory.loading is None
    assert (one.ready, one.since) == (None, 7.0)
    memory.ready(one, 8.0)
    assert one.since == 7.0


def test_a_load_that_would_have_to_wait_drives_nothing_out_yet() -> None:
    memory = told(24, "a20*")
    memory.load("b", "b", 10.0 * GB, None, ready=9.0, now=1.0)
    assert set(memory.loaded) == {"a", "b"}


def test_a_model_is_listed_before_it_is_loaded_and_ready_when_it_was_to_be() -> None:
    memory = Memory([])
    one = memory.load("a", "a", GB, None, ready=20.0, now=0.0)
    loading = []
    for now in (5.0, 19.0, 20.0):
        memory.see(listed("a1", now), now, WALL + now)
        loading.append(memory.loading is one)
    assert loading == [True, True, False]


def test_one_load_does_not_end_another() -> None:
    memory = Memory([])
    first = memory.load("a", "a", GB, None, ready=20.0, now=0.0)
    second = memory.load("b", "b", GB, None, ready=20.0, now=0.0)
    memory.ready(first, 1.0)
    assert memory.loading is second


@pytest.mark.parametrize(
    ("ready", "runs", "since", "now", "there"),
    [
        (None, 0, 10.0, 12.9, True),  # it was loaded after that was asked
        (None, 0, 10.0, 13.1, False),
        (20.0, 0, 10.0, 99.0, True),  # it is on its way
        (None, 1, 10.0, 99.0, True),  # who answers is there
    ],
)
def test_what_is_not_listed_is_gone_unless_there_is_a_reason(
    ready: float | None, runs: int, since: float, now: float, *, there: bool
) -> None:
    memory = told(24, "a10")
    one = memory.loaded["a"]
    one.since, one.ready = since, ready
    one.runs.update({i: Run(0.0, 1.0, 1.0) for i in range(runs)})
    memory.see({}, now, WALL + now)
    assert ("a" in memory.loaded) is there


def test_a_good_end_means_that_it_is_loaded() -> None:
    memory = Memory([])
    one = memory.load("a", "a", GB, None, ready=20.0, now=0.0)
    one.runs["r"] = Run(0.0, 0.0, 10.0)
    memory.end(one, "r", 8.0, good=True)
    assert (one.runs, one.ready, one.used, memory.loading) == ({}, None, 8.0, None)


def test_a_load_whose_last_request_failed_is_none() -> None:
    memory = Memory([])
    one = memory.load("a", "a", GB, None, ready=20.0, now=0.0)
    one.runs.update({"r": Run(0.0, 0.0, 10.0), "s": Run(0.0, 0.0, 10.0)})
    memory.end(one, "r", 8.0, good=False)
    assert memory.loading is one
    memory.end(one, "s", 8.0, good=False)
    assert memory.loading is None
    assert not memory.loaded


def test_a_model_that_is_loaded_stays_so_when_a_request_fails() -> None:
    memory = told(24, "a10*")
    memory.end(memory.loaded["a"], "a10*", 8.0, good=False)
    assert (memory.loaded["a"].used, memory.loaded["a"].runs) == (8.0, {})


# Requests at work


def test_a_request_has_as_long_left_as_was_expected_and_at_least_some_of_its_answer() -> None:
    run = Run(since=10.0, first_s=10.0, out_s=10.0)
    assert [run.left_s(now) for now in (10.0, 15.0, 27.0, 28.0, 33.0)] == [20, 15, 3, 3, 3]


def test_once_it_answers_only_the_answer_is_left() -> None:
    run = Run(since=10.0, first_s=80.0, out_s=10.0)
    run.begin(15.0)
    assert [run.left_s(now) for now in (15.0, 20.0, 25.0)] == pytest.approx([10, 5, 3])


def test_what_is_overdue_is_thought_to_go_on_for_as_long_again() -> None:
    run = Run(since=10.0, first_s=10.0, out_s=10.0)
    assert [run.holds_s(now) for now in (10.0, 34.0, 70.0, 1000.0)] == [20, 4, 40, 60]
    assert run.left_s(70.0) == 3.0


def test_a_model_tells_when_each_of_its_requests_ends() -> None:
    one = told(24, "a10").loaded["a"]
    assert one.ends(0.0) == []
    one.runs.update({1: Run(0.0, 0.0, 10.0), 2: Run(2.0, 0.0, 10.0)})
    assert one.ends(4.0) == [6.0, 8.0]


# Room that is made


def test_what_has_to_make_room_is_left_alone_until_the_load_or_nobody_wants_it() -> None:
    memory = told(24, "a10* b10*")
    memory.reserve("c", memory.victims("c", 10.0 * GB, busy=True) or ())
    assert (memory.wanted, memory.leaving) == ("c", {"a"})
    memory.release()
    assert (memory.wanted, list(memory.leaving)) == ("", [])
    memory.release()
    memory.reserve("c", [])
    memory.load("d", "d", GB, None, 5.0, 0.0)
    assert memory.wanted == "c"
    memory.load("c", "c", GB, None, 5.0, 0.0)
    assert (memory.wanted, list(memory.leaving)) == ("", [])
