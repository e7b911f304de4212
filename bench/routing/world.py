"""The event loop in virtual time: arrivals, nodes, their `/api/ps`, and the router between."""

import enum
import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple, assert_never

from bench.routing.routers import Ask, Final, Loaded, Router
from bench.routing.scenario import Change
from bench.routing.workload import Request
from router.sim.models import SimModel, SimSpec
from router.sim.node import Scheduler
from router.sim.runner import Event, EventKind, Job, Resident

_POLL_S = 2.0
_SHORTEST_SLEEP_S = 0.001
# A router that leaves requests lying is not waited for longer than this after the last arrival.
PATIENCE_S = 4 * 3600.0


class _What(enum.IntEnum):
    """Why the loop comes back. Equal times are served in this order."""

    CHANGE = 0
    NODE = 1
    FIRST = 2
    POLL = 3
    ARRIVE = 4
    WAKE = 5


class _Tick(NamedTuple):
    at: float
    what: _What
    order: int
    node: int = -1
    number: int = -1
    pace: float = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request fared. Seconds since its arrival, None if that never came; `node` is None
    for one that was never sent. `loaded_s` is the time that the node spent on making its model
    ready, which is 0 for a warm one."""

    request: Request
    node: int | None = None
    first_s: float | None = None
    total_s: float | None = None
    loaded_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """One trace through one router. `router_s` is the wall time that the router took in all."""

    outcomes: Sequence[Outcome]
    loads: int
    evictions: int
    seconds: float
    decisions: int
    router_s: float


class World:
    """One run. Everything that a router learns, it learns by the calls of `Router`."""

    def __init__(
        self,
        specs: Sequence[SimSpec],
        router: Router,
        requests: Sequence[Request],
        changes: Iterable[Change] = (),
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._patience_s = patience_s
        self._nodes = [Scheduler(spec) for spec in specs]
        self._models = [{one.name: one for one in spec.models} for spec in specs]
        self._router = router
        self._requests = requests
        self._outcomes: list[Outcome] = [Outcome(one) for one in requests]
        self._open = len(requests)
        self._asks: dict[Job, Ask] = {}
        self._due: list[float] = [math.inf] * len(specs)
        self._wake = math.inf
        self._ticks: list[_Tick] = []
        self._order = 0
        self._decisions = 0
        self._router_s = 0.0
        for place, one in enumerate(requests):
            self._push(one.ask.at, _What.ARRIVE, number=place)
        for node in range(len(specs)):
            self._push(_POLL_S * (node + 1) / len(specs), _What.POLL, node)
        for change in changes:
            self._push(change.at, _What.CHANGE, change.node, pace=change.pace)

    def run(self) -> Run:
        """Until every request has ended or was refused, or patience has."""
        end = self._requests[-1].ask.at
        while self._open and self._ticks[0].at < end + self._patience_s:
            self._serve(heapq.heappop(self._ticks))
        return Run(
            self._outcomes,
            sum(node.loads for node in self._nodes),
            sum(node.evictions for node in self._nodes),
            end - self._requests[0].ask.at,
            self._decisions,
            self._router_s,
        )

    def _serve(self, tick: _Tick) -> None:
        now = tick.at
        match tick.what:
            case _What.CHANGE:
                self._nodes[tick.node].pace = tick.pace
                return
            case _What.NODE:
                if self._due[tick.node] != now:
                    return
                self._advance(tick.node, now)
            case _What.FIRST:
                self._tell_first(tick.node, tick.number, now)
            case _What.POLL:
                self._poll(tick.node, now)
            case _What.ARRIVE:
                self._arrive(tick.number, now)
            case _What.WAKE:
                if self._wake != now:
                    return
                self._wake = math.inf
            case _:
                assert_never(tick.what)
        self._ask_router(now)

    def _push(
        self, at: float, what: _What, node: int = -1, number: int = -1, pace: float = 1.0
    ) -> None:
        self._order += 1
        heapq.heappush(self._ticks, _Tick(at, what, self._order, node, number, pace))

    def _arrive(self, number: int, now: float) -> None:
        started = perf_counter()
        self._router.arrive(self._requests[number].ask, now)
        self._router_s += perf_counter() - started

    def _tell_first(self, node: int, number: int, now: float) -> None:
        request = self._requests[number]
        self._outcomes[number] = Outcome(request, node, now - request.ask.at)
        started = perf_counter()
        self._router.first(request.ask, now)
        self._router_s += perf_counter() - started

    def _poll(self, node: int, now: float) -> None:
        loaded = [_told(one, now) for one in self._nodes[node].resident(now)]
        started = perf_counter()
        self._router.looked(node, loaded, now)
        self._router_s += perf_counter() - started
        self._push(now + _POLL_S, _What.POLL, node)
        self._watch(node, now)

    def _ask_router(self, now: float) -> None:
        """Send what the router wants sent, until it wants nothing more."""
        started = perf_counter()
        while decisions := self._router.take(now):
            self._router_s += perf_counter() - started
            self._decisions += len(decisions)
            for decision in decisions:
                self._send(decision.ask, decision.node, now)
            started = perf_counter()
        wake = self._router.wake_at()
        self._router_s += perf_counter() - started
        if wake is not None and wake != self._wake:
            self._wake = max(wake, now + _SHORTEST_SLEEP_S)
            self._push(self._wake, _What.WAKE)

    def _send(self, ask: Ask, node: int | None, now: float) -> None:
        if node is None:
            self._open -= 1
            return
        job = _job(self._models[node][ask.model], self._requests[ask.number], self._nodes[node])
        if not self._nodes[node].submit(job, now):
            self._open -= 1
            self._router.ended(ask, Final(), now)
            return
        self._asks[job] = ask
        self._watch(node, now)

    def _watch(self, node: int, now: float) -> None:
        """Come back when the node has something to tell."""
        due = self._nodes[node].next_at()
        if due is not None and due != self._due[node]:
            self._due[node] = max(due, now)
            self._push(self._due[node], _What.NODE, node)

    def _advance(self, node: int, now: float) -> None:
        self._due[node] = math.inf
        for event in self._nodes[node].advance(now):
            self._on_event(node, event, now)
        self._watch(node, now)

    def _on_event(self, node: int, event: Event, now: float) -> None:
        job = event.job
        if job is None:
            return
        if event.kind is EventKind.STARTED:
            self._push(job.first_token_at, _What.FIRST, node, self._asks[job].number)
        elif event.kind is EventKind.DONE:
            self._end(node, self._asks.pop(job), job, now)

    def _end(self, node: int, ask: Ask, job: Job, now: float) -> None:
        self._open -= 1
        final = _final(job, self._nodes[node].spec)
        self._outcomes[ask.number] = Outcome(
            self._requests[ask.number],
            node,
            job.first_token_at - ask.at,
            job.finish_at - ask.at,
            job.ready_at - job.arrived,
        )
        started = perf_counter()
        self._router.ended(ask, final, now)
        self._router_s += perf_counter() - started


def _job(model: SimModel, request: Request, node: Scheduler) -> Job:
    """A prompt longer than the context loses its oldest part, and its known beginning with it."""
    row, num_ctx = request.row, request.ask.num_ctx
    room = node.spec.num_ctx(model, num_ctx)
    blocks = row.blocks
    if row.prompt_tokens > room:
        blocks = blocks[len(blocks) - room // node.spec.block_tokens :]
    tokens = min(row.prompt_tokens, room)
    return Job(model, tokens, row.answer_tokens, blocks, num_ctx=num_ctx)


def _final(job: Job, spec: SimSpec) -> Final:
    ready_s = job.ready_at - job.arrived
    return Final(
        job.prompt_tokens,
        job.first_token_at - job.started,
        job.answer_tokens,
        job.finish_at - job.first_token_at,
        ready_s or spec.handover_s,
        job.finish_at - job.arrived,
    )


def _told(one: Resident, now: float) -> Loaded:
    model = one.model
    expires_in_s = one.expires_at - now
    return Loaded(model.name, one.reserved_bytes, one.num_ctx, expires_in_s, model.digest)
