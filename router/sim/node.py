"""The scheduler of one Ollama node, as a synchronous model in the caller's time.

A job whose model is loaded with the same options goes straight to that runner and waits there for
a slot, first come first served and without bound. Every other job goes through one load loop: its
head makes room, loads, and holds up all that is pending behind it; past `max_queue` pending jobs
the rest is refused. Nothing here waits or looks at a clock: the caller passes `now`, asks
`next_at()` when to come back, and reads what happened from `advance(now)`.
"""

import enum
import heapq
import math
from collections import Counter, deque
from typing import NamedTuple, assert_never

from router.sim.models import SimModel, SimSpec
from router.sim.runner import Event, EventKind, Job, Phase, Resident, Runner


class _What(enum.IntEnum):
    """A moment the scheduler has to come back at. Equal times are served in this order."""

    FINISH = 0
    LOADED = 1
    EXPIRE = 2


class _Tick(NamedTuple):
    at: float
    what: _What
    order: int
    runner: Runner
    job: Job | None


class Scheduler:
    """Slots, loads, evictions and keep_alive of one node.

    `pace` multiplies the durations of all that starts from now on. Counters only grow: `loads`
    (begun), `aborted_loads`, `evictions` (unloaded to make room), `refused`, and the most that was
    ever in flight at once: `peak_in_flight`, and `peaks` of each model.
    """

    def __init__(self, spec: SimSpec, now: float = 0.0) -> None:
        """`spec.warm` is loaded at `now`. Raises KeyError for a warm name that is no model."""
        self.spec = spec
        self.pace = 1.0
        self.in_flight = 0
        self.peak_in_flight = 0
        self.peaks: Counter[str] = Counter()
        self.loads = 0
        self.aborted_loads = 0
        self.evictions = 0
        self.refused = 0
        self._by_model: Counter[str] = Counter()
        self._runners: dict[str, Runner] = {}
        self._head: Job | None = None
        self._pending: deque[Job] = deque()
        self._ticks: list[_Tick] = []
        self._order = 0
        self._events: list[Event] = []
        self._freed = False
        names = {model.name: model for model in spec.models}
        for name in spec.warm:
            self._preload(names[name if ":" in name else f"{name}:latest"], now)

    def __repr__(self) -> str:
        """State in one line."""
        head = self._head.model.name if self._head else "-"
        runners = list(self._runners.values())
        return f"<Scheduler head={head} pending={len(self._pending)} {runners}>"

    @property
    def pending(self) -> int:
        """Jobs that wait for a load, the one at the head included."""
        return len(self._pending) + (self._head is not None)

    def submit(self, job: Job, now: float) -> bool:
        """Take a new job in; False when the load queue is full. What follows is told by events."""
        self._run_until(now)
        job.arrived = now
        runner = self._runners.get(job.model.weights)
        bypasses = runner is not None and self._serves(runner, job)
        if not bypasses and self._head is not None and len(self._pending) >= self.spec.max_queue:
            job.phase = Phase.REFUSED
            self.refused += 1
            return False
        self._count(job)
        if runner is not None and bypasses:
            self._give(job, runner, now)
        else:
            job.phase = Phase.PENDING
            self._pending.append(job)
        self._serve_loads(now)
        return True

    def cancel(self, job: Job, now: float) -> None:
        """The job's client has left. A job that ended already is left as it is."""
        self._run_until(now)
        if job.phase is Phase.PENDING:
            self._withdraw(job, now)
        elif job.phase is Phase.WAITING and job.runner is not None:
            job.runner.waiting.remove(job)
        elif job.phase is Phase.RUNNING and job.runner is not None:
            if now >= job.first_token_at:
                job.runner.cache.remember(job.blocks)
            self._vacate(job, job.runner, now)
        else:
            return
        self._end(job, Phase.CANCELLED)
        self._serve_loads(now)

    def unload(self, model: SimModel, now: float) -> None:
        """Unload a model as soon as it is idle. Nothing happens when it is not loaded."""
        self._run_until(now)
        runner = self._runners.get(model.weights)
        if runner is not None:
            runner.leaving = True
            self._rest(runner, now)
            self._serve_loads(now)

    def advance(self, now: float) -> list[Event]:
        """All that happened up to `now` since the last call, oldest first."""
        self._run_until(now)
        events, self._events = self._events, []
        return events

    def next_at(self) -> float | None:
        """When `advance` has something new to tell if nobody interferes; None: never.

        A moment in the past means that events wait to be read.
        """
        if self._events:
            return self._events[0].at
        while self._ticks and not self._holds(self._ticks[0]):
            heapq.heappop(self._ticks)
        return self._ticks[0].at if self._ticks else None

    def resident(self, now: float) -> list[Resident]:
        """Loaded models, the longest to stay first. One that still loads is not among them."""
        self._run_until(now)
        found = [
            Resident(
                runner.model,
                runner.num_ctx,
                runner.reserved_bytes,
                now + runner.keep_alive_s if runner.expires_at is None else runner.expires_at,
                runner.in_flight,
            )
            for runner in self._runners.values()
            if not runner.loading
        ]
        return sorted(found, key=lambda one: (-one.expires_at, one.model.name))

    def _preload(self, model: SimModel, now: float) -> None:
        runner = Runner(self.spec, Job(model))
        runner.loading = False
        runner.loaded_at = now
        self._runners[model.weights] = runner
        self._rest(runner, now)

    def _run_until(self, now: float) -> None:
        while self._ticks and self._ticks[0].at <= now:
            tick = heapq.heappop(self._ticks)
            if self._holds(tick):
                self._on_tick(tick)
                self._serve_loads(tick.at)

    def _on_tick(self, tick: _Tick) -> None:
        match tick.what:
            case _What.FINISH:
                assert tick.job is not None
                tick.runner.cache.remember(tick.job.keeps or tick.job.blocks)
                self._end(tick.job, Phase.DONE)
                self._tell(EventKind.DONE, tick.at, tick.job.model, tick.job)
                self._vacate(tick.job, tick.runner, tick.at)
            case _What.LOADED:
                self._on_loaded(tick.runner, tick.at)
            case _What.EXPIRE:
                self._remove(tick.runner, tick.at)
            case _:
                assert_never(tick.what)

    def _holds(self, tick: _Tick) -> bool:
        """The moment has not been overtaken by a cancel, a new request or an unload."""
        if tick.what is _What.FINISH:
            return tick.job is not None and tick.job.phase is Phase.RUNNING
        if self._runners.get(tick.runner.model.weights) is not tick.runner:
            return False
        if tick.what is _What.LOADED:
            return tick.runner.loading
        return tick.runner.idle and tick.runner.expires_at == tick.at

    def _push(self, at: float, what: _What, runner: Runner, job: Job | None = None) -> None:
        self._order += 1
        heapq.heappush(self._ticks, _Tick(at, what, self._order, runner, job))

    def _tell(self, kind: EventKind, at: float, model: SimModel, job: Job | None = None) -> None:
        self._events.append(Event(kind, at, model, job))

    def _serves(self, runner: Runner, job: Job) -> bool:
        return runner.serves(self.spec.num_ctx(job.model, job.num_ctx), job.options)

    def _serve_loads(self, now: float) -> None:
        """Take heads off the load loop until one has to wait.

        A waiting head looks again only when something was unloaded, as in Ollama: another victim
        that becomes idle meanwhile does not help it.
        """
        while self._freed or self._head is None:
            self._freed = False
            if self._head is None:
                if not self._pending:
                    return
                self._head = self._pending.popleft()
            if self._try_head(self._head, now):
                self._head = None

    def _try_head(self, job: Job, now: float) -> bool:
        """True when the head has its runner; else it waits for a load or for a victim."""
        runner = self._runners.get(job.model.weights)
        if runner is not None:
            if runner.loading:
                return False
            if self._serves(runner, job):
                self._give(job, runner, now)
                return True
            runner.leaving = True
            if not runner.idle:
                return False
            self._remove(runner, now)
        if self._make_room(job, now):
            self._load(job, now)
        return False

    def _make_room(self, job: Job, now: float) -> bool:
        """Evict until the job's model fits; False while the next victim is busy."""
        need = self.spec.reserved_bytes(job.model, self.spec.num_ctx(job.model, job.num_ctx))
        while not self._fits(need):
            victim = min(self._runners.values(), key=lambda runner: runner.rank)
            victim.leaving = True
            if not victim.idle:
                return False
            self._remove(victim, now)
            self.evictions += 1
        self._freed = False
        return True

    def _fits(self, need_bytes: int) -> bool:
        """A model that is too large for the whole node is loaded alone (partly in main memory)."""
        if not self._runners:
            return True
        if len(self._runners) >= self.spec.max_loaded:
            return False
        used = sum(runner.reserved_bytes for runner in self._runners.values())
        return used + need_bytes <= self.spec.memory_bytes

    def _load(self, job: Job, now: float) -> None:
        runner = Runner(self.spec, job)
        runner.loaded_at = now + job.model.load_s * job.pace * self.pace
        self._runners[job.model.weights] = runner
        job.runner = runner
        self.loads += 1
        self._tell(EventKind.LOADING, now, job.model, job)
        self._push(runner.loaded_at, _What.LOADED, runner)

    def _on_loaded(self, runner: Runner, now: float) -> None:
        starter, self._head = self._head, None
        runner.loading = False
        self._tell(EventKind.LOADED, now, runner.model, starter)
        assert starter is not None
        self._give(starter, runner, now)

    def _withdraw(self, job: Job, now: float) -> None:
        """Drop a job from the load loop; the load it began is aborted with it."""
        if job is not self._head:
            self._pending.remove(job)
            return
        self._head = None
        if job.runner is not None:
            self.aborted_loads += 1
            self._remove(job.runner, now)

    def _give(self, job: Job, runner: Runner, now: float) -> None:
        job.ready_at = now
        runner.keep(job.keep_alive_s)
        if job.load_only:
            self._end(job, Phase.DONE)
            self._tell(EventKind.DONE, now, job.model, job)
            self._rest(runner, now)
            return
        job.runner = runner
        job.phase = Phase.WAITING
        runner.waiting.append(job)
        self._fill(runner, now)

    def _fill(self, runner: Runner, now: float) -> None:
        while runner.waiting and len(runner.running) < runner.slots:
            self._start(runner.waiting.popleft(), runner, now)

    def _start(self, job: Job, runner: Runner, now: float) -> None:
        pace = self.pace * job.pace * self._shared(runner)
        known = runner.cache.common(job.blocks) * self.spec.block_tokens
        # The last token of a prompt is always evaluated: its result is the first answer token.
        job.cached_tokens = min(known, max(job.prompt_tokens - 1, 0))
        fresh = job.prompt_tokens - job.cached_tokens
        job.phase = Phase.RUNNING
        job.started = now
        job.first_token_at = now + fresh / job.model.prefill_tps * pace
        job.token_s = pace / job.model.decode_tps
        job.finish_at = job.first_token_at + job.answer_tokens * job.token_s
        runner.running.add(job)
        self._tell(EventKind.STARTED, now, job.model, job)
        self._push(job.finish_at, _What.FINISH, runner, job)

    def _shared(self, runner: Runner) -> float:
        """How much slower a job is for the other models that are busy when it starts."""
        others = sum(1 for one in self._runners.values() if one.running and one is not runner)
        gpus = self.spec.gpus
        return 1 + self.spec.contention * max(0, others + 1 - gpus) / gpus

    def _vacate(self, job: Job, runner: Runner, now: float) -> None:
        runner.running.discard(job)
        self._fill(runner, now)
        self._rest(runner, now)

    def _rest(self, runner: Runner, now: float) -> None:
        """If the runner is idle, start its keep_alive timer, or unload it when that has no time."""
        if not runner.idle:
            return
        if runner.leaving or runner.keep_alive_s <= 0:
            self._remove(runner, now)
            return
        runner.expires_at = now + runner.keep_alive_s
        if runner.expires_at < math.inf:
            self._push(runner.expires_at, _What.EXPIRE, runner)

    def _remove(self, runner: Runner, now: float) -> None:
        del self._runners[runner.model.weights]
        self._freed = True
        self._tell(EventKind.UNLOADED, now, runner.model)

    def _count(self, job: Job) -> None:
        name = job.model.name
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        self._by_model[name] += 1
        self.peaks[name] = max(self.peaks[name], self._by_model[name])

    def _end(self, job: Job, phase: Phase) -> None:
        job.phase = phase
        job.runner = None
        self.in_flight -= 1
        self._by_model[job.model.name] -= 1
