"""One request that a node is to answer: read, lease, attempt, answer."""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from router import downstream, log
from router.beside import beside
from router.core import bodies, dialect, packed, retry
from router.core.dialect import Asked, Call, Route
from router.core.policy import Target
from router.core.pool import Attempt, Lease, Pool
from router.core.retry import Verdict
from router.core.types import Failure, FailureKind, Need, Rejected
from router.dispatch import Clock, Dispatch, Refused
from router.downstream import Reply, Request
from router.errors import ClientError, UpstreamError
from router.exchange import Exchange
from router.fanout import Errand, Fanout
from router.headers import TO_NODE, Header, forwarded, without
from router.log import Report
from router.relay import Limits, Relay, own_lines
from router.upstream import Upstream, request_head

_ENCODING = frozenset((b"content-encoding",))
_UNPACKS = (0, 18, 0)  # the first version that takes compressed bodies everywhere on /v1
_PRIMARY = Need.PRIMARY  # a look-up in the module is a third of the price of one in the enum


@dataclass(frozen=True, slots=True)
class Settings:
    """What a configuration says of relayed requests; a reload replaces it whole."""

    limits: Limits
    exact_usage: bool


@dataclass(slots=True)
class Proxy:
    """Relays requests: each to one node, but an unload to all that have the model in memory.
    `instance` is this process's own id, by which a loop is known."""

    pool: Pool
    dispatch: Dispatch
    upstream: Upstream
    fanout: Fanout
    settings: Settings
    instance: str
    clock: Clock

    async def relay(self, request: Request, report: Report, asked: Asked, extra: bytes) -> Reply:
        """Answer with what a node says; `extra` header lines are added to it.

        Raises ClientError for the client's mistakes, Refused where no node may be asked, and
        UpstreamError where one was and gave no answer.
        """
        limits, route = self.settings.limits, asked.route
        exact_usage = self.settings.exact_usage
        body: bytes | bytearray | None
        body = downstream.body_at_hand(request, limits.body_bytes)
        reading_s = 0.0
        if body is None:
            before = self.clock()
            body = await downstream.body(request, limits.body_bytes, limits.stalled_body_s)
            reading_s = self.clock() - before
        plain: bytes | bytearray
        if len(body) <= dialect.QUICK_BYTES and not route.form and _is_plain(request):
            call, plain = dialect.parse(route, body, exact_usage=exact_usage), body
        else:
            call, plain = await _ask(request, route, body, exact_usage=exact_usage)
        since = asked.route.since if plain is body else max(asked.route.since, _UNPACKS)
        target = self._target(asked, since, call, report)
        pieces = await beside(plain, partial(dialect.rename, plain, call, target.sent))
        if call.unloads and (holding := self.pool.holding(target)):
            errand = Errand(request, report, asked, extra, asked.target, pieces)
            return await self.fanout.tell(holding, errand)
        unpacked = plain is not body and pieces != (plain,)
        pieces = pieces if unpacked or plain is body else (body,)
        passage = _Passage(self, request, report, call, asked, target, extra, pieces, reading_s)
        passage.unpacked = unpacked
        while True:
            try:
                return await passage.attempt()
            except UpstreamError as error:
                told = UpstreamError(error.failure, passage.told(error.failure))
                relay = passage.relay
                if relay is not None and relay.begun:
                    return await relay.break_off(error.failure, str(told))
                if retry.decide(error.failure) is not Verdict.ELSEWHERE:
                    raise told from error
            except Refused as refused:
                raise _reworded(refused, call, target, body) from None

    def _target(self, asked: Asked, since: tuple[int, ...], call: Call, report: Report) -> Target:
        need = asked.route.need
        target = (
            self.pool.resolve(call.model, asked.scope, need, since)
            if call.model
            else self.pool.anyone(asked.scope, need, since)
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
    return "Content-Encoding" not in request.headers


async def _ask(
    request: Request, route: Route, body: bytes | bytearray, *, exact_usage: bool
) -> tuple[Call, bytes | bytearray]:
    """What a request asks, and its body as it was before it was compressed. What may take a
    while happens in a thread."""
    encoding = request.headers.get("Content-Encoding")
    if encoding is not None and bodies.is_packed(route, encoding):
        return await _unpack(route, body)
    if route.form:
        kind = request.headers.get("Content-Type", "")
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


@dataclass(slots=True)
class _Passage:
    """The attempts of one request."""

    proxy: Proxy
    request: Request
    report: Report
    call: Call
    asked: Asked
    target: Target
    extra: bytes
    body: tuple[bytes | bytearray | memoryview, ...] = field(repr=False)
    reading_s: float
    unpacked: bool = False  # the body was compressed, and goes on as it was before
    tried: dict[str, Failure] = field(default_factory=dict)
    relay: Relay | None = None

    async def attempt(self) -> Reply:
        """Try one node. Raises UpstreamError and Refused."""
        proxy, report = self.proxy, self.report
        attempt = Attempt(self.target, frozenset(self.tried))
        async with proxy.dispatch.lease(attempt) as lease:
            report.attempts += 1
            report.node = lease.node.name
            report.reason = lease.reason
            try:
                exchange = await self._open(lease)
                try:
                    if exchange.status == 503 and self._others(lease):
                        raise UpstreamError(Failure(FailureKind.BUSY, detail="busy"))
                    self.relay = Relay(
                        self.request, self.call.route, proxy.settings.limits, report, proxy.clock,
                        withholds=self.call.usage is not None,
                    )  # fmt: skip
                    response = await self.relay.run(exchange, own_lines(report, self.extra))
                finally:
                    exchange.close()
            except UpstreamError as error:
                self.tried[lease.node.url] = error.failure
                raise
        report.ending = log.ending(response.status)
        return response

    def _others(self, lease: Lease) -> bool:
        """Whether a node is left that could be asked instead of this one. The last one's answer
        is the client's, in its own words."""
        if self.asked.route.need is _PRIMARY:
            return False
        found = self.proxy.pool.eligible(self.target)
        tried = {lease.node.url, *self.tried}
        return not isinstance(found, Rejected) and any(node.url not in tried for node in found)

    async def _open(self, lease: Lease) -> Exchange:
        """Send the request; over a fresh connection if a kept one proves to be stale, and at
        once over one where it changes something outside the node."""
        proxy, limits = self.proxy, self.proxy.settings.limits
        head = request_head(
            lease.node, self.request.method, self.asked.target,
            self._forwarded(), sum(map(len, self.body)), TO_NODE,
        )  # fmt: skip
        if self.report.overhead_s is None:
            self.report.overhead_s = proxy.clock() - self.report.started - self.reading_s
        try:
            return await proxy.upstream.open(
                lease.node, head, self.body, fresh=self.asked.route.need is _PRIMARY,
                first_byte_s=limits.first_byte_s, between_s=limits.between_s,
            )  # fmt: skip
        except UpstreamError as error:
            if retry.decide(error.failure) is not Verdict.FRESH:
                raise
        return await proxy.upstream.open(
            lease.node, head, self.body, fresh=True,
            first_byte_s=limits.first_byte_s, between_s=limits.between_s,
        )  # fmt: skip

    def _forwarded(self) -> Sequence[Header]:
        request = self.request
        connection = request.headers.getall("Connection", None)
        headers = forwarded(request.raw_headers, connection, self.proxy.fanout.via)
        return tuple(without(headers, _ENCODING)) if self.unpacked else headers

    def told(self, failure: Failure) -> str:
        """What the client is told: which node, and what happened, in the router's words."""
        return f"node {self.report.node}: {failure.detail or failure.kind.value}"
