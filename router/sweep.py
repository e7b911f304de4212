"""Limits on how long a node may be silent, with one timer for all connections."""

import asyncio
from collections.abc import Collection, Iterable
from functools import cached_property
from math import inf

from router.wire import Connection

# No limit at all, yet a moment from which the silence so far can be counted.
_ENDLESS_S = 1e9


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

    def limit(
        self,
        conn: Connection,
        limit_s: float | None,
        down_s: float | None = None,
        *,
        down: bool = False,
    ) -> None:
        """From now on, more than `limit_s` of silence ends the exchange on this connection, and
        more than `down_s` while its node is down."""
        if down_s is None:
            due = conn.limit(inf if limit_s is None else limit_s)
        else:
            due = conn.limit(_ENDLESS_S if limit_s is None else limit_s, down_s, down=down)
        if due < self._at:
            self._set(due)

    def doubt(self, connections: Iterable[Connection], *, down: bool) -> None:
        """The node of these connections fails its probes, or answers them again. Those that have
        been silent for too long already are cut at the loop's next turn."""
        due = min((conn.doubt(down=down) for conn in connections), default=inf)
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
