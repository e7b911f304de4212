"""One request's way to its answer: attempts on one node after the other, and what is told where
none gives it."""

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf

import msgspec
from aiohttp import hdrs

from router import flows, log
from router.beside import beside
from router.core import continuation, edits, retry
from router.core.continuation import Plan, Unable
from router.core.dialect import Asked, Call
from router.core.lease import Lease
from router.core.policy import Attempt, Target
from router.core.pool import Pool
from router.core.rates import Waits
from router.core.retry import Verdict
from router.core.trail import Trail
from router.core.types import Failure, FailureKind, Need, NodeSpec, Outcome, Resilience
from router.core.waits import ModelWaits
from router.core.work import NO_WORK, Work
from router.dispatch import Clock, Dispatch, Refused
from router.downstream import Reply, Request
from router.errors import UpstreamError
from router.exchange import Exchange
from router.headers import TO_NODE, Header, forwarded, without
from router.keep import Keep, Kept
from router.log import Continued, Report
from router.relay import Limits, Relay, own_lines, read_head
from router.upstream import Upstream, request_head
from router.wire import Bytes

_ENCODING = frozenset((b"content-encoding",))
_PRIMARY = Need.PRIMARY  # a look-up in the module is a third of the price of one in the enum
_SAID_BYTES = 64 * 1024  # an error's text is not longer, and does not take longer
_SAID_S = 1.0
_WORDS = 300
_CONTINUED_MAX = 10  # an answer that kills each node that gives it is not tried for ever
_ANY_TIME_S = 0.01  # an attempt with less of it left is none
_RETRY_AFTER = b"retry-after"
_LATER = (429, 503)
_JSON = (b"Content-Type", b"application/json; charset=utf-8")
_ANSWERED, _BUSY = FailureKind.ANSWERED, FailureKind.BUSY
_UNSENT = (FailureKind.REFUSED, FailureKind.CONNECT, FailureKind.OURS)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a configuration says of relayed requests; a reload replaces it whole. `continues`:
    globs of the models whose broken answers another node may finish."""

    limits: Limits
    exact_usage: bool
    waits: ModelWaits
    busy_s: float
    resilience: Resilience
    continues: tuple[str, ...]
    flows: flows.Settings


@dataclass(slots=True)
class Means:
    """What all requests go their way with."""

    pool: Pool
    dispatch: Dispatch
    upstream: Upstream
    keep: Keep
    settings: Settings
    via: Header
    clock: Clock


class Said(msgspec.Struct, frozen=True):
    """A node's answer that another node may give better."""

    status: int
    reason: bytes
    headers: Sequence[Header]
    body: bytes

    def same(self, other: "Said") -> bool:
        """Whether both say the same, but for the id that an error of Anthropic's has."""
        if self.status != other.status:
            return False
        words = _error_text(self.body)
        return words == _error_text(other.body) if words else self.body == other.body


class Passage(msgspec.Struct, eq=False):
    """The attempts of one request. `kept`: what the client has seen of a stream, so that another
    node can go on with it; None for what none can. `unpacked`: the body was compressed, and goes
    on as it was before. `trail`: what it has met, from the first failure on."""

    means: Means
    request: Request
    report: Report
    call: Call
    asked: Asked
    target: Target
    extra: bytes
    body: tuple[Bytes, ...]
    reading_s: float
    kept: Kept | None
    unpacked: bool
    waits: Waits
    work: Work = NO_WORK
    trail: Trail | None = None
    relay: Relay | None = None
    waited_s: float = 0.0  # for nodes
    plan: Plan | None = None
    digest: str = ""
    said: dict[str, Said] = {}
    seen: int = 0  # records that the client had when the last attempt failed
    verdict: Verdict = Verdict.ELSEWHERE
    deadline: float = inf  # for the first byte of the answer, or of what goes on with it
    room_until: float = inf  # where all nodes are full, it waits so long

    async def attempt(self) -> Reply:
        """Try one node. Raises UpstreamError and Refused, which `after` takes."""
        means, report, trail = self.means, self.report, self.trail
        if trail is None or not trail.busy:
            self.room_until = means.clock() + means.settings.busy_s
        attempt = Attempt(self.target, work=self.work) if trail is None else trail.attempt()
        until = min(self.room_until, self.deadline, self.work.deadline)
        held = means.dispatch.lease(attempt, until, report.id)
        async with held as lease:
            node = lease.node
            report.attempts += 1
            self.waited_s += held.waited_s
            report.node, report.url, report.reason = node.name, node.url, lease.reason
            report.place, report.expected_s = lease.place, lease.expected_s
            try:
                exchange = await self._open(lease)
                try:
                    if exchange.status >= 400:
                        await self._judge(exchange, node)
                    reply = await self._answer(exchange, node, attempt)
                finally:
                    exchange.close()
                    if trail is not None:
                        self._went_on(trail)  # also for a client that leaves behind the last record
            except UpstreamError as error:
                held.outcome = self._note(node, error.failure)
                raise
        report.ending = log.ending(reply.status)
        return reply

    def _answer(
        self, exchange: Exchange, node: NodeSpec, attempt: Attempt
    ) -> Coroutine[None, None, Reply]:
        """Relay what a node says: all of it, or from where another one broke off."""
        relay = self.relay
        if relay is not None and relay.begun:
            assert self.plan is not None  # it broke off, and goes on
            if exchange.status == 200:
                self.means.dispatch.began(attempt)
            return relay.resume(exchange, self.plan.stitch)
        means, report, kept = self.means, self.report, self.kept
        if kept is not None:
            self.digest = means.pool.registry.digest(node.url, self.target)
        self.relay = relay = Relay(
            self.request, self.call.route, means.settings.limits, report, means.clock,
            withholds=self.call.usage is not None, kept=kept,
            began=partial(means.dispatch.began, attempt) if means.pool.schedules else None,
        )  # fmt: skip
        return relay.run(exchange, own_lines(report, self.extra))

    async def _judge(self, exchange: Exchange, node: NodeSpec) -> None:
        """Take in what a node says of a failure, unless that is no error's text. Raises
        UpstreamError, if another node may do better."""
        status = exchange.status
        had_model = (
            status == 404
            and _is_json(exchange.headers)
            and self.means.pool.registry.believed(node.url, self.target)
        )
        kind = retry.judge(status, had_model=had_model)
        if kind is None or self.asked.route.need is _PRIMARY:
            return
        body = bytearray()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SAID_S):
                while len(body) <= _SAID_BYTES and (piece := await exchange.read()):
                    body += piece
                if len(body) <= _SAID_BYTES:
                    said = Said(status, exchange.reason, exchange.headers, bytes(body))
                    self.said[node.url] = said
        raise UpstreamError(
            Failure(kind, sent=True, received=True, detail=f"status {status}", status=status)
        )

    async def _open(self, lease: Lease) -> Exchange:
        """Send the request; over a fresh connection if a kept one proves to be stale, and at
        once over one where it changes something outside the node."""
        means, waits = self.means, self.waits
        body = await self._body(lease)
        length = sum(map(len, body))
        head = request_head(
            lease.node, self.request.method, self.asked.target, self._forwarded(), length, TO_NODE
        )
        now = self.report.sent_at = means.clock()
        if self.report.overhead_s is None:
            own_s = now - self.report.started - self.reading_s
            self.report.overhead_s = own_s - self.waited_s
        streams = self.call.streams and not self.call.tools
        limit_s = means.pool.first_byte_s(lease, waits, length, streams=streams)
        if self.deadline == inf:
            self.deadline = now + max(limit_s, waits.first_byte_s)
        return await means.upstream.open(
            lease.node, head, body, fresh=self.asked.route.need is _PRIMARY, renew=True,
            first_byte_s=min(limit_s, self.deadline - now), between_s=waits.between_s,
            down_s=waits.silent_down_s,
        )  # fmt: skip

    async def _body(self, lease: Lease) -> tuple[Bytes, ...]:
        """What this node gets: a context that is no smaller than its model's, if configured."""
        pool, body = self.means.pool, self.body if self.plan is None else self.plan.body
        if not self.asked.route.options or not pool.at_least:
            return body
        num_ctx = pool.context(lease)
        if num_ctx is None:
            return body
        return await beside(max(body, key=len), partial(edits.with_context, body, num_ctx))

    def _forwarded(self) -> Sequence[Header]:
        request = self.request
        connection = request.headers.getall(hdrs.CONNECTION, None)
        headers = forwarded(request.raw_headers, connection, self.means.via)
        return tuple(without(headers, _ENCODING)) if self.unpacked else headers

    # After a failure.

    def _note(self, node: NodeSpec, failure: Failure) -> Outcome:
        """Remember what has failed; returns what that says of the node."""
        trail = self.trail
        if trail is None:
            changes = self.asked.route.need is _PRIMARY
            trail = self.trail = Trail(self.target, self.work, changes=changes)
        self._went_on(trail)
        erred = b"" if self.relay is None else self.relay.erred  # held back
        if failure.kind is _ANSWERED and not failure.status and erred:
            self.said[node.url] = Said(500, b"Internal Server Error", (_JSON,), erred)
        elif not failure.status:
            self.said.pop(node.url, None)  # a full node may have said something before
        outcome = trail.outcome(failure)
        excused = trail.excused(failure)
        if excused is not None:
            self.means.pool.forgive(excused.url, self.target)
        self.verdict = trail.failed(node, failure, self.means.settings.resilience)
        return outcome

    async def after(self, error: UpstreamError | Refused) -> Reply:
        """Try others until one has answered. Raises Refused where none could be asked, and
        UpstreamError where none of those that were has answered."""
        while True:
            if isinstance(error, Refused):
                return await self._refused(error)
            assert self.trail is not None  # it has noted this failure
            done = await self._failed(self.trail)
            if done is not None:
                return done
            try:
                return await self.attempt()
            except (UpstreamError, Refused) as again:
                error = again

    async def _failed(self, trail: Trail) -> Reply | None:
        """The answer, if this was the last attempt. Raises UpstreamError where there is none."""
        if self.relay is not None and self.relay.begun:
            return await self._go_on(trail, self.relay)
        too_late = self.means.clock() + _ANY_TIME_S >= self.deadline
        if self.verdict is Verdict.GIVE_UP or too_late:
            return self._give_up(trail)
        return None

    async def _refused(self, refused: Refused) -> Reply:
        """There is no node for another attempt."""
        trail = self.trail
        if trail is None or all(failure.kind in _UNSENT for _, failure in trail.met):
            raise refused
        relay = self.relay
        if relay is not None and relay.begun:
            return await self._break_off(trail, relay, Continued.NO_NODE)
        return self._give_up(trail)

    def _give_up(self, trail: Trail) -> Reply:
        """What those that were asked have said, if it is all the same; else what tells most of
        it, as an error of the router's own."""
        met = {node.url: (node, failure) for node, failure in trail.met}
        said = [self.said.get(url) for url in met]
        first = said[0]
        if first is not None and all(one is not None and first.same(one) for one in said):
            return self._pass_on(first)
        failure = retry.telling(failure for _, failure in met.values())
        told = "; ".join(self._told(*one) for one in met.values())
        raise UpstreamError(failure, told, "; ".join(_logged(*one) for one in met.values()))

    def _told(self, node: NodeSpec, failure: Failure) -> str:
        """What the client is told: which node, and what happened."""
        said = self.said.get(node.url)
        words = "" if said is None else _error_text(said.body)
        return f"node {node.name}: {words}" if words else _logged(node, failure)

    def _pass_on(self, said: Said) -> Reply:
        report = self.report
        report.status, report.ending = said.status, log.ending(said.status)
        report.first_at = self.means.clock()
        lines = read_head(said.headers)[0] + own_lines(report, self.extra)
        if said.status in _LATER and not any(n.lower() == _RETRY_AFTER for n, _ in said.headers):
            lines += b"Retry-After: 1\r\n"
        reply = Reply(self.request, said.status, said.reason, lines, len(said.body))
        reply.finish_with(said.body)
        return reply

    # After a failure in the midst of the answer.

    def _went_on(self, trail: Trail) -> None:
        """Note whether the client has seen another record since the last failure."""
        if self.relay is None or self.relay.progress == self.seen:
            return
        self.seen = self.relay.progress
        trail.went_on()
        if self.plan is not None:
            self.plan = None
            self.report.continuations += (Continued.CONTINUED,)

    async def _go_on(self, trail: Trail, relay: Relay) -> Reply | None:
        """Plan how another node goes on with the answer; None once that is settled."""
        if relay.complete or not self.means.settings.continues:
            return await self._break_off(trail, relay, None)
        if self.kept is None or self.kept.lost:
            result = Continued.UNABLE if self.kept is None else Continued.LOST
            return await self._break_off(trail, relay, result)
        seen = self.kept.data
        plan = partial(
            continuation.plan, self.call.route, self.body, seen,
            withholds=self.call.usage is not None,
        )  # fmt: skip
        try:
            self.plan = await beside(max((seen, *self.body), key=len), plan)
        except Unable as why:
            log.logger().debug("not continued", request=self.report.id, reason=str(why))
            return await self._break_off(trail, relay, Continued.UNABLE)
        if self.plan.ending:
            self.report.continuations += (Continued.ENDED,)
            self.report.ending = log.ending(self.report.status)
            return relay.end_with(self.plan.ending)
        tired = len(self.report.continuations) >= _CONTINUED_MAX
        if self.verdict is Verdict.GIVE_UP or not self.digest or tired:
            return await self._break_off(trail, relay, Continued.NO_NODE)
        trail.digest = self.digest
        self.deadline = inf
        return None

    async def _break_off(self, trail: Trail, relay: Relay, result: Continued | None) -> Reply:
        """End the answer honestly."""
        if result is not None:
            self.report.continuations += (result,)
        node, failure = trail.met[-1]
        told = self._told(node, failure)
        return await relay.break_off(failure, told, _logged(node, failure))


def _logged(node: NodeSpec, failure: Failure) -> str:
    """Which node, and what happened, without words of its own."""
    return f"node {node.name}: {failure.detail or failure.kind.value}"


def _is_json(headers: Sequence[Header]) -> bool:
    kinds = [value for name, value in headers if name.lower() == b"content-type"]
    return any(kind.startswith(b"application/json") for kind in kinds)


def _error_text(body: bytes) -> str:
    """The text of an error, whatever API words it; empty if it has none."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return ""
    error = found.get("error") if isinstance(found, dict) else None
    text = error.get("message") if isinstance(error, dict) else error
    return text[:_WORDS] if isinstance(text, str) else ""
