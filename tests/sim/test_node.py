"""The scheduler of a simulated node, in virtual time. All speeds make one token take 0.01 s."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.sim import GB, Event, EventKind, Job, Phase, Scheduler, SimModel, SimSpec


def model(name: str, **changes: object) -> SimModel:
    """Loads in 10 s, weighs 1 GB, reads and writes 100 tokens a second."""
    base: dict[str, object] = {
        "size_bytes": GB,
        "load_s": 10.0,
        "prefill_tps": 100.0,
        "decode_tps": 100.0,
    }
    return SimModel(name, **{**base, **changes})  # type: ignore[arg-type]


A, B, C, D = (model(name) for name in "abcd")
EMBED = model("embed", embedding=True)


def spec(**changes: object) -> SimSpec:
    base: dict[str, object] = {"models": (A, B, C, D, EMBED), "memory_bytes": 100 * GB}
    return SimSpec(**{**base, **changes})  # type: ignore[arg-type]


def job(one: SimModel = A, **changes: object) -> Job:
    """Takes 1 s to read and 2 s to write."""
    base: dict[str, object] = {"prompt_tokens": 100, "answer_tokens": 200}
    return Job(one, **{**base, **changes})  # type: ignore[arg-type]


def load_only(one: SimModel, **changes: object) -> Job:
    return Job(one, load_only=True, **changes)  # type: ignore[arg-type]


def play(node: Scheduler, until: float = math.inf) -> list[Event]:
    """Let time pass from event to event."""
    told = []
    while (due := node.next_at()) is not None and due <= until:
        told += node.advance(due)
    return told


def kinds(events: Sequence[Event], *wanted: EventKind) -> list[tuple[str, str, float]]:
    return [
        (event.kind.value, event.model.name[0], event.at)
        for event in events
        if not wanted or event.kind in wanted
    ]


def phases(*jobs: Job) -> list[Phase]:
    return [one.phase for one in jobs]


def resident(node: Scheduler, now: float) -> list[str]:
    return [one.model.name[0] for one in node.resident(now)]


def test_cold_job_loads_then_reads_then_writes() -> None:
    node = Scheduler(spec(keep_alive_s=-1))
    one = job()
    assert node.submit(one, 0)
    assert kinds(play(node)) == [
        ("loading", "a", 0),
        ("loaded", "a", 10),
        ("started", "a", 10),
        ("done", "a", 13),
    ]
    assert (one.arrived, one.ready_at, one.started) == (0, 10, 10)
    assert (one.first_token_at, one.finish_at, one.token_at(100)) == (11, 13, 12)
    assert (node.loads, node.in_flight, node.peak_in_flight) == (1, 0, 1)
    assert node.peaks == {A.name: 1}


def test_time_of_an_event_does_not_depend_on_when_it_is_read() -> None:
    node = Scheduler(spec(keep_alive_s=-1))
    node.submit(job(), 0)
    assert kinds(node.advance(1000))[-1] == ("done", "a", 13)


def test_warm_job_starts_at_once() -> None:
    node = Scheduler(spec(warm=("a", "b:latest")))
    one = job()
    node.submit(one, 5)
    assert (one.ready_at, one.started, node.loads) == (5, 5, 0)
    assert resident(node, 5) == ["a", "b"]


def test_unknown_warm_name_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        Scheduler(spec(warm=("nope",)))


def test_jobs_wait_for_slots_first_come_first_served() -> None:
    node = Scheduler(spec(warm=("a",), num_parallel=2))
    jobs = [job() for _ in range(5)]
    for one in jobs:
        node.submit(one, 0)
    play(node, until=100)
    assert [one.started for one in jobs] == [0, 0, 3, 3, 6]


def test_wait_behind_a_loaded_model_has_no_bound() -> None:
    node = Scheduler(spec(warm=("a",), max_queue=4))
    assert all(node.submit(job(), 0) for _ in range(1000))
    assert (node.in_flight, node.refused, node.pending) == (1000, 0, 0)


def test_load_queue_holds_max_queue_behind_its_head() -> None:
    node = Scheduler(spec(max_queue=4))
    assert [node.submit(job(), 0) for _ in range(20)] == [True] * 5 + [False] * 15
    assert (node.refused, node.in_flight, node.pending) == (15, 5, 5)
    done = kinds(play(node, until=100), EventKind.DONE)
    assert len(done) == 5
    assert node.loads == 1


def test_refused_job_is_over() -> None:
    node = Scheduler(spec(max_queue=0))
    node.submit(job(A), 0)
    refused = job(B)
    assert not node.submit(refused, 0)
    assert refused.phase is Phase.REFUSED
    assert refused.ended
    node.cancel(refused, 1)
    assert node.in_flight == 1


def test_loads_are_serial() -> None:
    node = Scheduler(spec())
    for one in (A, B, C):
        node.submit(job(one), 0)
    loads = kinds(play(node, until=50), EventKind.LOADING, EventKind.LOADED)
    assert [at for _, _, at in loads] == [0, 10, 10, 20, 20, 30]


def test_head_that_waits_for_a_victim_blocks_other_loads_but_no_loaded_model() -> None:
    node = Scheduler(spec(warm=("a", "b"), max_loaded=2, num_parallel=2))
    node.submit(job(A, answer_tokens=10_000), 0)
    node.submit(job(B, answer_tokens=10_000), 0)
    first, second, warm = job(C), job(D), job(B)
    node.submit(first, 1)
    node.submit(second, 1)
    node.submit(warm, 1)
    assert (node.pending, warm.started) == (2, 1)
    play(node, until=60)
    assert phases(first, second) == [Phase.PENDING, Phase.PENDING]
    play(node, until=400)
    assert phases(first, second) == [Phase.DONE, Phase.DONE]
    assert first.ready_at == 111  # a is the victim, idle at 101


def test_model_loads_beside_others_while_there_is_room() -> None:
    node = Scheduler(spec(warm=("a", "b")))
    node.submit(load_only(C), 0)
    play(node, until=10)
    assert resident(node, 10) == ["c", "a", "b"]
    assert node.evictions == 0


def test_max_loaded_evicts_one() -> None:
    node = Scheduler(spec(warm=("a", "b"), max_loaded=2))
    node.submit(load_only(C), 0)
    play(node, until=10)
    assert resident(node, 10) == ["c", "b"]
    assert node.evictions == 1


def test_eviction_goes_on_until_the_model_fits() -> None:
    big = model("big", size_bytes=3 * GB)
    node = Scheduler(spec(models=(A, B, big), warm=("a", "b"), memory_bytes=4 * GB))
    node.submit(load_only(big), 0)
    play(node, until=10)
    assert resident(node, 10) == ["b"]
    assert node.resident(10)[0].model is big
    assert node.evictions == 2


def test_model_too_large_for_the_node_is_loaded_alone() -> None:
    big = model("big", size_bytes=300 * GB)
    node = Scheduler(spec(models=(A, big), warm=("a",)))
    node.submit(load_only(big), 0)
    play(node, until=10)
    assert resident(node, 10) == ["b"]


@pytest.mark.parametrize(
    ("keep_alive", "busy", "victim"),
    [
        pytest.param({"a": 60, "b": 60, "c": 60}, "", "a", id="name decides between equals"),
        pytest.param({"a": 60, "b": 30, "c": 60}, "", "b", id="shortest keep_alive first"),
        pytest.param({"a": 60, "b": 30, "c": 60}, "b", "a", id="idle before shortest"),
        pytest.param({"a": -1, "b": -1, "c": 9000}, "", "c", id="for ever comes last"),
        pytest.param({"a": 60, "b": 30, "c": 60}, "abc", "b", id="none idle: shortest is awaited"),
    ],
)
def test_victim(keep_alive: dict[str, float], busy: str, victim: str) -> None:
    node = Scheduler(spec(warm=("a", "b", "c")))
    for one in (A, B, C):
        node.submit(load_only(one, keep_alive_s=keep_alive[one.name[0]]), 0)
    for one in (A, B, C):
        if one.name[0] in busy:
            node.submit(job(one, answer_tokens=2000), 0)
    node.submit(job(D), 1)
    unloaded = kinds(play(node, until=25), EventKind.UNLOADED)
    assert unloaded == [("unloaded", victim, 21 if busy == "abc" else 1)]


def test_awaited_victim_may_get_work_for_ever() -> None:
    node = Scheduler(spec(warm=("a",), max_loaded=1, num_parallel=2))
    node.submit(job(A), 0)
    cold = job(B)
    node.submit(cold, 1)
    for second in range(2, 200, 2):
        node.submit(job(A), second)
    assert phases(cold) == [Phase.PENDING]
    play(node, until=250)
    assert phases(cold) == [Phase.DONE]


def test_another_victim_that_becomes_idle_does_not_help_the_head() -> None:
    node = Scheduler(spec(warm=("a", "b"), max_loaded=2))
    node.submit(job(A, answer_tokens=1000), 0)
    node.submit(job(B), 0)
    node.submit(job(C), 1)
    unloaded = kinds(play(node, until=30), EventKind.UNLOADED)
    assert unloaded == [("unloaded", "a", 11)]


def test_keep_alive_runs_from_the_moment_the_model_is_idle() -> None:
    node = Scheduler(spec(keep_alive_s=60))
    node.submit(job(), 0)
    assert kinds(play(node), EventKind.UNLOADED) == [("unloaded", "a", 73)]
    assert node.next_at() is None


def test_request_restarts_the_keep_alive_timer() -> None:
    node = Scheduler(spec(warm=("a",), keep_alive_s=60))
    node.submit(job(), 50)
    assert resident(node, 61) == ["a"]
    assert kinds(play(node), EventKind.UNLOADED) == [("unloaded", "a", 113)]


def test_expiry_is_told_as_the_old_one_while_busy() -> None:
    node = Scheduler(spec(warm=("a",), keep_alive_s=60))
    node.submit(job(), 50)
    assert node.resident(51)[0].expires_at == 60
    assert node.resident(54)[0].expires_at == 113


def test_expiry_of_a_model_that_was_never_idle_counts_from_now() -> None:
    node = Scheduler(spec(keep_alive_s=60))
    node.submit(job(answer_tokens=10_000), 0)
    node.advance(20)
    assert node.resident(20)[0].expires_at == 80


def test_every_request_overwrites_keep_alive_and_none_leaves_it() -> None:
    node = Scheduler(spec(warm=("a",)))
    node.submit(job(keep_alive_s=20), 0)
    node.submit(job(), 0)
    assert kinds(play(node), EventKind.UNLOADED) == [("unloaded", "a", 26)]


def test_negative_keep_alive_is_for_ever() -> None:
    node = Scheduler(spec(warm=("a",)))
    node.submit(job(keep_alive_s=-5), 0)
    assert kinds(play(node), EventKind.UNLOADED) == []
    assert node.resident(1e9)[0].expires_at == math.inf


def test_keep_alive_zero_unloads_after_the_answer() -> None:
    node = Scheduler(spec())
    node.submit(job(keep_alive_s=0), 0)
    assert kinds(play(node), EventKind.DONE, EventKind.UNLOADED) == [
        ("done", "a", 13),
        ("unloaded", "a", 13),
    ]


def test_unload_takes_an_idle_model_at_once() -> None:
    node = Scheduler(spec(warm=("a",)))
    node.unload(A, 5)
    assert resident(node, 5) == []


def test_unload_waits_for_a_busy_model() -> None:
    node = Scheduler(spec(warm=("a",)))
    node.submit(job(), 0)
    node.unload(A, 1)
    assert resident(node, 1) == ["a"]
    assert kinds(play(node), EventKind.UNLOADED) == [("unloaded", "a", 3)]


def test_unload_of_what_is_not_loaded_does_nothing() -> None:
    node = Scheduler(spec())
    node.unload(A, 0)
    assert node.advance(0) == []


def test_unload_of_a_loading_model_takes_effect_after_its_work() -> None:
    node = Scheduler(spec())
    node.submit(job(), 0)
    node.unload(A, 1)
    assert kinds(play(node), EventKind.UNLOADED) == [("unloaded", "a", 13)]


def test_loading_model_is_not_listed() -> None:
    node = Scheduler(spec())
    node.submit(load_only(A), 0)
    assert resident(node, 9.9) == []
    assert resident(node, 10) == ["a"]


def test_load_only_job_ends_when_the_model_is_ready() -> None:
    node = Scheduler(spec())
    one = load_only(A)
    node.submit(one, 0)
    assert kinds(play(node, until=10)) == [
        ("loading", "a", 0),
        ("loaded", "a", 10),
        ("done", "a", 10),
    ]
    assert one.phase is Phase.DONE


@pytest.mark.parametrize(
    ("changes", "reloads"),
    [
        ({}, False),
        ({"num_ctx": 4096}, False),
        ({"num_ctx": 2048}, True),
        ({"options": (("num_batch", "1"),)}, True),
        ({"keep_alive_s": 10}, False),
    ],
)
def test_changed_runner_options_reload(changes: dict[str, object], reloads: bool) -> None:
    node = Scheduler(spec(warm=("a",)))
    one = job(A, **changes)
    node.submit(one, 0)
    play(node, until=20)
    assert (node.loads, one.ready_at) == ((1, 10) if reloads else (0, 0))
    assert node.evictions == 0


def test_context_is_clamped_to_what_the_model_was_trained_for() -> None:
    node = Scheduler(spec())
    node.submit(load_only(A, num_ctx=100_000), 0)
    node.submit(load_only(A, num_ctx=90_000), 20)
    play(node, until=20)
    assert node.loads == 1
    assert node.resident(20)[0].num_ctx == 8192


def test_plain_request_after_an_explicit_context_reloads_the_default() -> None:
    node = Scheduler(spec())
    for at, num_ctx in ((0, 2048), (20, None), (40, 2048)):
        node.submit(load_only(A, num_ctx=num_ctx), at)
        play(node, until=at + 15)
    assert node.loads == 3


def test_reload_waits_until_the_runner_is_idle() -> None:
    node = Scheduler(spec(warm=("a",)))
    node.submit(job(), 0)
    other = job(num_ctx=2048)
    node.submit(other, 1)
    play(node, until=20)
    assert other.ready_at == 13


def test_names_with_the_same_weights_share_one_runner() -> None:
    copy = model("copy", weights=A.weights)
    node = Scheduler(spec(models=(A, copy), warm=("a",)))
    one = job(copy)
    node.submit(one, 0)
    assert (one.started, node.loads, resident(node, 0)) == (0, 0, ["a"])


def test_embedding_model_has_one_slot() -> None:
    node = Scheduler(spec(warm=("embed",), num_parallel=4))
    jobs = [job(EMBED, answer_tokens=0) for _ in range(3)]
    for one in jobs:
        node.submit(one, 0)
    play(node, until=10)
    assert [one.started for one in jobs] == [0, 1, 2]


def test_slots_of_one_model_can_be_set() -> None:
    single = model("single", slots=1)
    node = Scheduler(spec(models=(single,), warm=("single",), num_parallel=4))
    jobs = [job(single) for _ in range(2)]
    for one in jobs:
        node.submit(one, 0)
    assert [one.phase for one in jobs] == [Phase.RUNNING, Phase.WAITING]


def test_slots_reserve_context_each() -> None:
    one, four = spec(), spec(num_parallel=4)
    extra = one.reserved_bytes(A, 4096) - A.size_bytes
    assert four.reserved_bytes(A, 4096) == A.size_bytes + 4 * extra


def test_cancel_of_a_running_job_frees_its_slot() -> None:
    node = Scheduler(spec(warm=("a",)))
    first, second = job(), job()
    node.submit(first, 0)
    node.submit(second, 0)
    node.cancel(first, 1.5)
    assert first.phase is Phase.CANCELLED
    assert (second.started, node.in_flight) == (1.5, 1)


def test_cancel_of_a_waiting_job_takes_it_out_of_the_queue() -> None:
    node = Scheduler(spec(warm=("a",)))
    jobs = [job() for _ in range(3)]
    for one in jobs:
        node.submit(one, 0)
    node.cancel(jobs[1], 1)
    play(node, until=10)
    assert jobs[2].started == 3
    assert math.isnan(jobs[1].started)


def test_cancel_of_the_starter_aborts_the_load_and_others_start_from_zero() -> None:
    node = Scheduler(spec())
    starter, other = job(), job()
    node.submit(starter, 0)
    node.submit(other, 1)
    node.cancel(starter, 6)
    play(node, until=20)
    assert (node.loads, node.aborted_loads) == (2, 1)
    assert other.ready_at == 16


def test_cancel_of_another_waiter_does_not_touch_the_load() -> None:
    node = Scheduler(spec())
    starter, other = job(), job()
    node.submit(starter, 0)
    node.submit(other, 1)
    node.cancel(other, 6)
    play(node, until=20)
    assert (node.aborted_loads, starter.ready_at, node.in_flight) == (0, 10, 0)


def test_cancel_of_a_head_that_waits_for_a_victim_lets_the_next_one_in() -> None:
    node = Scheduler(spec(warm=("a",), max_loaded=1))
    node.submit(job(A, answer_tokens=1000), 0)
    head, behind = job(B), load_only(A, num_ctx=4096)
    node.submit(head, 1)
    node.submit(job(C), 1)
    node.cancel(head, 2)
    node.submit(behind, 2)
    assert (behind.phase, node.pending) == (Phase.DONE, 1)
    play(node, until=40)
    assert node.in_flight == 0


def test_cancel_of_the_last_job_starts_the_keep_alive() -> None:
    node = Scheduler(spec(warm=("a",), keep_alive_s=60))
    one = job()
    node.submit(one, 0)
    node.cancel(one, 2)
    assert kinds(play(node), EventKind.UNLOADED) == [("unloaded", "a", 62)]


def test_cancel_twice_or_after_the_end_changes_nothing() -> None:
    node = Scheduler(spec(warm=("a",)))
    one = job()
    node.submit(one, 0)
    node.cancel(one, 5)
    assert (one.phase, node.in_flight) == (Phase.DONE, 0)


BLOCKS = [f"block {at}" for at in range(6)]


def started(node: Scheduler, one: Job, now: float) -> Job:
    node.submit(one, now)
    assert one.phase is Phase.RUNNING
    return one


def test_known_beginning_of_a_prompt_is_not_read_again() -> None:
    node = Scheduler(spec(warm=("a",)))
    started(node, job(blocks=BLOCKS[:4]), 0)
    again = started(node, job(blocks=[*BLOCKS[:3], "other"]), 10)
    assert again.cached_tokens == 48
    assert again.first_token_at == pytest.approx(10.52)


def test_answer_is_part_of_what_the_cache_keeps() -> None:
    node = Scheduler(spec(warm=("a",)))
    started(node, job(blocks=BLOCKS[:2], keeps=BLOCKS[:5]), 0)
    assert started(node, job(blocks=BLOCKS), 10).cached_tokens == 80


def test_last_token_of_a_known_prompt_is_read_again() -> None:
    node = Scheduler(spec(warm=("a",)))
    started(node, job(prompt_tokens=96, blocks=BLOCKS), 0)
    assert started(node, job(prompt_tokens=96, blocks=BLOCKS), 10).cached_tokens == 95


def test_cache_is_lost_with_the_model() -> None:
    node = Scheduler(spec(warm=("a",), keep_alive_s=5))
    started(node, job(blocks=BLOCKS), 0)
    one = job(blocks=BLOCKS)
    node.submit(one, 20)
    play(node, until=31)
    assert one.cached_tokens == 0


def test_cache_drops_the_oldest_conversation_first() -> None:
    node = Scheduler(spec(warm=("a",), cache_tokens=16 * 8))
    old = [f"old {at}" for at in range(4)]
    started(node, job(blocks=old), 0)
    started(node, job(blocks=BLOCKS), 10)
    assert started(node, job(blocks=BLOCKS), 20).cached_tokens == 96
    assert started(node, job(blocks=old), 30).cached_tokens == 32


@pytest.mark.parametrize(("cancelled_at", "cached"), [(0.5, 0), (1.5, 48)])
def test_cancelled_prompt_is_kept_once_it_was_read(cancelled_at: float, cached: int) -> None:
    node = Scheduler(spec(warm=("a",)))
    one = started(node, job(blocks=BLOCKS[:3]), 0)
    node.cancel(one, cancelled_at)
    assert started(node, job(blocks=BLOCKS[:3]), 5).cached_tokens == cached


def test_slow_node_and_slow_job_take_longer() -> None:
    node = Scheduler(spec())
    node.pace = 2.0
    one = job(pace=3.0)
    node.submit(one, 0)
    play(node, until=100)
    assert (one.ready_at, one.first_token_at, one.finish_at) == (60, 66, 78)


def test_other_busy_models_slow_a_job_down() -> None:
    node = Scheduler(spec(warm=("a", "b"), contention=0.5))
    started(node, job(A), 0)
    assert started(node, job(B), 0).finish_at == 4.5


@pytest.mark.parametrize(("gpus", "finish_at"), [(1, 6.0), (2, 3.75), (3, 3.0)])
def test_models_share_the_gpus_that_are_too_few(gpus: int, finish_at: float) -> None:
    node = Scheduler(spec(warm=("a", "b", "c"), contention=0.5, gpus=gpus))
    started(node, job(A), 0)
    started(node, job(B), 0)
    assert started(node, job(C), 0).finish_at == finish_at


def test_model_without_delays_takes_no_time() -> None:
    quick = model("quick", load_s=0.0, prefill_tps=math.inf, decode_tps=math.inf)
    node = Scheduler(spec(models=(quick,), keep_alive_s=-1))
    one = job(quick)
    node.submit(one, 7)
    node.advance(7)
    assert (one.phase, one.finish_at) == (Phase.DONE, 7)
    assert node.next_at() is None


def test_unread_events_make_next_at_a_moment_in_the_past() -> None:
    node = Scheduler(spec(warm=("a",)))
    node.submit(job(), 4)
    assert node.next_at() == 4


def test_state_is_told_in_one_line() -> None:
    node = Scheduler(spec(warm=("a",), max_loaded=1))
    node.submit(job(), 0)
    node.submit(job(B), 0)
    text = "<Scheduler head=b:latest pending=0 [<a:latest ctx=4096 leaving running=1 waiting=0>]>"
    assert repr(node) == text


STEP = st.tuples(
    st.sampled_from(["submit", "submit", "submit", "cancel", "unload", "wait"]),
    st.integers(0, 4),
    st.sampled_from([0.0, 0.5, 3.0, 11.0]),
    st.sampled_from([None, 0.0, 5.0, -1.0]),
    st.sampled_from([None, 1024]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(STEP, max_size=40), st.integers(1, 3), st.integers(1, 3), st.integers(0, 4))
def test_books_balance(
    steps: list[tuple[str, int, float, float | None, int | None]],
    num_parallel: int,
    max_loaded: int,
    max_queue: int,
) -> None:
    """Whatever happens: no slot and no byte is given twice, and every job taken in ends once."""
    limits = spec(
        num_parallel=num_parallel,
        max_loaded=max_loaded,
        max_queue=max_queue,
        memory_bytes=3 * GB,
    )
    node = Scheduler(limits)
    models = limits.models
    taken: list[Job] = []
    told: list[Event] = []
    now = 0.0
    for what, pick, pause, keep_alive_s, num_ctx in steps:
        now += pause
        if what == "submit":
            one = job(models[pick], keep_alive_s=keep_alive_s, num_ctx=num_ctx)
            if node.submit(one, now):
                taken.append(one)
        elif what == "cancel" and taken:
            node.cancel(taken[pick % len(taken)], now)
        elif what == "unload":
            node.unload(models[pick], now)
        told += node.advance(now)
        check(node, limits, taken, now)
    told += play(node)
    assert node.in_flight == node.pending == 0
    assert all(one.phase in (Phase.DONE, Phase.CANCELLED) for one in taken)
    done = [event.job for event in told if event.kind is EventKind.DONE]
    assert len(done) == len(set(done)) == sum(one.phase is Phase.DONE for one in taken)
    assert [event.at for event in told] == sorted(event.at for event in told)


def check(node: Scheduler, limits: SimSpec, taken: Sequence[Job], now: float) -> None:
    loaded = node.resident(now)
    running = [one for one in taken if one.phase is Phase.RUNNING]
    assert node.in_flight == sum(not one.ended for one in taken)
    assert node.in_flight == node.pending + sum(one.in_flight for one in loaded)
    assert len(loaded) <= limits.max_loaded
    assert len(loaded) <= 1 or sum(one.reserved_bytes for one in loaded) <= limits.memory_bytes
    for one in limits.models:
        assert sum(other.model is one for other in running) <= limits.slots(one)
