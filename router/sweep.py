"""Limits on how long a node may be silent, with one timer for all connections."""

import asyncio
from collections.abc import Collection
from functools import cached_property
from math import inf

from router.wire import Connection


class Sweep:
    """Cuts off those of `connections` whose node has been silent for too long.

    A node that speaks moves its deadline back, which is one assignment: the timer stays, finds
    nothing when it rings, and is set to the earliest deadline that there is by then.
    """

    def __init__(self, connections: Collection[Connection]) -> None:
        self._connections = connections
        self._at = inf
        self._timer: asyncio.TimerHandle | None = None

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        # Asking asyncio each time is a system call, before Python 3.12.
        return asyncio.get_running_loop()

    def limit(self, conn: Connection, limit_s: float | None) -> None:
        """From now on, more than `limit_s` of silence ends the exchange on this connection."""
        due = conn.limit(inf if limit_s is None else limit_s)
        if due < self._at:
            self._set(due)

    def _set(self, at: float) -> None:
        self.stop()
        self._at = at
        if at < inf:
            self._timer = self._loop.call_at(at, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        self._set(min((conn.overdue(now) for conn in tuple(self._connections)), default=inf))

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
