"""One request that a node is to answer: read, lease, attempt, answer."""

import asyncio
from dataclasses import dataclass, field

from aiohttp import web

from router import downstream, log
from router.core import dialect, retry
from router.core.dialect import VIA, Call, Route
from router.core.policy import Target
from router.core.pool import Attempt, Lease, Pool
from router.core.retry import Verdict
from router.core.types import Failure, FailureKind, NodeSpec, Rejected
from router.dispatch import Clock, Dispatch, Refused
from router.errors import ClientError, UpstreamError
from router.log import Report
from router.relay import HOP_BY_HOP, Limits, Relay, nominated
from router.upstream import Exchange, Upstream, request_head

# Not for a node: what is ours to frame, what made a browser or a proxy talk to us, and every
# credential of the client, which a cloud-routed request would carry outward.
_NOT_FORWARDED = HOP_BY_HOP | {
    b"host", b"content-length", b"expect", b"accept-encoding", b"origin",
    b"authorization", b"x-api-key", b"api-key", b"cookie",
}  # fmt: skip

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a configuration says of relayed requests; a reload replaces it whole."""

    relay: Limits
    max_body_bytes: int
    first_byte_s: float


@dataclass(slots=True)
class Proxy:
    """Relays requests. `instance` is this process's own id, by which a loop is known."""

    pool: Pool
    dispatch: Dispatch
    upstream: Upstream
    settings: Settings
    instance: str
    clock: Clock

    async def relay(
        self, request: web.BaseRequest, report: Report, route: Route, query: str, extra: Pairs
    ) -> web.StreamResponse:
        """Answer with what a node says; `extra` headers are added to it.

        Raises ClientError for the client's mistakes, Refused where no node may be asked, and
        UpstreamError where one was and gave no answer.
        """
        before = self.clock()
        body = await downstream.body(request, self.settings.max_body_bytes)
        reading_s = self.clock() - before
        call = dialect.parse(route, body)
        target = self._target(call, report)
        passage = _Passage(self, request, report, call, target, query, extra)
        passage.body = dialect.rename(body, call, target.sent)
        passage.body_bytes = sum(map(len, passage.body))
        passage.reading_s = reading_s
        return await passage.run()

    def _target(self, call: Call, report: Report) -> Target:
        if not call.model:
            return Target()
        target = self.pool.resolve(call.model)
        if isinstance(target, Rejected):
            raise Refused(target, call.model)
        if target.model is not None:
            report.model = target.model.key
            report.known = self.pool.knows(report.model)
        return target


@dataclass(slots=True)
class _Passage:
    """The attempts of one request."""

    proxy: Proxy
    request: web.BaseRequest
    report: Report
    call: Call
    target: Target
    query: str
    extra: Pairs
    body: tuple[bytes, ...] = ()
    body_bytes: int = 0
    reading_s: float = 0.0
    tried: dict[str, Failure] = field(default_factory=dict)

    async def run(self) -> web.StreamResponse:
        while True:
            relay = Relay(
                self.request, self.call.route, self.proxy.settings.relay, self.report,
                self.proxy.clock,
            )  # fmt: skip
            try:
                return await self._attempt(relay)
            except UpstreamError as error:
                if relay.begun:
                    return await relay.break_off(error.failure, self._told(error.failure))
                if retry.decide(error.failure) is not Verdict.ELSEWHERE:
                    raise UpstreamError(error.failure, self._told(error.failure)) from error
            except Refused as refused:
                if not self.call.model:  # any node would answer such a body with 400 or so
                    message = "no model can be read" if self.body_bytes else "missing request body"
                    raise ClientError(400, message) from None
                refused.model = self.target.sent
                raise

    async def _attempt(self, relay: Relay) -> web.StreamResponse:
        attempt = Attempt(self.target, frozenset(self.tried))
        async with self.proxy.dispatch.lease(attempt) as lease:
            self.report.attempts += 1
            self.report.node = lease.node.name
            self.report.reason = lease.reason.value
            try:
                exchange = await self._open(lease)
                try:
                    response = await relay.run(exchange, self._headers(lease))
                finally:
                    exchange.close()
            except UpstreamError as error:
                self.tried[lease.node.url] = error.failure
                raise
        self.report.ending = log.ending(response.status)
        return response

    async def _open(self, lease: Lease) -> Exchange:
        """Send the request; over a fresh connection if a kept one proves to be stale."""
        head = request_head(
            lease.node, self.request.method, self.call.route.path + self.query,
            self._forwarded(), self.body_bytes,
        )  # fmt: skip
        if self.report.overhead_s is None:
            self.report.overhead_s = self.proxy.clock() - self.report.started - self.reading_s
        try:
            return await self._send(lease.node, head, fresh=False)
        except UpstreamError as error:
            if retry.decide(error.failure) is not Verdict.FRESH:
                raise
        return await self._send(lease.node, head, fresh=True)

    async def _send(self, node: NodeSpec, head: bytes, *, fresh: bool) -> Exchange:
        limit_s = self.proxy.settings.first_byte_s
        try:
            async with asyncio.timeout(limit_s):
                return await self.proxy.upstream.open(node, head, self.body, fresh=fresh)
        except TimeoutError:
            detail = f"no first byte within {limit_s:g} s"
            failure = Failure(FailureKind.FIRST_BYTE_TIMEOUT, sent=True, detail=detail)
            raise UpstreamError(failure) from None

    def _forwarded(self) -> list[tuple[bytes, bytes]]:
        raw = self.request.raw_headers
        dropped = _NOT_FORWARDED | nominated(raw)
        headers = [(name, value) for name, value in raw if name.lower() not in dropped]
        headers.append((VIA.encode(), self.proxy.instance.encode()))
        return headers

    def _headers(self, lease: Lease) -> Pairs:
        ours = [
            ("X-Ollamux-Node", lease.node.name),
            ("X-Ollamux-Request-Id", self.report.id),
            ("X-Ollamux-Attempts", str(self.report.attempts)),
            ("X-Ollamux-Reason", lease.reason.value),
        ]
        if self.target.sent:
            ours.append(("X-Ollamux-Model", self.target.sent))
        return (*ours, *self.extra)

    def _told(self, failure: Failure) -> str:
        """What the client is told: which node, and what happened, in the router's words."""
        return f"node {self.report.node}: {failure.detail or failure.kind.value}"
