"""One request that a node is to answer: read, lease, attempt, answer."""

import asyncio
from collections.abc import Iterable, Sequence
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
from router.headers import HOP_BY_HOP, Header, Passing, named, without
from router.log import Report
from router.relay import Limits, Relay
from router.upstream import Upstream, request_head

# Not for a node: what is ours to frame, what made a browser or a proxy talk to us, and every
# credential of the client, which a cloud-routed request would carry outward.
_NOT_FORWARDED = HOP_BY_HOP | {
    b"host", b"content-length", b"expect", b"accept-encoding", b"origin",
    b"authorization", b"x-api-key", b"api-key", b"cookie",
}  # fmt: skip

_SECRET_ENDS = (b"-key", b"-token", b"authorization")
_passing = Passing(lambda name: name not in _NOT_FORWARDED and not name.endswith(_SECRET_ENDS))


@dataclass(frozen=True, slots=True)
class Settings:
    """What a configuration says of relayed requests; a reload replaces it whole."""

    relay: Limits
    max_body_bytes: int
    stalled_body_s: float
    first_byte_s: float
    between_s: float


@dataclass(slots=True)
class Proxy:
    """Relays requests. `instance` is this process's own id, by which a loop is known."""

    pool: Pool
    dispatch: Dispatch
    upstream: Upstream
    settings: Settings
    instance: str
    clock: Clock
    via: Header = field(init=False)

    def __post_init__(self) -> None:
        self.via = (VIA.encode(), self.instance.encode())

    async def relay(
        self, request: Request, report: Report, route: Route, query: str, extra: bytes
    ) -> Reply:
        """Answer with what a node says; `extra` header lines are added to it.

        Raises ClientError for the client's mistakes, Refused where no node may be asked, and
        UpstreamError where one was and gave no answer.
        """
        settings = self.settings
        body: bytes | bytearray | None
        body = downstream.body_at_hand(request, settings.max_body_bytes)
        reading_s = 0.0
        if body is None:
            before = self.clock()
            body = await downstream.body(request, settings.max_body_bytes, settings.stalled_body_s)
            reading_s = self.clock() - before
        if len(body) <= dialect.QUICK_BYTES:
            call = dialect.parse(route, body)
        else:
            call = await asyncio.to_thread(dialect.parse, route, body)
        target = self._target(call, report)
        pieces = dialect.rename(body, call, target.sent)
        passage = _Passage(self, request, report, call, target, query, extra, pieces, reading_s)
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
                if not call.model:  # any node would answer such a body with 400 or so
                    message = "no model can be read" if body else "missing request body"
                    raise ClientError(400, message) from None
                refused.model = target.sent
                raise

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
                    self.relay = Relay(
                        self.request, self.call.route, proxy.settings.relay, report, proxy.clock
                    )
                    response = await self.relay.run(exchange, self._headers())
                finally:
                    exchange.close()
            except UpstreamError as error:
                self.tried[lease.node.url] = error.failure
                raise
        report.ending = log.ending(response.status)
        return response

    async def _open(self, lease: Lease) -> Exchange:
        """Send the request; over a fresh connection if a kept one proves to be stale."""
        proxy, limits = self.proxy, self.proxy.settings
        head = request_head(
            lease.node, self.request.method, self.call.route.path + self.query,
            self._forwarded(), sum(map(len, self.body)), _passing,
        )  # fmt: skip
        if self.report.overhead_s is None:
            self.report.overhead_s = proxy.clock() - self.report.started - self.reading_s
        try:
            return await proxy.upstream.open(
                lease.node, head, self.body,
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
        """What the client sent, and by which router it comes: this one's line goes with others."""
        headers: Iterable[Header] = self.request.raw_headers
        connection = self.request.headers.getall("Connection", None)
        if connection is not None:
            headers = without(headers, named(",".join(connection)))
        return (*headers, self.proxy.via)

    def _headers(self) -> bytes:
        """Header lines of our own. No part of them can hold a line end: names are checked."""
        report, model = self.report, self.target.sent
        ours = (
            f"X-Ollamux-Node: {report.node}\r\n"
            f"X-Ollamux-Request-Id: {report.id}\r\n"
            f"X-Ollamux-Attempts: {report.attempts}\r\n"
            f"X-Ollamux-Reason: {report.reason}\r\n"
        )
        if model:
            ours += f"X-Ollamux-Model: {model}\r\n"
        return ours.encode() + self.extra

    def told(self, failure: Failure) -> str:
        """What the client is told: which node, and what happened, in the router's words."""
        return f"node {self.report.node}: {failure.detail or failure.kind.value}"
