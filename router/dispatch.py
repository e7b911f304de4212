"""The async face of the pool: a verdict becomes a context that holds the lease."""

import time
from collections.abc import Callable
from types import TracebackType

from router.core.pool import Attempt, Lease, Pool
from router.core.types import Flip, Outcome, Rejected
from router.errors import UpstreamError

Clock = Callable[[], float]
_ENDED = Outcome()


class Refused(Exception):
    """The pool gave no lease; `model` is the name that was asked for, without its pin."""

    def __init__(self, rejected: Rejected, model: str = "") -> None:
        super().__init__(rejected.refusal.value)
        self.rejected = rejected
        self.model = model


class Dispatch:
    """Gives leases. `on_flip` is told of a node whose health real traffic changed."""

    def __init__(
        self, pool: Pool, on_flip: Callable[[Flip], None], clock: Clock = time.monotonic
    ) -> None:
        self.pool = pool
        self.on_flip = on_flip
        self.clock = clock

    def lease(self, attempt: Attempt) -> "_Held":
        """`async with` it: a Lease inside, given back however the block is left.

        Raises Refused where the pool gives none.
        """
        return _Held(self, attempt)


class _Held:
    __slots__ = ("_attempt", "_dispatch")

    def __init__(self, dispatch: Dispatch, attempt: Attempt) -> None:
        self._dispatch = dispatch
        self._attempt = attempt

    async def __aenter__(self) -> Lease:
        verdict = self._dispatch.pool.submit(self._attempt)
        if isinstance(verdict, Rejected):
            raise Refused(verdict)
        return verdict

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        outcome = Outcome(exc.failure) if isinstance(exc, UpstreamError) else _ENDED
        flip = self._dispatch.pool.leave(self._attempt, outcome, self._dispatch.clock())
        if flip is not None:
            self._dispatch.on_flip(flip)
