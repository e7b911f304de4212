"""Move one response from a node to the client as it comes, and read its last record."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from router.answers import new_request_id
from router.core import dialect, usage, wording
from router.core.dialect import NO_MODEL, OPENAI_END, Framing, Route
from router.core.stitch import Stitch
from router.core.types import Failure, FailureKind
from router.downstream import Reply, Request
from router.errors import UpstreamError
from router.exchange import Exchange
from router.headers import HOP_BY_HOP, Header, Passing, named, without
from router.keep import Kept
from router.log import Ending, Report

_NOT_RELAYED = HOP_BY_HOP | {b"server", b"content-length"}
# Said by the router alone: two Access-Control-Allow-Origin are worse than none.
_OURS = (b"x-ollamux-", b"access-control-")
_passing = Passing(lambda name: name not in _NOT_RELAYED and not name.startswith(_OURS))
_WHOLE = Framing.WHOLE
_FRAMINGS = {b"application/x-ndjson": Framing.NDJSON, b"text/event-stream": Framing.SSE}
_NOWHERE = b"\0"  # JSON has none
_drop = deque[bytes](maxlen=0).append
_UNWEIGHED = 63  # so many pieces are kept before they are counted, unless they are large
_LARGE_BYTES = 64 * 1024  # comes in several pieces, so it goes by where these are put together
_ERROR = b'{"error"'
_SEAM_BYTES = 3  # an end of a record is four bytes at most
_SEAM_PIECES = 3
_RECORD_ENDS = {Framing.NDJSON: b"\n", Framing.SSE: b"\n\n"}


@dataclass(frozen=True, slots=True)
class Limits:
    """`held_bytes`: the largest answer held until whole; `record_bytes`: the largest unfinished
    record held; `body_bytes`: the largest body of a request, and `stalled_body_s`: how long none
    of it may come. `first_byte_s`, `between_s`: how long a node may be silent before it answers,
    and then."""

    held_bytes: int
    record_bytes: int
    body_bytes: int
    stalled_body_s: float
    first_byte_s: float
    between_s: float


def own_lines(report: Report, extra: bytes) -> bytes:
    """Header lines of our own for an answer, and `extra` ones. No part of them can hold a line
    end: names are checked."""
    ours = (
        f"X-Ollamux-Node: {report.node}\r\n"
        f"X-Ollamux-Request-Id: {report.id}\r\n"
        f"X-Ollamux-Attempts: {report.attempts}\r\n"
        f"X-Ollamux-Reason: {report.reason}\r\n"
    )
    if report.sent:
        ours += f"X-Ollamux-Model: {report.sent}\r\n"
    return ours.encode() + extra


class Relay:
    """One answer on its way. After a failure, `begun` says whether the client has seen any of
    it: if not, it may be tried elsewhere; if so, `resume` goes on with what another node says,
    and `break_off` ends it honestly.

    `withholds`: the client did not ask for the event with token counts, and does not get it.
    `kept` takes what the client has seen, for whoever works out how to go on."""

    __slots__ = (
        "_before", "_began", "_chunk", "_chunks", "_clock", "_erred", "_framed", "_framing",
        "_head", "_keep", "_kept", "_last", "_limits", "_reason", "_record_end", "_reply",
        "_report", "_request", "_route", "_stitch", "_tail", "_tail_bytes", "_taken", "_told",
        "_torn", "_unnamed", "_withholds",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        route: Route,
        limits: Limits,
        report: Report,
        clock: Callable[[], float],
        *,
        withholds: bool = False,
        kept: Kept | None = None,
        began: Callable[[], None] | None = None,
    ) -> None:
        self._request = request
        self._route = route
        self._limits = limits
        self._report = report
        self._clock = clock
        self._began = began
        self._reply: Reply | None = None
        self._framing = Framing.WHOLE
        self._torn = False
        self._tail: list[bytes] = []
        self._tail_bytes = 0
        self._last = b""
        self._before = b""
        self._told = b""
        self._chunk = route.chunk or _NOWHERE
        self._chunks = 0
        self._taken = 0  # pieces of any other kind
        self._withholds = withholds
        self._kept = kept
        self._keep = _drop if kept is None else kept.take
        self._stitch: Stitch | None = None
        self._erred = b""
        self._framed = True
        self._unnamed = route.final == OPENAI_END

    @property
    def begun(self) -> bool:
        return self._reply is not None

    @property
    def erred(self) -> bytes:
        """The record by which a node said that it failed, held back in case another goes on."""
        return self._erred

    @property
    def complete(self) -> bool:
        """The final record has been seen: whatever fails now, nothing is missing."""
        return dialect.is_final(self._route, self._before + self._last)

    @property
    def progress(self) -> int:
        """Grows with every record that the client gets to see, whichever node said it."""
        return self._chunks + self._taken

    async def run(self, exchange: Exchange, extra: bytes) -> Reply:
        """Relay the whole answer; `extra` are header lines of our own. Raises UpstreamError."""
        head, self._framing, length = read_head(exchange.headers)
        self._head = head + extra
        self._reason = exchange.reason
        report = self._report
        report.status = exchange.status
        report.streamed = self._framing is not _WHOLE
        if self._kept is not None and self._framing not in _RECORD_ENDS:
            self._lose()
        self._framed = length is not None or exchange.chunked
        try:
            if self._framing is _WHOLE:
                return await self._hold(exchange, length)
            return await self._stream(exchange)
        finally:
            self._tell()

    async def resume(self, exchange: Exchange, stitch: Stitch) -> Reply:
        """Go on with what another node says, where a stream that had begun has failed.

        Raises UpstreamError, before anything of it is relayed where it is no such stream."""
        _, framing, _ = read_head(exchange.headers)
        if exchange.status != 200 or framing is not self._framing:
            detail = f"answered {exchange.status} instead of going on"
            raise _failure(FailureKind.ASTRAY, detail)
        self._stitch = stitch
        self._withholds = self._withholds or bool(self._told)
        self._before = self._last = self._told = self._erred = b""
        self._tail.clear()  # what the dead node did not finish
        self._tail_bytes = 0
        try:
            return await self._stream(exchange)
        finally:
            self._tell()

    def end_with(self, records: bytes) -> Reply:
        """Complete an answer that lacks nothing else, with no node to say so."""
        reply = self._reply
        assert reply is not None
        reply.finish_with(records)
        self._report.ending = Ending.OK
        return reply

    def _tell(self) -> None:
        self._report.final = self._told or self._before + self._last
        self._report.chunks = self._chunks

    def _lose(self) -> None:
        """Records that cannot be told apart cannot be gone on with."""
        if self._kept is not None:
            self._kept.give_up()
            self._kept, self._keep = None, _drop

    def _make(self, length: int | None) -> Reply:
        report = self._report
        report.first_at = self._clock()
        if self._began is not None:
            self._began()
        return Reply(self._request, report.status, self._reason, self._head, length)

    async def _hold(self, exchange: Exchange, length: int | None) -> Reply:
        """Answer only when it is whole, so that whatever fails before has its true status."""
        rest = exchange.rest()
        if rest is not None and len(rest) <= self._limits.held_bytes:
            return self._whole(rest)
        pieces: list[bytes] = [] if rest is None else [rest]
        held = 0 if rest is None else len(rest)
        while held <= self._limits.held_bytes:
            data = await exchange.read()
            if not data:
                return self._whole(b"".join(pieces))
            pieces.append(data)
            held += len(data)
        self._torn = True
        self._reply = self._make(length)
        if not self._reply.push(b"".join(pieces)):
            await self._drain()
        pieces.clear()
        await exchange.pump(self._take, self._drain)
        return self._reply

    def _whole(self, body: bytes) -> Reply:
        self._last = body
        reply = self._make(len(body))
        reply.finish_with(body)
        return reply

    async def _stream(self, exchange: Exchange) -> Reply:
        self._record_end = _RECORD_ENDS.get(self._framing, b"")
        await exchange.pump(self._take_records, self._drain)
        if self._erred:
            raise _failure(FailureKind.ANSWERED, "failed in the midst")
        if self._route.final and self._report.status == 200:
            self._check_end()
        if self._reply is None:
            self._reply = self._make(None)
        if self._tail:
            rest = b"".join(self._tail)
            rest = rest if self._stitch is None else self._stitch.feed(rest)
            self._before, self._last = self._last, rest
            self._reply.finish_with(rest)
        return self._reply

    def _take(self, data: bytes) -> bool:
        """Pass a piece on, inside the callback that received it."""
        self._before, self._last = self._last, data
        self._taken += 1
        reply = self._reply
        if reply is None:
            reply = self._reply = self._make(None)
        return reply.push(data)

    def _take_records(self, data: bytes) -> bool:
        """Pass whole records on. A node flushes one per piece: the common case is one look."""
        if self._tail or self._torn or not data.endswith(self._record_end):
            data = self._cut(data)
            if not data:
                return True
        if self._stitch is not None and not self._torn:
            data = self._follow(self._stitch, data)
            if not data:
                return True
        if self._withholds and usage.USAGE in data:
            data = self._withhold(data)
            if not data:
                return True
        chunks = data.count(self._chunk)
        self._chunks += chunks
        unnamed = self._unnamed and NO_MODEL in data
        if (
            unnamed
            or chunks != 1
            or data.find(self._record_end) + len(self._record_end) != len(data)
        ):
            return self._take_others(data)
        self._keep(data)
        if not self._chunks & _UNWEIGHED:
            self._weigh()
        # A record of the answer's text, alone, tells nothing else.
        if self._last:
            self._before = self._last = b""
        reply = self._reply
        return self._take(data) if reply is None else reply.push(data)

    def _take_others(self, data: bytes) -> bool:
        """Pass on what is no record of text alone; but hold back the line by which a node tells
        that it fails in the midst of an answer, as another may go on with it."""
        last = data.rfind(b"\n", 0, -1) + 1
        if self._chunk is not _NOWHERE and data.startswith(_ERROR, last):
            self._erred = data[last:]
            data = data[:last]
            if not data:
                return True
        self._keep(data)
        self._weigh()
        return self._take(data)

    def _weigh(self) -> None:
        if self._kept is not None and not self._kept.weigh():
            self._keep = _drop

    def _check_end(self) -> None:
        """Raises UpstreamError where a stream has ended that lacks its end, as far as can be told:
        a model that repeats itself for ever is cut by Ollama without a last record."""
        if self._framing is not Framing.SSE and self._framed:
            return
        last = b"".join((self._before, self._last, *self._tail))
        if self._framing is Framing.SSE:
            kind = dialect.broke(self._route, last)
            if kind is not None:
                raise _failure(kind, "ended before its last record")
        elif not dialect.is_final(self._route, last):
            # The end of a connection is all there is, be it a death or not.
            raise _failure(FailureKind.RESET, "connection closed before the last record")

    def _follow(self, stitch: Stitch, data: bytes) -> bytes:
        """What the client gets of the records of a node that goes on."""
        told = stitch.feed(data)
        if not told and NO_MODEL in data:
            self._last = data  # it may be all that tells of a failure
        return told

    def _withhold(self, data: bytes) -> bytes:
        """What the client gets of it. There is one event of counts, so it is looked for once."""
        data, self._told = usage.withhold(data)
        self._withholds = not self._told
        return data

    def _cut(self, data: bytes) -> bytes:
        """The whole records of what there is; the rest waits, unless it has grown too large.

        Only the new piece is searched for an end, with as much of the old as an end is long.
        """
        seam = b"".join(self._tail[-_SEAM_PIECES:])[-_SEAM_BYTES:]
        cut = _whole_bytes(seam + data, self._framing) - len(seam)
        if cut <= 0:
            cut = 0
            waiting = self._tail_bytes + len(data)
            if waiting <= self._limits.record_bytes:
                self._put_by(data, waiting)
                return b""
        elif len(data) - cut > self._limits.record_bytes:
            cut = 0
        whole = b"".join((*self._tail, data[:cut] if cut else data))
        self._torn = not cut
        if len(whole) > _LARGE_BYTES:
            self._weigh()
        if self._torn:
            self._lose()
        self._tail.clear()
        self._tail_bytes = 0
        if cut and cut < len(data):
            self._put_by(data[cut:], len(data) - cut)
        return whole

    def _put_by(self, piece: bytes, waiting: int) -> None:
        self._tail.append(piece)
        self._tail_bytes = waiting

    async def _drain(self) -> None:
        assert self._reply is not None
        await self._reply.drain()

    async def break_off(self, failure: Failure, message: str, logged: str) -> Reply:
        """End an answer that has begun, with a message to the client, and one for the log. If its
        final record has been seen, it is complete."""
        reply = self._reply
        assert reply is not None
        if self.complete:
            self._report.ending = Ending.OK
            return reply
        self._report.ending = Ending.BROKEN
        self._report.error = logged
        if self._erred:
            reply.finish_with(self._erred)
            return reply
        if self._torn or self._framing is Framing.OPAQUE:
            # Nothing readable can follow half a record: the client must see that it is cut.
            reply.cut()
            return reply
        status = 504 if failure.kind is FailureKind.STALLED else 502
        record = wording.error_record(self._route, self._framing, status, message, new_request_id())
        reply.finish_with(record)
        return reply


def _failure(kind: FailureKind, detail: str) -> UpstreamError:
    return UpstreamError(Failure(kind, sent=True, received=True, detail=detail))


def _whole_bytes(data: bytes, framing: Framing) -> int:
    """How many leading bytes of `data` are whole records."""
    if framing is Framing.NDJSON:
        return data.rfind(b"\n") + 1
    if data.endswith(b"\n\n"):
        return len(data)
    unix, dos = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
    return max(unix + 2 if unix >= 0 else 0, dos + 4 if dos >= 0 else 0)


def read_head(raw: Sequence[Header]) -> tuple[bytes, Framing, int | None]:
    """Header lines that go on to the client, how the body is framed, and its length."""
    framing, length, packed = _WHOLE, None, False
    passing: Iterable[Header] = raw
    for name, value in raw:
        lower = name.lower()
        if lower == b"content-length":
            length = int(value)
        elif lower == b"content-type":
            framing = _FRAMINGS.get(value.partition(b";")[0].strip().lower(), framing)
        elif lower == b"content-encoding":
            packed = True
        elif lower == b"connection":
            passing = without(passing, named(value.decode("utf-8", "surrogateescape")))
    if packed and framing is not _WHOLE:
        framing = Framing.OPAQUE
    lines = _passing.lines(passing)
    lines.append(b"")
    return b"\r\n".join(lines), framing, length
