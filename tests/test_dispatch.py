"""The async face of the pool: whatever happens to the task that asks, the books balance."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from math import inf

import pytest

from router.core.lease import Lease
from router.core.names import parse
from router.core.policy import Attempt, Target
from router.core.pool import Pool
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
    PoolSpec,
    Refusal,
    Resilience,
    Sign,
    Topology,
)
from router.dispatch import Clock, Dispatch, Refused
from router.errors import UpstreamError

KEY, OTHER = "llama3:8b", "phi:latest"
NODE = NodeSpec("n1", "http://n1:11434", "http", "n1", 11434, slots=100)


class Books:
    """A pool of one node with room for all, and the flips and failures that its dispatch has told.
    Nobody waits for the end of a back-off, unless it is set."""

    def __init__(self, clock: Clock = lambda: 7.0, back_off_s: float = 1000.0) -> None:
        self.flips: list[Flip] = []
        self.failures: list[tuple[str, FailureKind]] = []
        rules = Resilience(back_off_s=back_off_s, back_off_max_s=1000.0, resets=2)
        self.pool = Pool(Topology((PoolSpec("default", (NODE,)),), resilience=rules), 0.0)
        present = {key: Model(key, "", {}) for key in (KEY, OTHER)}
        seen = Observation(Sign.GOOD, "0.33.0", present=present, resident=present)
        self.pool.observe(NODE.url, seen, 0.0)
        self.dispatch = Dispatch(self.pool, self.flips.append, clock, self._failed)

    def _failed(self, node: NodeSpec, failure: Failure) -> None:
        self.failures.append((node.name, failure.kind))

    def attempt(self, model: str = KEY) -> Attempt:
        return Attempt(Target(parse(model), None, model))


@pytest.fixture
def books() -> Books:
    return Books()


async def test_a_lease_is_counted_inside_its_block_only(books: Books) -> None:
    async with books.dispatch.lease(books.attempt()) as lease:
        assert lease.node is NODE
        assert books.pool.in_flight == 1
    assert books.pool.in_flight == 0
    assert not books.flips


async def test_no_lease_is_told_with_its_reason(books: Books) -> None:
    with pytest.raises(Refused, match=r"^no-model$") as caught:
        async with books.dispatch.lease(books.attempt("nope")):
            pytest.fail("the block must not be entered")
    assert caught.value.rejected.refusal is Refusal.NO_MODEL
    assert books.pool.in_flight == 0


@pytest.mark.parametrize(
    ("error", "down"),
    [
        (UpstreamError(Failure(FailureKind.REFUSED, detail="connection refused")), True),
        (UpstreamError(Failure(FailureKind.CONNECT)), False),
        (UpstreamError(Failure(FailureKind.RESET, sent=True)), False),
        (RuntimeError("a mistake"), False),
    ],
)
async def test_every_error_gives_the_lease_back_and_a_refusal_marks_the_node_down(
    books: Books, error: Exception, down: bool
) -> None:
    with pytest.raises(type(error)):
        async with books.dispatch.lease(books.attempt()):
            raise error
    assert books.pool.in_flight == 0
    flips = [Flip("n1", Health.UP, Health.DOWN, "connection refused")] if down else []
    assert books.flips == flips


Cancel = Callable[[asyncio.Task[None], asyncio.Event], None]


async def _holder(books: Books, entered: asyncio.Event, go: asyncio.Event) -> None:
    await go.wait()
    async with books.dispatch.lease(books.attempt()):
        entered.set()
        await asyncio.Event().wait()


def _before(task: asyncio.Task[None], go: asyncio.Event) -> None:
    task.cancel()
    go.set()


def _in_the_tick_of(task: asyncio.Task[None], go: asyncio.Event) -> None:
    # The task is on its way to the grant, and the cancellation overtakes it or is overtaken.
    go.set()
    task.cancel()


@pytest.mark.parametrize("cancel", [_before, _in_the_tick_of])
@pytest.mark.parametrize("waiting", [False, True], ids=["not yet run", "about to ask"])
async def test_cancellation_until_the_grant_takes_nothing(
    books: Books, cancel: Cancel, waiting: bool
) -> None:
    entered, go = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(_holder(books, entered, go))
    if waiting:
        await asyncio.sleep(0)
    cancel(task, go)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert books.pool.in_flight == 0
    assert not entered.is_set()


async def test_cancellation_in_the_very_step_of_the_grant_gives_it_back(books: Books) -> None:
    """The request to cancel is there before the block is entered, and strikes inside it."""
    leases: list[Lease] = []

    async def hold() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        async with books.dispatch.lease(books.attempt()) as lease:
            leases.append(lease)
            assert books.pool.in_flight == 1
            await asyncio.sleep(0)

    task = asyncio.create_task(hold())
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(leases) == 1
    assert books.pool.in_flight == 0


async def test_cancellation_after_the_grant_gives_it_back_at_once(books: Books) -> None:
    entered, go = asyncio.Event(), asyncio.Event()
    go.set()
    tasks = [asyncio.create_task(_holder(books, entered, go)) for _ in range(20)]
    await entered.wait()
    await asyncio.sleep(0)
    assert books.pool.in_flight == 20
    for number, task in enumerate(tasks):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert books.pool.in_flight == 19 - number


async def test_a_holder_that_is_cancelled_twice_gives_back_once(books: Books) -> None:
    async with books.dispatch.lease(books.attempt()):
        entered, go = asyncio.Event(), asyncio.Event()
        go.set()
        task = asyncio.create_task(_holder(books, entered, go))
        await entered.wait()
        task.cancel()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert books.pool.in_flight == 1
    assert books.pool.in_flight == 0


async def test_every_flip_and_every_failure_is_told() -> None:
    books = Books()
    books.dispatch.clock = lambda: now
    now = 7.0
    for _ in range(2):
        with pytest.raises(UpstreamError):
            async with books.dispatch.lease(books.attempt()):
                raise UpstreamError(Failure(FailureKind.RESET, detail="reset by peer"))
    now = 2000.0
    async with books.dispatch.lease(books.attempt()):
        assert [flip.now for flip in books.flips] == [Ejection.OPEN, Ejection.TRIAL]
    assert books.flips[-1] == Flip("n1", Ejection.TRIAL, Ejection.CLOSED, "reset by peer")
    assert books.failures == [("n1", FailureKind.RESET)] * 2


async def test_how_an_attempt_ended_may_be_said_inside(books: Books) -> None:
    async with books.dispatch.lease(books.attempt()) as lease:
        assert not lease.flips
    for _ in range(9):
        held = books.dispatch.lease(books.attempt())
        with contextlib.suppress(UpstreamError):
            async with held:
                held.outcome = Outcome(told=False)
                raise UpstreamError(Failure(FailureKind.RESET))
    assert not books.flips
    assert not books.failures


# Waiting for room.


BUSY = UpstreamError(Failure(FailureKind.BUSY, sent=True, received=True, status=503))


async def fill(books: Books, key: str = KEY) -> None:
    """The node says that it takes no more."""
    with contextlib.suppress(UpstreamError):
        async with books.dispatch.lease(books.attempt(key)):
            raise BUSY


class Crowd:
    """Requests that wait for room, each in a task of its own."""

    def __init__(self, books: Books, group: asyncio.TaskGroup) -> None:
        self.books = books
        self.group = group
        self.went = asyncio.Queue[object]()  # the place of each that got in, or why it did not
        self.stay = asyncio.Event()

    async def _ask(self, place: int, key: str, deadline: float) -> None:
        try:
            async with self.books.dispatch.lease(self.books.attempt(key), deadline):
                self.went.put_nowait(place)
                await self.stay.wait()
        except Refused as refused:
            self.went.put_nowait(refused.rejected.refusal)

    async def come(self, size: int = 1, key: str = KEY, deadline: float = inf) -> None:
        """So many come, one after the other, and wait."""
        self.tasks = [
            self.group.create_task(self._ask(place, key, deadline)) for place in range(size)
        ]
        before = self.books.dispatch.waiting
        await turns(3)
        assert self.books.dispatch.waiting == before + size

    @property
    def quiet(self) -> bool:
        return self.went.empty()


@contextlib.asynccontextmanager
async def crowd(books: Books) -> AsyncIterator[Crowd]:
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        found = Crowd(books, group)
        yield found
        found.stay.set()
    assert books.pool.in_flight == books.dispatch.waiting == 0
    assert not books.dispatch._waiters


async def turns(count: int = 20) -> None:
    """Let everything happen that can."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_full_node_is_refused_at_once_to_whoever_cannot_wait(books: Books) -> None:
    await fill(books)
    for deadline in (-inf, 0.0, 7.0):
        with pytest.raises(Refused, match=r"^busy$"):
            async with books.dispatch.lease(books.attempt(), deadline):
                pytest.fail("the block must not be entered")
    assert books.dispatch.waiting == 0


async def test_the_end_of_a_request_for_the_model_makes_room_for_the_first_who_waits(
    books: Books,
) -> None:
    async with crowd(books) as waiting:
        async with books.dispatch.lease(books.attempt()):
            await fill(books)
            await waiting.come(3)
        assert await waiting.went.get() == 0
        await turns()
        assert waiting.quiet
        assert (books.pool.in_flight, books.dispatch.waiting) == (1, 2)
        waiting.stay.set()
        assert [await waiting.went.get() for _ in range(2)] == [1, 2]


async def test_how_long_there_was_no_room_is_told(books: Books) -> None:
    held = books.dispatch.lease(books.attempt(), inf)

    async def wait() -> None:
        async with held:
            pass

    async with asyncio.TaskGroup() as group, books.dispatch.lease(books.attempt()):
        await fill(books)
        group.create_task(wait())
        await turns(3)
        assert (books.dispatch.waiting, held.waited_s) == (1, 0.0)
        books.dispatch.clock = lambda: 9.5
    assert held.waited_s == 2.5


async def test_the_end_of_another_model_s_does_not(books: Books) -> None:
    async with crowd(books) as waiting, books.dispatch.lease(books.attempt()):
        await fill(books)
        await waiting.come()
        async with books.dispatch.lease(books.attempt(OTHER)):
            pass
        await turns()
        assert (waiting.quiet, books.dispatch.waiting) == (True, 1)


async def test_an_end_that_makes_no_room_leaves_it_waiting(books: Books) -> None:
    async with crowd(books) as waiting, books.dispatch.lease(books.attempt()):
        held = books.dispatch.lease(books.attempt())
        async with held:
            await fill(books)
            await waiting.come()
            held.outcome = Outcome(told=False)
        await turns()
        assert (waiting.quiet, books.dispatch.waiting) == (True, 1)


async def test_so_does_the_end_of_the_back_off() -> None:
    books = Books(time.monotonic, back_off_s=0.02)
    async with crowd(books) as waiting:
        await fill(books)
        await waiting.come()
        assert await waiting.went.get() == 0


async def test_nobody_waits_past_the_deadline() -> None:
    books = Books(time.monotonic)
    async with crowd(books) as waiting:
        await fill(books)
        await waiting.come(deadline=time.monotonic() + 0.02)
        assert await waiting.went.get() is Refusal.BUSY


async def test_a_waiter_that_is_cancelled_leaves_nothing_behind(books: Books) -> None:
    async with crowd(books) as waiting:
        await fill(books)
        await waiting.come(3)
        for left, task in zip((2, 1, 0), waiting.tasks, strict=True):
            task.cancel()
            await asyncio.wait([task])
            assert (books.dispatch.waiting, books.pool.in_flight) == (left, 0)


async def test_a_waiter_that_is_cancelled_in_the_step_that_wakes_it_wakes_the_next(
    books: Books,
) -> None:
    async with crowd(books) as waiting:
        async with books.dispatch.lease(books.attempt()):
            await fill(books)
            await waiting.come(3)
        waiting.tasks[0].cancel()
        assert await waiting.went.get() == 1


async def test_who_is_told_why_there_is_no_node_any_more_tells_the_others(books: Books) -> None:
    async with crowd(books) as waiting:
        async with books.dispatch.lease(books.attempt()):
            await fill(books)
            await waiting.come(5)
            books.pool.registry.drain("n1", draining=True)
        assert [await waiting.went.get() for _ in range(5)] == [Refusal.DRAINED] * 5


async def test_all_that_wait_look_again_when_there_may_be_other_nodes(books: Books) -> None:
    async with crowd(books) as waiting:
        await fill(books)
        await fill(books, OTHER)
        await waiting.come(3)
        books.dispatch.stir()
        await turns()
        assert (waiting.quiet, books.dispatch.waiting) == (True, 3)
        books.pool.registry.drain("n1", draining=True)
        books.dispatch.stir()
        books.dispatch.stir()
        assert [await waiting.went.get() for _ in range(3)] == [Refusal.DRAINED] * 3


async def test_the_number_that_waits_is_bounded_for_one_model_and_in_all(books: Books) -> None:
    async with crowd(books) as waiting, crowd(books) as others:
        for key in (KEY, OTHER):
            await fill(books, key)
        await waiting.come(1024)
        with pytest.raises(Refused, match=r"^busy$"):
            async with books.dispatch.lease(books.attempt(), inf):
                pytest.fail("the block must not be entered")
        assert books.dispatch.waiting == 1024
        await others.come(3, OTHER)
        for task in others.tasks:
            task.cancel()
        for task in waiting.tasks:
            task.cancel()
