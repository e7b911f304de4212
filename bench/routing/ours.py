"""ollamux's own core as a router of the benchmark: `router.core` decides, told what HTTP tells."""

from collections.abc import Sequence
from datetime import UTC, datetime
from math import inf
from random import Random
from typing import NamedTuple

from bench.routing.routers import Ask, Decision, Final, FleetView, Loaded
from router.core.lease import Lease, Queued
from router.core.policy import Attempt, Target
from router.core.pool import AGAIN_S, Pool
from router.core.types import (
    Model,
    NodeSpec,
    Observation,
    Outcome,
    Policy,
    PoolSpec,
    Sign,
    Topology,
)
from router.core.usage import Usage
from router.core.work import Work

_DAY_S = 86_400.0  # the clock of a run starts here, so that no time of a node is before it


class Guess(NamedTuple):
    """How long something was expected to take, at `at`."""

    at: float
    expected_s: float


class Outturn(NamedTuple):
    """How long it was expected to take, and how long it did."""

    expected_s: float
    actual_s: float


class Ours:
    """A pool of ollamux, with no I/O around it. `waits` and `firsts` are how long requests that had
    to wait did so, and how long the first tokens took of what was sent, beside what was told."""

    def __init__(
        self, view: FleetView, seed: int, policy: Policy, *, learns_slots: bool = False
    ) -> None:
        specs = tuple(
            NodeSpec(
                node.name, f"http://{node.name}:11434", "http", node.name, 11434,
                slots=1 if learns_slots else node.slots, auto=learns_slots, gpus=node.gpus,
            )
            for node in view
        )  # fmt: skip
        topology = Topology((PoolSpec("default", specs),), policy=policy)
        self._pool = Pool(topology, 0.0, Random(seed).random)
        self._urls = [spec.url for spec in specs]
        self._sizes = [{m.name: m.size_bytes for m in node.models} for node in view]
        for url, node in zip(self._urls, view, strict=True):
            present = {
                m.name: Model(m.name, m.digest, {"name": m.name, "size": m.size_bytes})
                for m in node.models
            }
            self._pool.observe(url, Observation(Sign.GOOD, "0.33.0", present=present), 0.0)
        self.waits: list[Outturn] = []
        self.firsts: list[Outturn] = []
        self._waiting: dict[int, Guess] = {}
        self._sent: dict[int, Guess] = {}
        self._asks: dict[Attempt, Ask] = {}
        self._attempts: dict[int, Attempt] = {}
        self._at: dict[int, tuple[int, int]] = {}
        self._ready: list[Decision] = []
        self._now = 0.0

    def arrive(self, ask: Ask, now: float) -> None:
        work = Work(ask.flow, ask.prompt_tokens, ask.blocks, ask.max_tokens, ask.num_ctx)
        target = self._pool.registry.resolve(ask.model)
        assert isinstance(target, Target), target
        attempt = Attempt(target, work=work)
        self._asks[attempt], self._attempts[ask.number] = ask, attempt
        verdict = self._pool.submit(attempt, now)
        if isinstance(verdict, Lease):
            self._send(verdict, now)
        elif isinstance(verdict, Queued):
            self._waiting[ask.number] = Guess(now, verdict.expected_s)
        else:
            del self._asks[attempt], self._attempts[ask.number]
            self._ready.append(Decision(ask, None))

    def _send(self, lease: Lease, now: float) -> None:
        ask = self._asks[lease.attempt]
        if guess := self._waiting.pop(ask.number, None):
            self.waits.append(Outturn(guess.expected_s, now - guess.at))
        if lease.expected_s is not None:
            self._sent[ask.number] = Guess(now, lease.expected_s)
        node = self._urls.index(lease.node.url)
        self._at[ask.number] = node, lease.place
        self._ready.append(Decision(ask, node))

    def _collect(self, now: float) -> None:
        for one in self._pool.granted(now):
            assert isinstance(one, Lease), one
            self._send(one, now)

    def first(self, ask: Ask, now: float) -> None:
        if guess := self._sent.pop(ask.number, None):
            self.firsts.append(Outturn(guess.expected_s, now - guess.at))
        self._pool.began(self._attempts[ask.number], now)

    def ended(self, ask: Ask, final: Final, now: float) -> None:
        attempt = self._attempts.pop(ask.number)
        del self._asks[attempt]
        self._pool.leave(attempt, Outcome(), now)
        told = Usage(
            final.prompt_tokens, final.tokens, final.load_s, final.decode_s, final.prompt_s,
            total_s=final.total_s,
        )  # fmt: skip
        node, place = self._at.pop(ask.number)
        self._pool.learn(self._urls[node], ask.model, told, ask.flow, place, now)

    def looked(self, node: int, loaded: Sequence[Loaded], now: float) -> None:
        resident = {
            one.model: Model(
                one.model, one.digest,
                {
                    "name": one.model, "size": one.size_bytes, "size_vram": one.size_bytes,
                    "context_length": one.num_ctx, "expires_at": _iso(now + one.expires_in_s),
                },
            )
            for one in loaded
        }  # fmt: skip
        seen = Observation(Sign.GOOD, resident=resident, wall=_DAY_S + now)
        self._pool.observe(self._urls[node], seen, now)

    def take(self, now: float) -> Sequence[Decision]:
        self._now = now
        self._collect(now)
        found, self._ready = self._ready, []
        return found

    def wake_at(self) -> float | None:
        return self._now + AGAIN_S if self._pool.waiting else None


def _iso(at_s: float) -> str:
    at = (
        datetime.max.replace(tzinfo=UTC)
        if at_s == inf
        else datetime.fromtimestamp(_DAY_S + at_s, UTC)
    )
    return at.isoformat()


def expected_delay(view: FleetView, seed: int) -> Ours:
    """The default policy."""
    return Ours(view, seed, Policy.EXPECTED_DELAY)


def learning(view: FleetView, seed: int) -> Ours:
    """The default policy, not told how many slots the nodes have."""
    return Ours(view, seed, Policy.EXPECTED_DELAY, learns_slots=True)


def least_in_flight(view: FleetView, seed: int) -> Ours:
    """The one that can be chosen instead."""
    return Ours(view, seed, Policy.LEAST_IN_FLIGHT)
