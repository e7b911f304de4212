"""The async face of the pool: a verdict becomes a context that holds the lease."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from math import inf
from types import TracebackType

import msgspec

from router.core.lease import Lease, Lost, Queued
from router.core.policy import Attempt
from router.core.pool import AGAIN_S, Pool
from router.core.types import Failure, Flip, NodeSpec, Outcome, Reason, Refusal, Rejected
from router.errors import UpstreamError

Clock = Callable[[], float]
_ENDED, _UNTOLD = Outcome(), Outcome(told=False)
_WAITING_MAX = 2048
_ALIKE_MAX = 1024  # for one model, so that others can wait too
_DECISIONS_MAX = 256  # that are remembered


class Refused(Exception):
    """The pool gave no lease; `model` is the name that was asked for, without its pin."""

    def __init__(self, rejected: Rejected, model: str = "") -> None:
        super().__init__(rejected.refusal.value)
        self.rejected = rejected
        self.model = model


class Decision(msgspec.Struct, frozen=True, gc=False):
    """A node that was given to a request, at `at` (of the clock). `expected_s`: in how many seconds
    from then on its answer was expected to begin, where that was told."""

    at: float
    request: str
    flow: str
    model: str
    node: str
    reason: Reason
    waited_s: float
    expected_s: float | None = None


class Dispatch:
    """Gives leases. `on_flip` is told of what real traffic changed about a node, `on_failure` of
    each failure, `on_wait` of each wait for a turn that has ended with a node; `on_load` gets the
    url of a node that should be asked at once what is in its memory."""

    def __init__(
        self,
        pool: Pool,
        on_flip: Callable[[Flip], None],
        clock: Clock = time.monotonic,
        on_failure: Callable[[NodeSpec, Failure], None] = lambda node, failure: None,
        on_wait: Callable[[Queued, float], None] = lambda queued, waited_s: None,
        on_load: Callable[[str], None] = lambda url: None,
    ) -> None:
        self.pool = pool
        self.on_flip = on_flip
        self.on_failure = on_failure
        self.on_wait = on_wait
        self.on_load = on_load
        self.clock = clock
        self.waiting = 0
        self._waiters: dict[str, deque[asyncio.Future[None]]] = {}
        self._queued: dict[Attempt, asyncio.Future[Lease | Lost]] = {}
        self._again: asyncio.TimerHandle | None = None
        self.decisions: deque[Decision] = deque(maxlen=_DECISIONS_MAX)

    def lease(self, attempt: Attempt, deadline: float = -inf, request: str = "") -> "Held":
        """`async with` it: a Lease inside, given back however the block is left.

        Where all nodes are full for now, it waits for room up to the deadline (of the clock).
        `request`: its id, for who asks for decisions. Raises Refused where the pool gives none.
        """
        return Held(self, attempt, deadline, request)

    async def room(self, key: str, until: float, deadline: float) -> bool:
        """Wait until a full node may have room for a model; says whether it is worth asking."""
        now = self.clock()
        many = len(self._waiters.get(key, ())) >= _ALIKE_MAX
        if now >= deadline or self.waiting >= _WAITING_MAX or many:
            return False
        waiter = asyncio.get_running_loop().create_future()
        queue = self._waiters.setdefault(key, deque())
        queue.append(waiter)
        self.waiting += 1
        try:
            async with asyncio.timeout(max(0.0, min(until, deadline) - now)):
                await waiter
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            if not waiter.cancelled():
                self.wake(key)  # it was woken, and leaves: the room is another one's
            raise
        finally:
            self.waiting -= 1
            queue.remove(waiter)
            if not queue:
                self._waiters.pop(key, None)
        return True

    def wake(self, key: str) -> None:
        """A request for this model has ended: the one that has waited longest may ask again."""
        for waiter in self._waiters.get(key, ()):
            if not waiter.done():
                waiter.set_result(None)
                return

    async def turn(self, queued: Queued, deadline: float) -> Lease:
        """Wait until the pool gives a queued attempt a node. Raises Refused."""
        attempt, began = queued.attempt, self.clock()
        waiter: asyncio.Future[Lease | Lost] = asyncio.get_running_loop().create_future()
        self._queued[attempt] = waiter
        self.settle()
        try:
            async with asyncio.timeout(max(0.0, deadline - began)):
                given = await waiter
        except TimeoutError:
            self.pool.leave(attempt, _UNTOLD, self.clock())
            raise Refused(Rejected(Refusal.LATE, after_s=self.clock() - began)) from None
        except asyncio.CancelledError:
            self.pool.leave(attempt, _UNTOLD, self.clock())  # whether it had got one or not
            raise
        finally:
            del self._queued[attempt]
            self.settle()
        if isinstance(given, Lost):
            raise Refused(given.rejected)
        self.on_wait(queued, self.clock() - began)
        return given

    def began(self, attempt: Attempt) -> None:
        """The first record of an answer is there."""
        loaded = self.pool.began(attempt, self.clock())
        if loaded:
            self.on_load(loaded)
        if self.pool.waiters:
            self.settle()

    def settle(self) -> None:
        """Tell those that have got a node; to be called after all that the pool was told."""
        pool = self.pool
        if not self._queued and not pool.waiters:
            return
        for given in pool.granted(self.clock()):
            waiter = self._queued.get(given.attempt)
            if waiter is not None and not waiter.done():
                waiter.set_result(given)
            else:
                pool.leave(given.attempt, _UNTOLD, self.clock())
        if pool.waiters and self._again is None:
            self._again = asyncio.get_running_loop().call_later(AGAIN_S, self._look_again)

    def _look_again(self) -> None:
        self._again = None
        self.settle()

    def stir(self) -> None:
        """There may be other nodes to ask: all that wait look again."""
        self.settle()
        for queue in self._waiters.values():
            for waiter in queue:
                if not waiter.done():
                    waiter.set_result(None)


class Held:
    """The lease of one attempt. `outcome`: how it ended, where that is no exception; `waited_s`:
    how long there was none to be had."""

    __slots__ = (
        "_attempt", "_deadline", "_dispatch", "_key", "_lease", "_request", "outcome", "waited_s",
    )  # fmt: skip

    def __init__(self, dispatch: Dispatch, attempt: Attempt, deadline: float, request: str) -> None:
        self.outcome: Outcome | None = None
        self.waited_s = 0.0
        self._dispatch = dispatch
        self._attempt = attempt
        self._key = "" if attempt.target.model is None else attempt.target.model.key
        self._deadline = deadline
        self._request = request
        self._lease: Lease | None = None

    async def __aenter__(self) -> Lease:
        dispatch = self._dispatch
        came = now = dispatch.clock()
        while True:
            verdict = dispatch.pool.submit(self._attempt, now)
            if isinstance(verdict, Queued):
                verdict = await dispatch.turn(verdict, self._deadline)
                now = dispatch.clock()
            if isinstance(verdict, Lease):
                break
            if verdict.until is None:
                dispatch.wake(self._key)  # it may have waited: the others need not any more
                raise Refused(verdict)
            if not await dispatch.room(self._key, verdict.until, self._deadline):
                raise Refused(verdict)
            now = dispatch.clock()
        self._lease, self.waited_s = verdict, now - came
        dispatch.decisions.append(
            Decision(
                now, self._request, self._attempt.work.flow, self._key, verdict.node.name,
                verdict.reason, self.waited_s, verdict.expected_s,
            )
        )  # fmt: skip
        for flip in verdict.flips:
            dispatch.on_flip(flip)
        return verdict

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        dispatch, outcome = self._dispatch, self.outcome
        if outcome is None:
            if exc is None:
                outcome = _ENDED
            else:
                outcome = Outcome(exc.failure) if isinstance(exc, UpstreamError) else _UNTOLD
        for flip in dispatch.pool.leave(self._attempt, outcome, dispatch.clock()):
            dispatch.on_flip(flip)
        if dispatch.waiting:
            dispatch.wake(self._key)
        if dispatch.pool.waiters:
            dispatch.settle()
        if outcome.failure is not None and self._lease is not None:
            dispatch.on_failure(self._lease.node, outcome.failure)
