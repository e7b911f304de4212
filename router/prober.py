"""One task per node: probe it, and tell the pool what was seen.

Probes go the way of the traffic that they speak for: same connections, same TLS, same words
for what fails.
"""

import asyncio
import contextlib
import json
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf

from router.core import names, wording
from router.core.dialect import VIA
from router.core.pool import Pool
from router.core.types import FailureKind, Flip, Model, NodeSpec, Observation, Sign
from router.dispatch import Clock
from router.errors import UpstreamError
from router.metrics import Metrics
from router.upstream import Exchange, Upstream, request_head

_MAX_ANSWER_BYTES = 8 << 20
_MAX_ENTRY_BYTES = 64 << 10
_VERSION = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9}){0,3}[-+.\w]{0,40}", re.ASCII)
_HURRY_S = 0.5  # between probes that requests ask for, which they may as often as clients like
_PATHS = {"version": "/api/version", "tags": "/api/tags", "ps": "/api/ps"}


@dataclass(frozen=True, slots=True)
class Settings:
    """Seconds between probes of each kind, for each of them to answer, and how far an interval
    is varied (a share of it). `suspect_s`: for a node that is not up or has just failed."""

    timeout_s: float
    interval_s: float
    suspect_s: float
    ps_s: float
    tags_s: float
    jitter: float

    def every(self, what: str) -> float:
        return {"version": self.interval_s, "tags": self.tags_s, "ps": self.ps_s}[what]


@dataclass(slots=True)
class Prober:
    """Probes every node of the pool until cancelled. `on_flip` is told of changes of health,
    `on_seen` of every look."""

    pool: Pool
    upstream: Upstream
    metrics: Metrics
    settings: Settings
    instance: str
    on_flip: Callable[[Flip], None]
    clock: Clock
    on_seen: Callable[[], None] = lambda: None
    roll: Callable[[], float] = random.random
    looked: asyncio.Event = field(default_factory=asyncio.Event)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: dict[str, tuple[NodeSpec, asyncio.Task[None]]] = field(default_factory=dict)
    _urgent: dict[str, set[str]] = field(default_factory=dict)
    _hurries: dict[str, asyncio.Event] = field(default_factory=dict)

    def hurry(self, url: str, what: str) -> None:
        """Ask a node at once: a request has met something there that a probe should know of."""
        hurry = self._hurries.get(url)
        if hurry is not None:
            self._urgent.setdefault(url, set()).add(what)
            hurry.set()

    def reconfigure(self, settings: Settings) -> None:
        """Take new settings; nodes that came are probed at once, those that went no more."""
        if settings != self.settings:
            self.settings = settings
            self._stop(list(self._tasks))
        self._changed.set()

    async def run(self) -> None:
        """Keep one task per configured node. `looked` is set once each has been seen."""
        async with asyncio.TaskGroup() as group:
            while True:
                wanted = {spec.url: spec for spec in self.pool.registry.specs()}
                self._stop([u for u, (spec, _) in self._tasks.items() if wanted.get(u) != spec])
                for url, spec in wanted.items():
                    if url not in self._tasks:
                        self._tasks[url] = spec, group.create_task(self._watch(spec))
                await self._changed.wait()
                self._changed.clear()

    def _stop(self, urls: Iterable[str]) -> None:
        for url in urls:
            self._tasks.pop(url)[1].cancel()
            self._hurries.pop(url, None)

    async def _watch(self, spec: NodeSpec) -> None:
        due = dict.fromkeys(_PATHS, 0.0)
        hurry, hurried = self._hurries.setdefault(spec.url, asyncio.Event()), -inf
        while True:
            now = self.clock()
            hurry.clear()
            urgent = self._urgent.pop(spec.url, ())
            # A node that is not up is asked for everything: it must not come up with models
            # that nobody has listed yet.
            asked = [
                what for what in _PATHS if due[what] <= now or what in urgent or not self._up(spec)
            ]
            usable = await self.look(spec, asked)
            pace = self.settings.suspect_s if self.pool.registry.suspect(spec.url) else None
            for what in asked:
                wait_s = pace or self.settings.every(what)
                if what not in usable:
                    wait_s = min(wait_s, self.settings.suspect_s)
                due[what] = self.clock() + wait_s * self._varied()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(due.values()) - self.clock())):
                    await hurry.wait()
                    await asyncio.sleep(hurried + _HURRY_S - self.clock())
                    hurried = self.clock()

    def _up(self, spec: NodeSpec) -> bool:
        return not self.pool.registry.suspect(spec.url)

    def _varied(self) -> float:
        return 1 + self.settings.jitter * (2 * self.roll() - 1)

    async def look(self, spec: NodeSpec, asked: Iterable[str]) -> set[str]:
        """Probe once for all of `asked` at the same time; says which gave a usable answer."""
        async with asyncio.TaskGroup() as group:
            tasks = {what: group.create_task(self._ask(spec, what)) for what in asked}
        answers = {what: task.result() for what, task in tasks.items()}
        seen = _observation(answers)
        for flip in self.pool.observe(spec.url, seen, self.clock()):
            self.on_flip(flip)
        self.on_seen()
        if self.pool.registry.probed:
            self.looked.set()
        return {what for what, answer in answers.items() if not isinstance(answer, _Bad)}

    async def _ask(self, spec: NodeSpec, what: str) -> "Mapping[str, object] | _Bad":
        started = self.clock()
        answer = await self._answer(spec, _PATHS[what])
        usable = not isinstance(answer, _Bad)
        self.metrics.probe(spec.name, what, self.clock() - started, usable=usable)
        return answer

    async def _answer(self, spec: NodeSpec, path: str) -> "Mapping[str, object] | _Bad":
        via = (VIA.encode(), self.instance.encode())
        head = request_head(spec, "GET", path, [via], None)
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                return await self._read(spec, head)
        except TimeoutError:
            return _Bad(Sign.BAD, f"no answer to {path} within {self.settings.timeout_s:g} s")
        except UpstreamError as error:
            refused = error.failure.kind is FailureKind.REFUSED
            return _Bad(Sign.REFUSED if refused else Sign.BAD, str(error))

    async def _read(self, spec: NodeSpec, head: bytes) -> "Mapping[str, object] | _Bad":
        exchange = await self._open(spec, head)
        try:
            body = bytearray()
            while piece := await exchange.read():
                body += piece
                if len(body) > _MAX_ANSWER_BYTES:
                    return _Bad(Sign.BAD, "an answer too large for a probe")
        finally:
            exchange.close()
        if exchange.status == 508:
            return _Bad(Sign.BAD, "its url leads back to this router")
        if exchange.status != 200:
            return _Bad(Sign.BAD, f"status {exchange.status} to a probe")
        return _decoded(body)

    async def _open(self, spec: NodeSpec, head: bytes) -> Exchange:
        """A kept connection that turns out to be stale says nothing about the node."""
        try:
            return await self.upstream.open(spec, head)
        except UpstreamError as error:
            if not error.failure.reused:
                raise
        return await self.upstream.open(spec, head, fresh=True)


@dataclass(frozen=True, slots=True)
class _Bad:
    """No usable answer: what it says about the node's health, and why."""

    sign: Sign
    detail: str


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _decoded(body: bytes | bytearray) -> Mapping[str, object] | _Bad:
    try:
        answer = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError):
        answer = None
    if isinstance(answer, dict):
        return answer
    return _Bad(Sign.BAD, "the answer to a probe is not a JSON object")


def _observation(answers: Mapping[str, Mapping[str, object] | _Bad]) -> Observation:
    """Only the version decides about health: a node that loads a model may be slow to list."""
    sign, detail, version = None, "", None
    match answers.get("version"):
        case None:
            pass
        case _Bad(bad, why):
            sign, detail = bad, why
        case answer:
            told = answer.get("version")
            if isinstance(told, str) and _VERSION.fullmatch(told):
                sign, detail, version = Sign.GOOD, "answers", told
            else:
                sign, detail = Sign.BAD, "its /api/version is not Ollama's"
    return Observation(
        sign=sign,
        version=version,
        present=_models(answers.get("tags")),
        resident=_models(answers.get("ps")),
        detail=detail,
        wall=time.time(),
    )


def _models(answer: Mapping[str, object] | _Bad | None) -> Mapping[str, Model] | None:
    listed = None if answer is None or isinstance(answer, _Bad) else answer.get("models")
    if not isinstance(listed, list):
        return None
    found = {}
    for entry in listed:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            continue
        try:
            key = names.parse(name).key
            size = len(wording.dumps(entry))
        except (names.BadName, RecursionError):
            continue
        if size <= _MAX_ENTRY_BYTES:
            found[key] = Model(key, str(entry.get("digest", "")), entry)
    return found
