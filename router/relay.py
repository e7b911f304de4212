"""Move one response from a node to the client as it comes, and read its last record."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from aiohttp import web
from multidict import CIMultiDict

from router.core import dialect, usage
from router.core.dialect import Framing, Route
from router.core.types import Failure, FailureKind
from router.downstream import new_request_id
from router.log import Ending, Report
from router.upstream import Exchange

HOP_BY_HOP = frozenset({
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
    b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
})  # fmt: skip
_NOT_RELAYED = HOP_BY_HOP | {b"server", b"content-length"}
_FRAMINGS = {b"application/x-ndjson": Framing.NDJSON, b"text/event-stream": Framing.SSE}


@dataclass(frozen=True, slots=True)
class Limits:
    """`held_bytes`: the largest answer held until whole; `record_bytes`: the largest unfinished
    record held; `between_s`: the longest silence of a node that has begun to answer."""

    held_bytes: int
    record_bytes: int
    between_s: float


class _Reply(web.StreamResponse):
    # Status, headers and the first record leave in one packet.
    _send_headers_immediately = False


class Relay:
    """One answer on its way. After a failure, `begun` says whether the client has seen any of
    it: if not, it may be tried elsewhere; if so, `break_off` ends it honestly."""

    def __init__(
        self,
        request: web.BaseRequest,
        route: Route,
        limits: Limits,
        report: Report,
        clock: Callable[[], float],
    ) -> None:
        self._request = request
        self._route = route
        self._limits = limits
        self._report = report
        self._clock = clock
        self._reply: _Reply | None = None
        self._framing = Framing.WHOLE
        self._torn = False
        self._last = b""
        self._before = b""

    @property
    def begun(self) -> bool:
        return self._reply is not None

    async def run(self, exchange: Exchange, extra: Iterable[tuple[str, str]]) -> web.StreamResponse:
        """Relay the whole answer; `extra` are our own headers. Raises UpstreamError."""
        headers, framing, length = _read_head(exchange.headers)
        headers.extend(extra)
        self._framing = framing
        self._report.status = exchange.status
        self._report.streamed = framing is not Framing.WHOLE
        watch = _Watch(exchange, self._limits.between_s)
        try:
            if framing is Framing.WHOLE:
                return await self._hold(exchange, watch, headers, length)
            return await self._stream(exchange, watch, headers)
        finally:
            watch.stop()
            seen = self._before + self._last
            # The first event of an Anthropic stream holds an estimate, which nobody shall count.
            if framing is not Framing.SSE or self._route.final in seen:
                self._report.usage = usage.read(seen)

    async def _hold(
        self, exchange: Exchange, watch: "_Watch", headers: CIMultiDict[str], length: int | None
    ) -> web.StreamResponse:
        """Answer only when it is whole, so that whatever fails before has its true status."""
        pieces: list[bytes] = []
        held = 0
        while held <= self._limits.held_bytes:
            data = await watch.read()
            if not data:
                body = b"".join(pieces)
                self._last = body
                self._report.first_at = self._clock()
                return web.Response(
                    status=exchange.status, reason=_reason(exchange), headers=headers, body=body
                )
            pieces.append(data)
            held += len(data)
        self._torn = True
        reply = await self._begin(exchange, headers, length)
        for data in pieces:
            await reply.write(data)
        pieces.clear()
        while data := await watch.read():
            self._before, self._last = self._last, data
            await reply.write(data)
        await reply.write_eof()
        return reply

    async def _stream(
        self, exchange: Exchange, watch: "_Watch", headers: CIMultiDict[str]
    ) -> web.StreamResponse:
        reply: _Reply | None = None
        tail = b""
        while data := await watch.read():
            if tail:
                data = tail + data
            cut = _whole(data, self._framing)
            if cut == len(data):
                tail = b""
            elif len(data) - cut > self._limits.record_bytes:
                self._torn, tail = True, b""
            else:
                data, tail = data[:cut], data[cut:]
                if not cut:
                    continue
            self._before, self._last = self._last, data
            if reply is None:
                reply = await self._begin(exchange, headers, None)
            await reply.write(data)
            self._torn = self._torn and cut != len(data)
        if reply is None:
            reply = await self._begin(exchange, headers, None)
        if tail:
            self._before, self._last = self._last, tail
        await reply.write_eof(tail)
        return reply

    async def _begin(
        self, exchange: Exchange, headers: CIMultiDict[str], length: int | None
    ) -> _Reply:
        reply = _Reply(status=exchange.status, reason=_reason(exchange), headers=headers)
        reply.content_length = length
        self._reply = reply
        self._report.first_at = self._clock()
        await reply.prepare(self._request)
        return reply

    async def break_off(self, failure: Failure, message: str) -> web.StreamResponse:
        """End an answer that has begun. If its final record has been seen, it is complete."""
        reply = self._reply
        assert reply is not None
        if dialect.is_final(self._route, self._before + self._last):
            self._report.ending = Ending.OK
            await reply.write_eof()
            return reply
        self._report.ending = Ending.BROKEN
        self._report.error = message
        if self._torn or self._framing is Framing.OPAQUE:
            # Nothing readable can follow half a record: the client must see that it is cut.
            if self._request.transport is not None:
                self._request.transport.abort()
            return reply
        status = 504 if failure.kind is FailureKind.STALLED else 502
        record = dialect.error_record(self._route, self._framing, status, message, new_request_id())
        await reply.write_eof(record)
        return reply


class _Watch:
    """Reads from a node that may not be silent for too long, with one timer in all.

    Only waiting for the node counts: a client that reads slowly is not the node's fault.
    """

    def __init__(self, exchange: Exchange, limit_s: float) -> None:
        self._exchange = exchange
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._waiting_since: float | None = None
        self._handle = self._loop.call_later(limit_s, self._look)

    async def read(self) -> bytes:
        self._waiting_since = self._loop.time()
        data = await self._exchange.read()
        self._waiting_since = None
        return data

    def stop(self) -> None:
        self._handle.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        since = now if self._waiting_since is None else self._waiting_since
        if now - since >= self._limit_s:
            detail = f"sent nothing for {self._limit_s:g} s"
            self._exchange.abort(
                Failure(FailureKind.STALLED, sent=True, received=True, detail=detail)
            )
        else:
            self._handle = self._loop.call_at(since + self._limit_s, self._look)


def _whole(data: bytes, framing: Framing) -> int:
    """How many leading bytes of `data` are whole records."""
    if framing is Framing.NDJSON:
        return data.rfind(b"\n") + 1
    if framing is Framing.OPAQUE:
        return len(data)
    if data.endswith(b"\n\n"):
        return len(data)
    unix, dos = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
    return max(unix + 2 if unix >= 0 else 0, dos + 4 if dos >= 0 else 0)


def _read_head(
    raw: Iterable[tuple[bytes, bytes]],
) -> tuple[CIMultiDict[str], Framing, int | None]:
    """The headers that go on to the client, how the body is framed, and its length."""
    headers: CIMultiDict[str] = CIMultiDict()
    raw = list(raw)
    dropped = _NOT_RELAYED | nominated(raw)
    framing, length, packed = Framing.WHOLE, None, False
    for name, value in raw:
        lower = name.lower()
        if lower == b"content-length":
            length = int(value)
        if lower in dropped:
            continue
        if lower == b"content-type":
            framing = _FRAMINGS.get(value.partition(b";")[0].strip().lower(), framing)
        packed = packed or lower == b"content-encoding"
        headers.add(name.decode("latin-1"), value.decode("latin-1"))
    if packed and framing is not Framing.WHOLE:
        framing = Framing.OPAQUE
    return headers, framing, length


def nominated(headers: Iterable[tuple[bytes, bytes]]) -> frozenset[bytes]:
    """The headers that `Connection` names, which end at this hop like itself."""
    values = [value for name, value in headers if name.lower() == b"connection"]
    return frozenset(token.strip().lower() for value in values for token in value.split(b","))


def _reason(exchange: Exchange) -> str:
    return exchange.reason.decode("latin-1")
