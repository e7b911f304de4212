"""The async face of the pool: a verdict becomes a context that holds the lease."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from math import inf
from types import TracebackType

from router.core.pool import Attempt, Lease, Pool
from router.core.types import Failure, Flip, NodeSpec, Outcome, Rejected
from router.errors import UpstreamError

Clock = Callable[[], float]
_ENDED, _UNTOLD = Outcome(), Outcome(told=False)
_WAITING_MAX = 2048
_ALIKE_MAX = 1024  # for one model, so that others can wait too


class Refused(Exception):
    """The pool gave no lease; `model` is the name that was asked for, without its pin."""

    def __init__(self, rejected: Rejected, model: str = "") -> None:
        super().__init__(rejected.refusal.value)
        self.rejected = rejected
        self.model = model


class Dispatch:
    """Gives leases. `on_flip` is told of what real traffic changed about a node, `on_failure` of
    each failure."""

    def __init__(
        self,
        pool: Pool,
        on_flip: Callable[[Flip], None],
        clock: Clock = time.monotonic,
        on_failure: Callable[[NodeSpec, Failure], None] = lambda node, failure: None,
    ) -> None:
        self.pool = pool
        self.on_flip = on_flip
        self.on_failure = on_failure
        self.clock = clock
        self.waiting = 0
        self._waiters: dict[str, deque[asyncio.Future[None]]] = {}

    def lease(self, attempt: Attempt, deadline: float = -inf) -> "Held":
        """`async with` it: a Lease inside, given back however the block is left.

        Where all nodes are full for now, it waits for room up to the deadline (of the clock).
        Raises Refused where the pool gives none.
        """
        return Held(self, attempt, deadline)

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

    def stir(self) -> None:
        """There may be other nodes to ask: all that wait look again."""
        for queue in self._waiters.values():
            for waiter in queue:
                if not waiter.done():
                    waiter.set_result(None)


class Held:
    """The lease of one attempt. `outcome`: how it ended, where that is no exception."""

    __slots__ = ("_attempt", "_deadline", "_dispatch", "_lease", "outcome")

    def __init__(self, dispatch: Dispatch, attempt: Attempt, deadline: float) -> None:
        self.outcome: Outcome | None = None
        self._dispatch = dispatch
        self._attempt = attempt
        self._deadline = deadline
        self._lease: Lease | None = None

    async def __aenter__(self) -> Lease:
        dispatch = self._dispatch
        while True:
            verdict = dispatch.pool.submit(self._attempt, dispatch.clock())
            if isinstance(verdict, Lease):
                break
            if verdict.until is None:
                dispatch.wake(self._key)  # it may have waited: the others need not any more
                raise Refused(verdict)
            if not await dispatch.room(self._key, verdict.until, self._deadline):
                raise Refused(verdict)
        self._lease = verdict
        for flip in verdict.flips:
            dispatch.on_flip(flip)
        return verdict

    @property
    def _key(self) -> str:
        model = self._attempt.target.model
        return "" if model is None else model.key

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
        if outcome.failure is not None and self._lease is not None:
            dispatch.on_failure(self._lease.node, outcome.failure)
