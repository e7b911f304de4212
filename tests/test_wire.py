"""One connection, byte by byte: the splits that a real socket cannot be made to do."""

import asyncio
import itertools
from dataclasses import dataclass, field, replace
from math import inf

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.types import Failure, FailureKind
from router.errors import UpstreamError
from router.exchange import Exchange
from router.wire import Connection, State

HEAD = b"POST /api/chat HTTP/1.1\r\nHost: node\r\nContent-Length: 0\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\n"
SECOND = OK + b"Content-Length: 6\r\nX-Which: second\r\n\r\nsecond"


class Pipe(asyncio.Transport):
    """A transport whose other end is the test. Like a real one, it reports its loss later."""

    def __init__(self, conn: Connection) -> None:
        super().__init__()
        self.conn = conn
        self.aborted = False
        self.unsent = 0
        self.written = 0
        self.reading = asyncio.Event()
        self.reading.set()
        conn.connection_made(self)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.aborted
        self.written += len(data)

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def pause_reading(self) -> None:
        self.reading.clear()

    def resume_reading(self) -> None:
        self.reading.set()

    def abort(self) -> None:
        if not self.aborted:
            self.aborted = True
            self.reading.set()
            asyncio.get_running_loop().call_soon(self.conn.connection_lost, None)

    async def feed(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            await self.reading.wait()
            if self.aborted:
                return
            self.conn.data_received(piece)
            await asyncio.sleep(0)

    async def end(self) -> None:
        await self.reading.wait()
        if not self.aborted:
            self.conn.eof_received()


@dataclass
class Outcome:
    status: int = 0
    reason: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    failure: Failure | None = None

    @property
    def fate(self) -> tuple[object, ...]:
        """All but the detail: of two mistakes, the cuts may decide which is found first."""
        failure = self.failure and replace(self.failure, detail="")
        return self.status, self.reason, self.headers, self.body, failure

    @property
    def error(self) -> FailureKind | None:
        return self.failure.kind if self.failure else None


class Line:
    """A connection over a pipe, and what became of it."""

    def __init__(self, high_water_bytes: int = 65536) -> None:
        self.lost: list[Connection] = []
        self.conn = Connection(0.0, high_water_bytes, self.lost.append)
        self.pipe = Pipe(self.conn)

    async def call(self, *, no_body: bool = False) -> Outcome:
        outcome = Outcome()
        try:
            await self.conn.request(HEAD, b"", no_body=no_body)
            exchange = Exchange(self.conn, self.release)
            outcome.status, outcome.reason = exchange.status, exchange.reason
            outcome.headers = exchange.headers
            while piece := await exchange.read():
                outcome.body += piece
            exchange.close()
        except UpstreamError as error:
            outcome.failure = error.failure
            assert self.conn.state is State.LOST
        return outcome

    async def send(self) -> None:
        """Send a request and leave it at that."""
        call = asyncio.ensure_future(self.conn.request(HEAD, b"", no_body=False))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    def release(self, conn: Connection) -> None:
        if not conn.recycle():
            conn.abort()

    async def replay(self, pieces: list[bytes], *, eof: bool, no_body: bool = False) -> Outcome:
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            call = group.create_task(self.call(no_body=no_body))
            await asyncio.sleep(0)  # the request goes first
            await self.pipe.feed(pieces)
            if eof:
                await self.pipe.end()
        return call.result()


def replay(pieces: list[bytes], *, eof: bool = True, no_body: bool = False) -> Outcome:
    async def run() -> Outcome:
        line = Line()
        outcome = await line.replay(pieces, eof=eof, no_body=no_body)
        line.conn.abort()
        await asyncio.sleep(0)
        assert line.lost == [line.conn]
        return outcome

    return asyncio.run(run())


def cut(data: bytes, places: list[int]) -> list[bytes]:
    marks = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(marks)]


# What h11 reads, from what we can write

tokens = st.text("ABCXYZabcxyz019-_", min_size=1, max_size=12).map(lambda t: f"X-{t}".encode())
values = (
    st.text(
        st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"),
        max_size=20,
    )
    .map(lambda text: "".join(c for c in text if not "\x7f" <= c < "\xa0").strip(" \xa0\x85"))
    .map(lambda text: text.encode("latin-1"))
)
headers = st.lists(st.tuples(tokens, values), max_size=5)
bodies = st.lists(st.binary(min_size=1, max_size=40), max_size=5)
cuts = st.lists(st.integers(0, 2000), max_size=12)


@dataclass
class Written:
    """A valid response on the wire, and how it has to be asked for."""

    wire: bytes
    no_body: bool
    eof: bool


def block(fields: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(b"%b: %b\r\n" % header for header in fields)


@st.composite
def responses(draw: st.DrawFn) -> Written:
    wire = b""
    for status in draw(st.lists(st.sampled_from([100, 102, 103]), max_size=2)):
        wire += b"HTTP/1.1 %d Soon\r\n%b\r\n" % (status, block(draw(headers)))
    no_body = draw(st.booleans())
    status = draw(st.sampled_from([200, 201, 204, 304, 400, 404, 413, 500, 503]))
    reason = draw(st.sampled_from([b"OK", b"", b"Not Found", b"caf\xe9"]))
    pieces = draw(bodies)
    framing = draw(st.sampled_from(["length", "chunked", "close"]))
    fields = draw(headers)
    if framing == "length":
        fields.append((b"Content-Length", b"%d" % sum(map(len, pieces))))
    elif framing == "chunked" and status not in {204, 304}:
        fields.append(
            (draw(st.sampled_from([b"Transfer-Encoding", b"transfer-encoding"])), b"chunked")
        )
    if draw(st.booleans()):
        fields.append((b"Connection", draw(st.sampled_from([b"close", b"keep-alive"]))))
    wire += b"HTTP/1.1 %d %b\r\n%b\r\n" % (status, reason, block(fields))
    if not no_body and status not in {204, 304}:
        wire += draw(chunked(pieces)) if framing == "chunked" else b"".join(pieces)
    return Written(wire, no_body, eof=draw(st.booleans()) or framing == "close")


def chunked(pieces: list[bytes]) -> st.SearchStrategy[bytes]:
    extensions = st.sampled_from([b"", b";a", b";a=b", b';a="b"'])

    @st.composite
    def write(draw: st.DrawFn) -> bytes:
        chunks = [b"%x%b\r\n%b\r\n" % (len(p), draw(extensions), p) for p in pieces]
        return b"".join(chunks) + b"0%b\r\n%b\r\n" % (draw(extensions), block(draw(headers)))

    return write()


def read_by_h11(written: Written) -> Outcome:
    peer = h11.Connection(h11.CLIENT)
    method = "HEAD" if written.no_body else "POST"
    peer.send(h11.Request(method=method, target="/", headers=[("Host", "n")]))
    peer.send(h11.EndOfMessage())
    peer.receive_data(written.wire)
    if written.eof:
        peer.receive_data(b"")
    outcome = Outcome()
    while True:
        event = peer.next_event()
        if isinstance(event, h11.Response):
            outcome.status, outcome.reason = event.status_code, bytes(event.reason)
            outcome.headers = [(bytes(n), bytes(v)) for n, v in event.headers.raw_items()]
        elif isinstance(event, h11.Data):
            outcome.body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            return outcome


@settings(deadline=None, max_examples=200)
@given(responses(), cuts)
def test_a_valid_response_reads_the_same_however_it_is_cut_and_as_h11_reads_it(
    written: Written, places: list[int]
) -> None:
    seen = replay(cut(written.wire, places), eof=written.eof, no_body=written.no_body)
    assert seen == read_by_h11(written)


@settings(deadline=None, max_examples=25)
@given(responses())
def test_a_valid_response_reads_the_same_byte_by_byte(written: Written) -> None:
    bytewise = [written.wire[i : i + 1] for i in range(len(written.wire))]
    assert replay(bytewise, eof=written.eof, no_body=written.no_body) == read_by_h11(written)


pieces_of_http = st.sampled_from(
    [
        *(b"\r\n", b"\n", b"\r", b"\r\n ", b"\0", b" ", b":", b"-1", b"ffffffffff"),
        *(b"0\r\n\r\n", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", OK, SECOND),
    ]
)
edits = st.lists(
    st.tuples(st.integers(0, 400), st.integers(0, 6), pieces_of_http | st.binary(max_size=4)),
    min_size=1,
    max_size=4,
)


def mutate(wire: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for place, removed, added in changes:
        at = place % (len(wire) + 1)
        wire = wire[:at] + added + wire[at + removed :]
    return wire


@settings(deadline=None, max_examples=300)
@given(responses(), edits, cuts)
def test_a_mutated_response_fails_or_is_well_formed_and_cuts_do_not_matter(
    written: Written, changes: list[tuple[int, int, bytes]], places: list[int]
) -> None:
    wire = mutate(written.wire, changes)
    whole = replay([wire] if wire else [], no_body=written.no_body)
    assert replay(cut(wire, places), no_body=written.no_body).fate == whole.fate
    assert whole.error in {None, FailureKind.RESET, FailureKind.GARBAGE}
    assert whole.error or 200 <= whole.status <= 999
    for text in (whole.reason, *(part for header in whole.headers for part in header)):
        assert not set(text) & set(b"\r\n\0")


@settings(deadline=None, max_examples=300)
@given(responses(), edits, cuts)
def test_no_byte_of_a_mutated_response_gets_into_the_next(
    written: Written, changes: list[tuple[int, int, bytes]], places: list[int]
) -> None:
    async def run() -> None:
        line = Line()
        pieces = cut(mutate(written.wire, changes), places)
        async with asyncio.TaskGroup() as group:
            first = group.create_task(line.call(no_body=written.no_body))
            await asyncio.sleep(0)
            await line.pipe.feed(pieces)
            if line.conn.state in {State.HEAD, State.BODY}:
                await line.pipe.end()
        assert first.done()
        if line.conn.idle:
            second = await line.replay([SECOND], eof=False)
            assert (second.body, second.error) == (b"second", None)
            assert second.headers == [(b"Content-Length", b"6"), (b"X-Which", b"second")]
            assert line.conn.idle
        line.conn.abort()
        await asyncio.sleep(0)
        assert line.lost == [line.conn]

    asyncio.run(run())


# What must be refused, one by one


def with_body(*fields: bytes) -> bytes:
    return OK + b"".join(line + b"\r\n" for line in fields) + b"\r\nabcd"


REFUSED = {
    "length and chunked": with_body(b"Content-Length: 4", b"Transfer-Encoding: chunked"),
    "chunked and length": with_body(b"Transfer-Encoding: chunked", b"Content-Length: 4"),
    "two lengths that differ": with_body(b"Content-Length: 4", b"Content-Length: 3"),
    "a list of lengths": with_body(b"Content-Length: 4, 4"),
    "a signed length": with_body(b"Content-Length: +4"),
    "an empty length": with_body(b"Content-Length:"),
    "a length past 64 bits": with_body(b"Content-Length: 99999999999999999999999"),
    "chunked twice": with_body(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
    "another coding": with_body(b"Transfer-Encoding: gzip, chunked"),
    "an unknown coding": with_body(b"transfer-encoding: xchunked"),
    "a folded line": with_body(b"X: a", b" b", b"Content-Length: 4"),
    "a folded empty line": with_body(b"X:", b" b", b"Content-Length: 4"),
    "a bare LF": OK + b"X: a\nContent-Length: 4\r\n\r\nabcd",
    "a bare LF in the status line": b"HTTP/1.1 200 OK\nContent-Length: 0\r\n\r\n",
    "a bare CR": OK + b"X: a\rY: b\r\nContent-Length: 4\r\n\r\nabcd",
    "a NUL in a value": with_body(b"X: a\0b", b"Content-Length: 4"),
    "a NUL in the reason": b"HTTP/1.1 200 O\0K\r\nContent-Length: 0\r\n\r\n",
    "a space before the colon": with_body(b"X : a", b"Content-Length: 4"),
    "a header without a colon": with_body(b"X", b"Content-Length: 4"),
    "a status that is none": b"HTTP/1.1 99 No\r\n\r\n",
    "not HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "an unasked switch of protocols": b"HTTP/1.1 101 Yes\r\n"
    b"Upgrade: x\r\nConnection: upgrade\r\n\r\n",
    "an unasked switch without headers": b"HTTP/1.1 101 Yes\r\n\r\n",
    "a bare LF after a chunk size": with_body(b"Transfer-Encoding: chunked")[:-4] + b"1\na\n0\n\n",
    "a chunk that is too long": with_body(b"Transfer-Encoding: chunked")[:-4] + b"1\r\nabc\r\n",
    "a negative chunk": with_body(b"Transfer-Encoding: chunked")[:-4] + b"-1\r\na\r\n",
    "a chunk past 64 bits": with_body(b"Transfer-Encoding: chunked")[:-4] + b"f" * 20 + b"\r\n",
    "a head over 256 KiB": OK + b"X: y\r\n" * 50_000 + b"\r\n",
    "a header that never ends": OK + b"X: " + b"y" * 300_000,
    "interim responses without end": b"HTTP/1.1 100 Continue\r\n\r\n" * 12_000,
    "a chunk extension without end": with_body(b"Transfer-Encoding: chunked")[:-4]
    + b"1;"
    + b"y" * 300_000,
    "trailers without end": with_body(b"Transfer-Encoding: chunked")[:-4]
    + b"0\r\n"
    + b"X: y\r\n" * 50_000,
}


@pytest.mark.parametrize("wire", REFUSED.values(), ids=REFUSED.keys())
def test_is_refused_as_garbage(wire: bytes) -> None:
    assert replay([wire]).error is FailureKind.GARBAGE
    assert replay(cut(wire, list(range(1000)))).error is FailureKind.GARBAGE


def test_a_head_of_just_under_256_kib_passes_however_it_is_cut() -> None:
    wire = OK + b"X: %b\r\nContent-Length: 0\r\n\r\n" % (b"y" * (256 * 1024 - 100))
    assert replay([wire]).error is None
    assert replay(cut(wire, [1, 200_000, 262_000])).error is None


def test_a_long_head_that_ends_in_the_read_that_crosses_the_limit_is_refused() -> None:
    wire = OK + b"X: y\r\n" * 45_000 + b"Content-Length: 0\r\n\r\n"
    assert replay([wire[:200_000], wire[200_000:]]).error is FailureKind.GARBAGE


def test_a_detail_says_what_is_wrong_and_quotes_nothing() -> None:
    outcome = replay([OK + b"Transfer-Encoding: secret\r\n\r\n"])
    assert outcome.failure is not None
    assert outcome.failure.detail == "not HTTP: a Transfer-Encoding other than chunked"


# The ends of a response


LENGTH = OK + b"Content-Length: 10\r\n\r\n"


async def test_what_came_in_the_same_tick_as_a_reset_is_read_before_the_error() -> None:
    line = Line()
    async with asyncio.TaskGroup() as group:
        call = group.create_task(line.call())
        await asyncio.sleep(0)
        line.conn.data_received(LENGTH + b"half")
        line.conn.connection_lost(ConnectionResetError())
    seen = call.result()
    assert (seen.status, seen.body) == (200, b"half")
    assert seen.failure == Failure(
        FailureKind.RESET, sent=True, received=True, detail="connection reset inside the response"
    )


async def test_what_came_in_the_same_tick_as_garbage_is_read_before_the_error() -> None:
    line = Line()
    wire = OK + b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\nnonsense"
    seen = await line.replay([wire], eof=False)
    assert (seen.status, seen.body, seen.error) == (200, b"half", FailureKind.GARBAGE)


async def test_the_end_of_the_stream_ends_a_body_without_framing_but_a_reset_does_not() -> None:
    line = Line()
    assert (await line.replay([OK + b"\r\n", b"all of it"], eof=True)).body == b"all of it"
    line = Line()
    async with asyncio.TaskGroup() as group:
        call = group.create_task(line.call())
        await asyncio.sleep(0)
        line.conn.data_received(OK + b"\r\nhalf")
        line.conn.connection_lost(ConnectionResetError())
    assert call.result().error is FailureKind.RESET


@pytest.mark.parametrize(
    ("wire", "where"),
    [(b"HTTP/1.1 20", "before"), (LENGTH + b"half", "inside"), (LENGTH, "inside")],
)
async def test_an_end_before_the_response_is_whole_is_a_reset(wire: bytes, where: str) -> None:
    seen = await Line().replay([wire], eof=True)
    assert seen.failure == Failure(
        FailureKind.RESET,
        sent=True,
        received=True,
        detail=f"connection closed {where} the response",
    )


async def test_an_end_before_the_first_byte_says_that_nothing_came() -> None:
    seen = await Line().replay([], eof=True)
    assert seen.failure is not None
    assert (seen.failure.sent, seen.failure.received) == (True, False)


async def test_a_connection_lost_before_the_request_says_that_nothing_was_sent() -> None:
    line = Line()
    line.conn.eof_received()
    seen = await line.call()
    assert seen.failure == Failure(FailureKind.RESET, detail="connection closed before the request")


# Which connection carries another request


@pytest.mark.parametrize(
    ("wire", "kept"),
    [
        (OK + b"Content-Length: 2\r\n\r\nab", True),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
        (OK + b"Connection: close\r\nContent-Length: 0\r\n\r\n", False),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\nConnection: close\r\n\r\n", False),
        (OK + b"Content-Length: 2\r\n\r\nabc", False),
        (OK + b"Content-Length: 0\r\n\r\n" + SECOND, False),
        (OK + b"Connection: close\r\nContent-Length: 0\r\n\r\n" + SECOND, False),
    ],
)
async def test_is_kept_after(wire: bytes, kept: bool) -> None:
    line = Line()
    seen = await line.replay([wire], eof=False)
    assert seen.error is None
    assert seen.body in {b"", b"ab"}
    assert line.conn.idle is kept
    assert line.pipe.aborted is not kept


@pytest.mark.parametrize(
    ("rest", "kept"),
    [
        (b"Content-Length: 4\r\n\r\n", True),
        (b"Content-Length: 0\r\n\r\n", True),
        (b"Content-Length: 4\r\n\r\nabcd", False),
        (b"Transfer-Encoding: chunked\r\n\r\n", False),
        (b"Transfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n", False),
        (b"\r\n", False),
        (b"\r\nabcd", False),
    ],
)
async def test_a_response_to_head_has_no_body_and_is_kept_if_its_end_is_sure(
    rest: bytes, kept: bool
) -> None:
    line = Line()
    seen = await line.replay([OK + rest], eof=False, no_body=True)
    assert (seen.status, seen.body, seen.error) == (200, b"", None)
    assert line.conn.idle is kept


async def test_bytes_that_nobody_asked_for_close_an_idle_connection() -> None:
    line = Line()
    await line.replay([OK + b"Content-Length: 0\r\n\r\n", SECOND], eof=False)
    assert line.pipe.aborted


async def test_bytes_after_the_end_close_the_connection_but_not_the_response() -> None:
    line = Line()
    await line.send()
    line.conn.data_received(LENGTH + b"0123456789")
    exchange = Exchange(line.conn, line.release)
    line.conn.data_received(SECOND)
    assert line.pipe.aborted
    assert await exchange.read() == b"0123456789"
    assert await exchange.read() == b""
    exchange.close()
    exchange.close()
    await asyncio.sleep(0)
    assert line.lost == [line.conn]


async def test_a_connection_whose_request_is_not_out_is_not_kept() -> None:
    line = Line()
    line.pipe.unsent = 1
    seen = await line.replay([OK + b"Content-Length: 0\r\n\r\n"], eof=False)
    assert seen.error is None
    assert line.pipe.aborted


async def test_a_whole_response_that_nobody_read_costs_no_connection() -> None:
    line = Line(high_water_bytes=4)
    await line.send()
    line.conn.data_received(LENGTH + b"0123456789")
    assert not line.pipe.reading.is_set()
    Exchange(line.conn, line.release).close()
    assert line.conn.idle
    assert line.pipe.reading.is_set()
    assert (await line.replay([SECOND], eof=False)).body == b"second"


# Reading


async def test_one_piece_is_handed_on_as_it_is() -> None:
    line = Line()
    await line.send()
    line.conn.data_received(LENGTH + b"01234")
    (piece,) = line.conn.pieces
    assert line.conn.take() is piece
    line.conn.data_received(b"567")
    line.conn.data_received(b"89")
    assert line.conn.take() == b"56789"


async def test_reading_stops_above_the_high_water_mark_and_goes_on_when_read() -> None:
    line = Line(high_water_bytes=4)
    await line.send()
    line.conn.data_received(LENGTH)
    assert line.pipe.reading.is_set()  # a long head alone must not stop it: nobody would go on
    line.conn.data_received(b"0")
    line.conn.data_received(b"1234")
    assert not line.pipe.reading.is_set()
    line.conn.data_received(b"5")
    exchange = Exchange(line.conn, line.release)
    assert await exchange.read() == b"012345"
    assert line.pipe.reading.is_set()


async def test_what_was_read_does_not_count_towards_the_high_water_mark() -> None:
    line = Line(high_water_bytes=100)
    await line.send()
    line.conn.data_received(OK + b"\r\n")
    for _ in range(3):
        line.conn.data_received(bytes(60))
        assert line.pipe.reading.is_set()
        assert line.conn.take() == bytes(60)


async def test_an_early_answer_is_seen_though_there_is_always_room_to_write() -> None:
    line = Line()
    body = bytes(1024 * 1024)
    asyncio.get_running_loop().call_soon(line.conn.data_received, OK + b"Content-Length: 0\r\n\r\n")
    await line.conn.request(HEAD, body, no_body=False)
    assert line.conn.status == 200
    assert len(HEAD) < line.pipe.written < len(body)
    assert not line.conn.recycle()


async def test_a_closed_exchange_cannot_be_read_and_wakes_its_reader() -> None:
    line = Line()
    await line.send()
    line.conn.data_received(LENGTH)
    exchange = Exchange(line.conn, line.release)
    async with asyncio.TaskGroup() as group:
        reader = group.create_task(refused(exchange))
        await asyncio.sleep(0)
        exchange.close()
    assert reader.done()
    await refused(exchange)


async def test_a_late_reader_gets_nothing_of_the_next_response() -> None:
    line = Line()
    await line.send()
    line.conn.data_received(LENGTH)
    exchange = Exchange(line.conn, line.release)
    async with asyncio.TaskGroup() as group:
        group.create_task(refused(exchange))
        await asyncio.sleep(0)
        line.conn.data_received(b"0123456789")
        exchange.close()
        await line.send()
        line.conn.data_received(SECOND)
    assert line.conn.take() == b"second"


async def test_only_one_may_wait_and_a_cancelled_one_does_not_count() -> None:
    line = Line()
    waiter = line.conn.wait()
    with pytest.raises(RuntimeError, match="waits"):
        line.conn.wait()
    waiter.cancel()
    again = line.conn.wait()
    line.conn.abort()
    await again
    again = line.conn.wait()
    again.cancel()
    line.conn.resume_writing()


async def test_an_abort_fails_what_is_not_whole() -> None:
    line = Line()
    await line.send()
    assert repr(line.conn) == "<Connection HEAD reused=False pieces=0>"
    line.conn.data_received(LENGTH + b"half")
    assert repr(line.conn) == "<Connection BODY reused=False pieces=1>"
    line.conn.abort()
    assert repr(line.conn) == "<Connection LOST reused=False pieces=1>"
    exchange = Exchange(line.conn, line.release)
    assert await exchange.read() == b"half"
    with pytest.raises(UpstreamError, match="closed by the router"):
        await exchange.read()


async def test_silence_cuts_a_response_off_unless_it_had_failed_or_ended() -> None:
    for before, expected in (
        (lambda _: None, FailureKind.STALLED),
        (lambda line: line.conn.eof_received(), FailureKind.RESET),
        (lambda line: line.conn.data_received(b"456789"), None),
    ):
        line = Line()
        await line.send()
        line.conn.data_received(LENGTH + b"0123")
        exchange = Exchange(line.conn, line.release)
        before(line)
        for _ in range(2):
            late = line.conn.limit(1)
            assert line.conn.overdue(late) == inf
        assert (line.conn.failure and line.conn.failure.kind) == expected
        assert (await exchange.read()).startswith(b"0123")
        exchange.close()
        assert line.conn.overdue(late) == inf


DOWN = "sent nothing for 60 s and fails its probes"


@pytest.mark.parametrize("down_first", [True, False])
@pytest.mark.parametrize(
    ("said", "kind"), [(b"", FailureKind.FIRST_BYTE_TIMEOUT), (b"0123", FailureKind.STALLED)]
)
async def test_a_node_in_doubt_has_the_shorter_limit_from_its_last_byte_on(
    said: bytes, kind: FailureKind, *, down_first: bool
) -> None:
    line = Line()
    await line.send()
    if said:
        line.conn.data_received(LENGTH + said)
    if down_first:
        due = line.conn.limit(600, 60, down=True)
    else:
        long = line.conn.limit(600, 60)
        due = line.conn.doubt(down=True)
        assert due == pytest.approx(long - 540)
    assert line.conn.overdue(due - 0.1) == due
    assert line.conn.overdue(due) == inf
    assert line.conn.failure is not None
    assert (line.conn.failure.kind, line.conn.failure.detail) == (kind, DOWN)


async def test_a_node_that_answers_its_probes_again_has_the_long_limit_again() -> None:
    line = Line()
    await line.send()
    long = line.conn.limit(600, 60)
    for _ in range(2):
        assert line.conn.doubt(down=True) == pytest.approx(long - 540)
        assert line.conn.doubt(down=True) == pytest.approx(long - 540)
        assert line.conn.doubt(down=False) == pytest.approx(long)
    assert line.conn.overdue(long + 1) == inf
    assert line.conn.failure is not None
    assert line.conn.failure.detail == "no first byte within 600 s"


@pytest.mark.parametrize("down_s", [inf, 600.0])
async def test_doubt_changes_nothing_where_no_limit_is_shorter(down_s: float) -> None:
    line = Line()
    await line.send()
    due = line.conn.limit(600, down_s)
    assert line.conn.doubt(down=True) == due
    assert line.conn.overdue(due) == inf
    assert line.conn.failure is not None
    assert line.conn.failure.detail == "no first byte within 600 s"
    assert Line().conn.doubt(down=True) == inf


async def test_a_piece_moves_the_limit_of_a_node_in_doubt() -> None:
    line = Line()
    await line.send()
    line.conn.data_received(LENGTH + b"01")
    line.conn.limit(600, 60)
    due = line.conn.doubt(down=True)
    line.conn.data_received(b"23")
    assert due <= line.conn.due < due + 60
    assert line.conn.overdue(due - 1e-6) == line.conn.due


async def test_a_reader_that_holds_back_is_not_the_silence_of_a_node_in_doubt() -> None:
    line = Line(high_water_bytes=2)
    await line.send()
    line.conn.data_received(LENGTH + b"0123")
    line.conn.limit(600, 60)
    due = line.conn.doubt(down=True)
    assert line.conn.overdue(due + 1) == due + 61
    assert line.conn.take() == b"0123"
    line.conn.abort()


async def refused(exchange: Exchange) -> None:
    with pytest.raises(RuntimeError, match="closed"):
        await exchange.read()
