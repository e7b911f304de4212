"""The async face of the pool: whatever happens to the task that asks, the books balance."""

import asyncio
from collections.abc import Callable

import pytest

from router.core.names import parse
from router.core.policy import Target
from router.core.pool import Attempt, Lease, Pool
from router.core.types import (
    Failure,
    FailureKind,
    Flip,
    Health,
    Model,
    NodeSpec,
    Observation,
    PoolSpec,
    Refusal,
    Sign,
    Topology,
)
from router.dispatch import Dispatch, Refused
from router.errors import UpstreamError

KEY = "llama3:8b"
NODE = NodeSpec("n1", "http://n1:11434", "http", "n1", 11434)


class Books:
    """A pool of one node, and the flips that its dispatch has told."""

    def __init__(self) -> None:
        self.flips: list[Flip] = []
        self.pool = Pool(Topology((PoolSpec("default", (NODE,)),)), 0.0)
        seen = Observation(Sign.GOOD, "0.33.0", present={KEY: Model(KEY, "", {})})
        self.pool.observe(NODE.url, seen, 0.0)
        self.dispatch = Dispatch(self.pool, self.flips.append, lambda: 7.0)

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
