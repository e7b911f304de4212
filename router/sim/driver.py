"""The scheduler in real time: its events wake the requests that wait for them."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from router.sim.models import SimModel
from router.sim.node import Scheduler
from router.sim.runner import EventKind, Job, Resident

# A timer shorter than this costs more than it is worth: a due time so near counts as past.
_NEAR_S = 0.0005


class Busy(Exception):
    """The node's load queue is full."""


class Driver:
    """Runs a scheduler on the event loop's clock with one timer and no task of its own."""

    def __init__(self, scheduler: Scheduler, changed: Callable[[], None]) -> None:
        """`changed` is called after everything that may have changed what `scheduler` tells."""
        self.scheduler = scheduler
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._starts: dict[Job, asyncio.Event] = {}
        self._ends: dict[Job, asyncio.Event] = {}
        self._wake()

    @contextmanager
    def running(self, job: Job) -> Iterator[None]:
        """Have `job` in the scheduler inside the block; leaving early cancels it.

        Raises Busy when the node refuses it.
        """
        self._starts[job] = asyncio.Event()
        self._ends[job] = asyncio.Event()
        try:
            if not self.scheduler.submit(job, self._loop.time()):
                raise Busy
            self._wake()
            yield
        finally:
            del self._starts[job], self._ends[job]
            self.scheduler.cancel(job, self._loop.time())
            self._wake()

    async def started(self, job: Job) -> None:
        """Wait until `job` has a slot."""
        await self._starts[job].wait()

    async def ended(self, job: Job) -> None:
        """Wait until `job` is over."""
        await self._ends[job].wait()

    async def until(self, due: float) -> None:
        """Wait for a moment on the loop's clock. Lets other tasks run even if it is past."""
        left = due - self._loop.time()
        await asyncio.sleep(left if left > _NEAR_S else 0)

    def unload(self, model: SimModel) -> None:
        """Unload a model as soon as it is idle."""
        self.scheduler.unload(model, self._loop.time())
        self._wake()

    def resident(self) -> list[tuple[Resident, float]]:
        """What is loaded, each with the seconds it has left."""
        now = self._loop.time()
        found = self.scheduler.resident(now)
        self._wake()
        return [(one, one.expires_at - now) for one in found]

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wake(self) -> None:
        for event in self.scheduler.advance(self._loop.time()):
            if event.job is None:
                continue
            if event.kind is EventKind.STARTED and event.job in self._starts:
                self._starts[event.job].set()
            elif event.kind is EventKind.DONE and event.job in self._ends:
                self._ends[event.job].set()
        self.close()
        due = self.scheduler.next_at()
        if due is not None:
            self._timer = self._loop.call_at(due, self._wake)
        self._changed()
