"""One request that a node is to answer: read, lease, attempt, answer."""

import asyncio
from dataclasses import dataclass, field

from router import downstream, log
from router.core import dialect, retry
from router.core.dialect import VIA, Call, Route
from router.core.policy import Target
from router.core.pool import Attempt, Lease, Pool
from router.core.retry import Verdict
from router.core.types import Failure, Rejected
from router.dispatch import Clock, Dispatch, Refused
from router.downstream import Reply, Request
from router.errors import ClientError, UpstreamError
from router.exchange import Exchange
from router.log import Report
from router.relay import HOP_BY_HOP, Limits, Relay, tokens
from router.upstream import Upstream, request_head

# Not for a node: what is ours to frame, what made a browser or a proxy talk to us, and every
# credential of the client, which a cloud-routed request would carry outward.
_NOT_FORWARDED = HOP_BY_HOP | {
    b"host", b"content-length", b"expect", b"accept-encoding", b"origin",
    b"authorization", b"x-api-key", b"api-key", b"cookie",
}  # fmt: skip

_SECRET_ENDS = (b"-key", b"-token", b"authorization")
_VIA = VIA.encode()


@dataclass(frozen=True, slots=True)
class Settings:
    """What a configuration says of relayed requests; a reload replaces it whole."""

    relay: Limits
    max_body_bytes: int
    stalled_body_s: float
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
        self, request: Request, report: Report, route: Route, query: str, extra: bytes
    ) -> Reply:
        """Answer with what a node says; `extra` header lines are added to it.

        Raises ClientError for the client's mistakes, Refused where no node may be asked, and
        UpstreamError where one was and gave no answer.
        """
        before = self.clock()
        settings = self.settings
        body = await downstream.body(request, settings.max_body_bytes, settings.stalled_body_s)
        reading_s = self.clock() - before
        if len(body) <= dialect.QUICK_BYTES:
            call = dialect.parse(route, body)
        else:
            call = await asyncio.to_thread(dialect.parse, route, body)
        target = self._target(call, report)
        pieces = dialect.rename(body, call, target.sent)
        passage = _Passage(self, request, report, call, target, query, extra, pieces, reading_s)
        return await passage.run()

    def _target(self, call: Call, report: Report) -> Target:
        if not call.model:
            return Target()
        target = self.pool.resolve(call.model)
        if isinstance(target, Rejected):
            raise Refused(target, call.model)
        if target.model is not None:
            report.model, report.sent = target.model.key, target.sent
            report.known = target.known
        return target


@dataclass(slots=True)
class _Passage:
    """The attempts of one request."""

    proxy: Proxy
    request: Request
    report: Report
    call: Call
    target: Target
    query: str
    extra: bytes
    body: tuple[bytes | bytearray | memoryview, ...] = field(repr=False)
    reading_s: float
    tried: dict[str, Failure] = field(default_factory=dict)

    async def run(self) -> Reply:
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
                    message = "no model can be read" if any(self.body) else "missing request body"
                    raise ClientError(400, message) from None
                refused.model = self.target.sent
                raise

    async def _attempt(self, relay: Relay) -> Reply:
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
            self._forwarded(), sum(map(len, self.body)),
        )  # fmt: skip
        if self.report.overhead_s is None:
            self.report.overhead_s = self.proxy.clock() - self.report.started - self.reading_s
        send, limit_s = self.proxy.upstream.open, self.proxy.settings.first_byte_s
        try:
            return await send(lease.node, head, self.body, first_byte_s=limit_s)
        except UpstreamError as error:
            if retry.decide(error.failure) is not Verdict.FRESH:
                raise
        return await send(lease.node, head, self.body, fresh=True, first_byte_s=limit_s)

    def _forwarded(self) -> list[tuple[bytes, bytes]]:
        headers = []
        named: frozenset[bytes] = frozenset()
        for name, value in self.request.raw_headers:
            lower = name.lower()
            if lower not in _NOT_FORWARDED and not lower.endswith(_SECRET_ENDS):
                headers.append((name, value))
            elif lower == b"connection":
                named |= tokens(value)
        if named - _NOT_FORWARDED:
            headers = [header for header in headers if header[0].lower() not in named]
        headers.append((_VIA, self.proxy.instance.encode()))
        return headers

    def _headers(self, lease: Lease) -> bytes:
        """Header lines of our own. No part of them can hold a line end: names are checked."""
        model = f"X-Ollamux-Model: {self.target.sent}\r\n" if self.target.sent else ""
        ours = (
            f"X-Ollamux-Node: {lease.node.name}\r\n"
            f"X-Ollamux-Request-Id: {self.report.id}\r\n"
            f"X-Ollamux-Attempts: {self.report.attempts}\r\n"
            f"X-Ollamux-Reason: {lease.reason.value}\r\n{model}"
        )
        return ours.encode() + self.extra

    def _told(self, failure: Failure) -> str:
        """What the client is told: which node, and what happened, in the router's words."""
        return f"node {self.report.node}: {failure.detail or failure.kind.value}"
