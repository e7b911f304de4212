"""One request that a node is to answer: read, lease, attempt, answer."""

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial

from aiohttp import hdrs

from router import downstream, flows
from router.admission import Held
from router.beside import beside
from router.core import bodies, continuation, dialect, packed
from router.core.dialect import Asked, Call, Route
from router.core.node import fits
from router.core.policy import Target
from router.core.pool import Pool
from router.core.types import Rejected
from router.core.work import NO_INFERENCE, NO_WORK, Work
from router.dispatch import Clock, Refused
from router.downstream import Reply, Request
from router.errors import ClientError, UpstreamError
from router.fanout import Errand, Fanout
from router.keep import Kept
from router.log import Report
from router.passage import Means, Passage

_UNPACKS = (0, 18, 0)  # the first version that takes compressed bodies everywhere on /v1
_ALL = ("*",)
_SMALL_BYTES = 16 * 1024  # of a body that need not be counted: there are no more than requests


@dataclass(slots=True)
class Proxy:
    """Relays requests: each to one node, but an unload to all that have the model in memory.
    `instance` is this process's own id, by which a loop is known."""

    pool: Pool
    means: Means
    fanout: Fanout
    instance: str
    clock: Clock

    def relay(
        self, request: Request, report: Report, asked: Asked, extra: bytes
    ) -> Coroutine[None, None, Reply]:
        """Answer with what a node says; `extra` header lines are added to it.

        Raises ClientError for the client's mistakes, Refused where no node may be asked, and
        UpstreamError where one was and gave no answer.
        """
        body = downstream.body_at_hand(request, self.means.settings.limits.body_bytes)
        if body is None or len(body) > _SMALL_BYTES or not _is_plain(request):
            return self._hold(request, report, asked, extra, body)
        return self._send(request, report, asked, extra, body, 0.0, None)

    async def _hold(
        self, request: Request, report: Report, asked: Asked, extra: bytes, at_hand: bytes | None
    ) -> Reply:
        """Read a body that is not there yet; hold it, as part of what all requests hold."""
        limits, before = self.means.settings.limits, self.clock()
        held = Held(self.means.keep)
        try:
            if at_hand is None:
                body = await downstream.body(
                    request, limits.body_bytes, limits.stalled_body_s, held
                )
            else:
                body = at_hand
                held.add(len(body))
            reading_s = self.clock() - before
            return await self._send(request, report, asked, extra, body, reading_s, held)
        finally:
            held.close()

    async def _send(
        self, request: Request, report: Report, asked: Asked, extra: bytes,
        body: bytes | bytearray, reading_s: float, held: Held | None,
    ) -> Reply:  # fmt: skip
        settings, route = self.means.settings, asked.route
        plain: bytes | bytearray
        as_it_is = held is None or _is_plain(request)  # what is not held was looked at already
        if len(body) <= dialect.QUICK_BYTES and not route.form and as_it_is:
            call, plain = dialect.parse(route, body, exact_usage=settings.exact_usage), body
        else:
            call, plain = await _ask(request, route, body, exact_usage=settings.exact_usage)
            if held is not None and plain is not body:
                held.add(len(plain))
        since = route.since if plain is body else max(route.since, _UNPACKS)
        target = self._target(asked, since, call, report)
        if len(plain) <= dialect.QUICK_BYTES:
            pieces = dialect.rename(plain, call, target.sent)
        else:
            pieces = await beside(plain, partial(dialect.rename, plain, call, target.sent))
        if call.unloads and (holding := self.pool.registry.holding(target)):
            errand = Errand(request, report, asked, extra, asked.target, pieces)
            return await self.fanout.tell(holding, errand)
        unpacked = plain is not body and pieces != (plain,)
        pieces = pieces if unpacked or plain is body else (body,)
        kept = self._kept(call, plain, target) if unpacked or plain is body else None
        passage = Passage(
            self.means, request, report, call, asked, target, extra, pieces, reading_s, kept,
            unpacked, settings.waits.of(report.model),
            self._work(request, report, route, plain),
        )  # fmt: skip
        try:
            try:
                return await passage.attempt()
            except (UpstreamError, Refused) as error:
                return await passage.after(error)
        except Refused as refused:
            raise _reworded(refused, call, target, body) from None
        finally:
            if kept is not None:
                kept.close()

    def _work(
        self, request: Request, report: Report, route: Route, body: bytes | bytearray
    ) -> Work:
        """What is to be known of a request where it may have to wait for its turn."""
        if not self.pool.schedules:
            return NO_WORK
        if not route.infers:
            return NO_INFERENCE
        return flows.work(
            request, report, route, body, self.means.settings.flows, self.clock(),
            at_least=self.pool.at_least,
        )  # fmt: skip

    def _kept(self, call: Call, body: bytes | bytearray, target: Target) -> Kept | None:
        """Where to keep what the client sees of a stream that another node may go on with."""
        globs = self.means.settings.continues
        if not globs or target.model is None or target.pin is not None or target.model.cloud:
            return None
        if not continuation.may(call, body):
            return None
        return self.means.keep.keep() if globs == _ALL or fits(target.model.key, globs) else None

    def _target(self, asked: Asked, since: tuple[int, ...], call: Call, report: Report) -> Target:
        need = asked.route.need
        target = (
            self.pool.registry.resolve(call.model, asked.scope, need, since)
            if call.model
            else self.pool.registry.anyone(asked.scope, need, since)
        )
        if isinstance(target, Rejected):
            raise Refused(target, call.model)
        if target.model is not None:
            report.model, report.sent = target.model.key, target.sent
            report.known = target.known
        return target


def _reworded(
    refused: Refused, call: Call, target: Target, body: bytes | bytearray
) -> Refused | ClientError:
    """What the client is told where no node could be asked."""
    if call.route.model_in and not call.model:  # any node would answer such a body with 400 or so
        return ClientError(400, "no model can be read" if body else "missing request body")
    refused.model = target.sent
    return refused


def _is_plain(request: Request) -> bool:
    return hdrs.CONTENT_ENCODING not in request.headers


async def _ask(
    request: Request, route: Route, body: bytes | bytearray, *, exact_usage: bool
) -> tuple[Call, bytes | bytearray]:
    """What a request asks, and its body as it was before it was compressed. What may take a
    while happens in a thread."""
    encoding = request.headers.get(hdrs.CONTENT_ENCODING)
    if encoding is not None and bodies.is_packed(route, encoding):
        return await _unpack(route, body)
    if route.form:
        kind = request.headers.get(hdrs.CONTENT_TYPE, "")
        parse = partial(bodies.parse_form, route, body, content_type=kind)
    else:
        parse = partial(dialect.parse, route, body, exact_usage=exact_usage)
    return await beside(body, parse), body


async def _unpack(route: Route, body: bytes | bytearray) -> tuple[Call, bytes | bytearray]:
    try:
        if len(body) <= dialect.QUICK_BYTES:
            with contextlib.suppress(packed.TooLarge):
                return bodies.unpack(route, body, dialect.QUICK_BYTES)
        return await asyncio.to_thread(bodies.unpack, route, body)
    except packed.Unpackable as error:
        raise ClientError(400, str(error), native=True) from None
