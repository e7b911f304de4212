"""What a node's scheduler moves about: a job, and the runner (one loaded model) it runs on."""

import enum
import math
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from router.sim.cache import PromptCache
from router.sim.models import SimModel, SimSpec


class Phase(enum.StrEnum):
    """Where a job stands. It only moves down this list, and ends in one of the last three."""

    NEW = "new"
    PENDING = "pending"  # needs a load: head of the load loop, or queued behind it
    WAITING = "waiting"  # has a runner, waits for a slot
    RUNNING = "running"
    DONE = "done"
    CANCELLED = "cancelled"
    REFUSED = "refused"  # the load queue was full


@dataclass(eq=False, slots=True)
class Job:
    """One request, and after its start the times it takes. Times are seconds on the caller's clock.

    `blocks` are the prompt's pieces of `SimSpec.block_tokens` tokens each (the unfinished last one
    left out), `keeps` the same with the answer behind it: what the prompt cache holds afterwards.
    `num_ctx` None means the node's default; `options` is whatever else forces a reload when it
    changes. `keep_alive_s` None leaves the runner's as it is, below 0 means for ever. A `load_only`
    job ends as soon as its runner is ready. `pace` multiplies every duration.
    """

    model: SimModel
    prompt_tokens: int = 0
    answer_tokens: int = 0
    blocks: Sequence[Hashable] = ()
    keeps: Sequence[Hashable] = ()
    num_ctx: int | None = None
    options: Hashable = ()
    keep_alive_s: float | None = None
    load_only: bool = False
    pace: float = 1.0

    phase: Phase = field(default=Phase.NEW, init=False)
    runner: "Runner | None" = field(default=None, init=False, repr=False)
    cached_tokens: int = field(default=0, init=False)
    arrived: float = field(default=math.nan, init=False)
    ready_at: float = field(default=math.nan, init=False)
    started: float = field(default=math.nan, init=False)
    first_token_at: float = field(default=math.nan, init=False)
    finish_at: float = field(default=math.nan, init=False)
    token_s: float = field(default=math.nan, init=False)

    def token_at(self, index: int) -> float:
        """When answer token `index` (from 0) is there. Only for a job that has started."""
        return self.first_token_at + index * self.token_s

    @property
    def ended(self) -> bool:
        """Nothing more will happen to it."""
        return self.phase in (Phase.DONE, Phase.CANCELLED, Phase.REFUSED)


class EventKind(enum.StrEnum):
    """What the scheduler tells."""

    LOADING = "loading"
    LOADED = "loaded"
    UNLOADED = "unloaded"
    STARTED = "started"
    DONE = "done"


class Event(NamedTuple):
    """Something happened at `at`. `job` is set for STARTED and DONE, and for a load's starter."""

    kind: EventKind
    at: float
    model: SimModel
    job: Job | None = None


class Resident(NamedTuple):
    """A loaded model, as `/api/ps` tells it. `expires_at` may be infinite."""

    model: SimModel
    num_ctx: int
    reserved_bytes: int
    expires_at: float
    in_flight: int


class Runner:
    """One model in memory, or on its way there (`loaded_at` still to come and `loading` true)."""

    def __init__(self, spec: SimSpec, job: Job) -> None:
        self.model = job.model
        self.num_ctx = spec.num_ctx(job.model, job.num_ctx)
        self.options = job.options
        self.slots = spec.slots(job.model)
        self.reserved_bytes = spec.reserved_bytes(job.model, self.num_ctx)
        self.cache = PromptCache(spec.cache_tokens // spec.block_tokens)
        self.keep_alive_s = math.inf
        self.keep(spec.keep_alive_s if job.keep_alive_s is None else job.keep_alive_s)
        self.loading = True
        self.leaving = False
        self.loaded_at = math.nan
        self.expires_at: float | None = None
        self.running: set[Job] = set()
        self.waiting: deque[Job] = deque()

    def __repr__(self) -> str:
        """State in one line."""
        state = "loading" if self.loading else "leaving" if self.leaving else "loaded"
        return (
            f"<{self.model.name} ctx={self.num_ctx} {state}"
            f" running={len(self.running)} waiting={len(self.waiting)}>"
        )

    def keep(self, keep_alive_s: float | None) -> None:
        """Overwrite the keep_alive; None leaves it."""
        if keep_alive_s is not None:
            self.keep_alive_s = math.inf if keep_alive_s < 0 else keep_alive_s

    @property
    def in_flight(self) -> int:
        """Jobs that run or wait here."""
        return len(self.running) + len(self.waiting)

    @property
    def idle(self) -> bool:
        """Loaded, with nothing to do."""
        return not self.loading and not self.running and not self.waiting

    @property
    def rank(self) -> tuple[bool, float, str]:
        """The order of eviction: idle first, then the shortest keep_alive, then the name."""
        return (not self.idle, 0.0 if self.leaving else self.keep_alive_s, self.model.name)

    def serves(self, num_ctx: int, options: Hashable) -> bool:
        """A job with these settings needs no reload."""
        return not self.loading and (self.num_ctx, self.options) == (num_ctx, options)
