"""Keeps models in memory: asks nodes for those that the pool wants there, and for no answer.

A request without a prompt has a node load the model, and begins the time anew after which it is
unloaded. It says nothing of that time, which is the node's or that of the last client who did.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from math import inf

from structlog.typing import FilteringBoundLogger

from router.core import retry, wording
from router.core.lease import Warming
from router.core.types import Failure, NodeSpec, Outcome
from router.core.usage import Usage
from router.core.waits import ModelWaits
from router.dispatch import Clock, Dispatch
from router.errors import UpstreamError
from router.headers import Header
from router.upstream import Upstream, request_head

_GENERATE, _EMBED = "/api/generate", "/api/embed"
_JSON = (b"Content-Type", b"application/json")
_ANSWER_BYTES = 64 << 10
_LEAST_S = 0.05  # between two looks at what is due
_UNTOLD = Outcome(told=False)


@dataclass(slots=True)
class Warmer:
    """Does what the pool says, until cancelled. `look` asks a node what it has in memory.

    Once `stopped` nothing is begun: another process does it, or none. A load that is cut has to
    begin anew for all who wait for it, so those that run go on for as long as the process does.
    """

    dispatch: Dispatch
    upstream: Upstream
    waits: ModelWaits
    via: Header
    look: Callable[[NodeSpec], Awaitable[None]]
    log: FilteringBoundLogger
    clock: Clock
    stopped: bool = False
    _embeds: set[str] = field(default_factory=set)  # models that can do nothing else
    _stirred: asyncio.Event = field(default_factory=asyncio.Event)

    def stir(self) -> None:
        """Something has changed: there may be something to do."""
        self._stirred.set()

    def reconfigure(self, waits: ModelWaits) -> None:
        """Take other limits of silence; what is wanted is for the pool to know."""
        self.waits = waits
        self.stir()

    def stop(self) -> None:
        """Begin nothing more."""
        self.stopped = True

    async def run(self) -> None:
        """Keep looking for what is to be done, once each node has been looked at."""
        pool = self.dispatch.pool
        async with asyncio.TaskGroup() as group:
            while True:
                self._stirred.clear()
                if pool.registry.probed and not self.stopped:
                    for one in pool.warmings(self.clock()):
                        group.create_task(self._do(one))
                until = inf if self.stopped else pool.warm.next_at
                wait_s = None if until == inf else max(until - self.clock(), _LEAST_S)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._stirred.wait()

    async def _do(self, one: Warming) -> None:
        began, outcome = self.clock(), _UNTOLD
        if one.loads:
            self.log.info("preloading", model=one.key, node=one.lease.node.name)
        try:
            outcome, wrong = await self._outcome(one)
        finally:
            self._leave(one, outcome)
        took_s = self.clock() - began
        if one.loads and not wrong:
            self.dispatch.pool.learn(one.lease.node.url, one.key, Usage(load_s=took_s))
        self._tell(one, wrong, took_s)
        await self.look(one.lease.node)

    def _leave(self, one: Warming, outcome: Outcome) -> None:
        dispatch = self.dispatch
        for flip in dispatch.pool.leave(one.lease.attempt, outcome, self.clock()):
            dispatch.on_flip(flip)
        dispatch.wake(one.key)
        dispatch.settle()
        if outcome.failure is not None:
            dispatch.on_failure(one.lease.node, outcome.failure)

    def _tell(self, one: Warming, wrong: str, took_s: float) -> None:
        about = {"model": one.key, "node": one.lease.node.name, "seconds": round(took_s, 3)}
        event = "preloaded" if one.loads else "kept loaded"
        if wrong:
            self.log.warning(f"not {event}", **about, reason=wrong)
        elif one.loads:
            self.log.info(event, **about)
        else:
            self.log.debug(event, **about)

    async def _outcome(self, one: Warming) -> tuple[Outcome, str]:
        """What it says of the node, and what went wrong: what only this request meets says
        nothing."""
        path = _EMBED if one.key in self._embeds else _GENERATE
        try:
            status = await self._ask(one, path)
            if status == 400 and path == _GENERATE:
                status = await self._ask(one, _EMBED)
                if status == 200:
                    self._embeds.add(one.key)
        except UpstreamError as error:
            return Outcome(error.failure), error.logged
        if status == 200:
            return Outcome(), ""
        kind, text = retry.judge(status, had_model=True), f"status {status}"
        if kind is None:
            return _UNTOLD, text
        return Outcome(Failure(kind, sent=True, received=True, detail=text, status=status)), text

    async def _ask(self, one: Warming, path: str) -> int:
        """Send it, over a connection that stays until it is answered. Raises UpstreamError."""
        node, waits = one.lease.node, self.waits.of(one.key)
        body = _body(one)
        head = request_head(node, "POST", path, [self.via, _JSON], len(body))
        exchange = await self.upstream.open(
            node, head, (body,), fresh=True, first_byte_s=waits.first_byte_s,
            between_s=waits.between_s, down_s=waits.silent_down_s,
        )  # fmt: skip
        try:
            left = _ANSWER_BYTES
            while left > 0 and (piece := await exchange.read()):
                left -= len(piece)
        finally:
            exchange.close()
        return exchange.status


def _body(one: Warming) -> bytes:
    """Of a model with another context than it has, Ollama would make a new one."""
    fields: dict[str, object] = {"model": one.name}
    if one.num_ctx is not None and not one.loads:
        fields["options"] = {"num_ctx": one.num_ctx}
    return wording.dumps(fields)
