"""One HTTP/1.1 connection to a node: writes a request, hands out its response as it comes.

llhttp does the framing. What it leaves open is decided here: which connection may carry another
request, what the end of the stream means, and which answers are too strange to relay.
"""

import asyncio
import enum
import re
from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import Any, TypeAlias, cast

from httptools import HttpParserError, HttpResponseParser

from router.core.types import Failure, FailureKind
from router.errors import UpstreamError
from router.upload import Upload

Bytes: TypeAlias = bytes | bytearray | memoryview
Body: TypeAlias = Bytes | Sequence[Bytes]
Sink: TypeAlias = Callable[[bytes], bool]

_JOIN_BYTES = 64 * 1024  # up to here, copying head and body into one write is cheaper than two
_SLICE_BYTES = 256 * 1024  # of a big body, between two looks at what the node says
_FRAMING_BYTES = 256 * 1024  # a head; and whatever else comes between two pieces of a body

_control = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]").search


class State(enum.Enum):
    """What a connection is doing.

    | from  | when                                     | to   |
    |-------|------------------------------------------|------|
    | IDLE  | `request`                                | HEAD |
    | HEAD  | the final head is whole (not a 1xx)      | BODY |
    | BODY  | the response is whole                    | DONE |
    | DONE  | `recycle`, if it may carry another one   | IDLE |
    | any   | `abort`, end, reset, or not HTTP         | LOST |

    `failure` is set on the way from HEAD or BODY to LOST, and only there.
    """

    IDLE = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()
    DONE = enum.auto()
    LOST = enum.auto()


# A look-up in the module is half the price of one in the enum, and there is one per chunk.
_IDLE, _HEAD, _BODY, _DONE, _LOST = State


class _Strange(Exception):
    """Raised inside a callback of the parser to stop it; the text becomes the failure's detail."""


class Connection(asyncio.Protocol):
    """The state of one connection. Its owner is one request at a time, or else the idle pool.

    `lost` is called once, when the transport is gone. The `on_*` methods belong to the parser.
    """

    __slots__ = (
        "_alarm", "_buffered", "_down_s", "_feed", "_full", "_high_water", "_keep", "_limit_s",
        "_loop", "_lost", "_no_body", "_parser", "_paused", "_quiet", "_reused", "_sent", "_sink",
        "_time", "_transport", "_unseen", "_up_s", "_waiter", "_whole", "born", "chunked", "due",
        "failure", "headers", "on_body", "pieces", "reason", "state", "status",
    )  # fmt: skip

    _transport: asyncio.Transport
    _loop: asyncio.AbstractEventLoop
    _feed: Callable[[bytes], None]
    _time: Callable[[], float]

    def __init__(
        self, born: float, high_water_bytes: int, lost: Callable[["Connection"], None]
    ) -> None:
        self.born = born
        self.state = _IDLE
        self.failure: Failure | None = None
        self.pieces: list[bytes] = []
        # The parser appends straight to the list: no Python frame per piece of a body.
        self.on_body: Callable[[bytes], None] = self.pieces.append
        self._high_water = high_water_bytes
        self._lost = lost
        self._parser: Any = None
        self._waiter: asyncio.Future[None] | None = None
        self._alarm: asyncio.Timeout | None = None  # set while a body is sent as it comes
        self._sink: Sink | None = None
        self._reused = False
        self._paused = False  # we asked the transport not to read
        self._full = False  # the transport asked us not to write
        self._up_s = self._down_s = self._limit_s = inf
        self.due = inf

    def __repr__(self) -> str:
        return f"<Connection {self.state.name} reused={self._reused} pieces={len(self.pieces)}>"

    @property
    def full(self) -> bool:
        """Whoever takes the body takes no more of it for now."""
        return self._paused

    @property
    def whole(self) -> bool:
        """The end of the body has arrived."""
        return self.state is _DONE

    @property
    def idle(self) -> bool:
        """May carry a request."""
        return self.state is _IDLE

    # The owner's side

    async def request(self, head: bytes, body: Body | Upload, *, no_body: bool) -> None:
        """Send a request; return when the head of its response is there, be it early or not.

        `no_body`: the response has none, whatever its headers say (the request was a HEAD).
        """
        self._begin(no_body=no_body)
        self._sent = True
        if isinstance(body, Upload):
            await self._upload(head, body)
        else:
            parts = (body,) if isinstance(body, (bytes, bytearray, memoryview)) else body
            if sum(map(len, parts)) <= _JOIN_BYTES:
                self._transport.write(b"".join((head, *parts)))
                self._whole = True
            else:
                await self._send(head, parts)
        while self.state is _HEAD:
            await self.wait()
        if not self.status:
            raise self.error()
        if no_body and self.pieces:  # a body that must not be there: not ours to relay
            self.pieces.clear()
            self._keep = False

    def wait(self) -> asyncio.Future[None]:
        """A future that ends at the next event of any sort. One waiter at a time."""
        if self._waiter is not None and not self._waiter.done():
            raise RuntimeError("somebody waits for this connection already")
        self._waiter = waiter = self._loop.create_future()
        return waiter

    def take(self) -> bytes:
        """All that is buffered, without a copy if it came in one piece."""
        pieces = self.pieces
        if len(pieces) == 1:
            taken = pieces.pop()
        else:
            taken = b"".join(pieces)
            pieces.clear()
        self._buffered = 0
        if self._paused:
            self._resume_reading()
        return taken

    def pour(self, sink: Sink | None) -> bool:
        """From now on give the body to `sink` as it comes; says whether it still takes more.

        It is called in the transport's own callback, so that no task wakes for a piece of body.
        A waiter wakes at the end, or when the sink is full: then nothing is read until the next
        call of this. None takes the sink away.
        """
        self._sink = sink
        if sink is None or not self.pieces:
            if self._paused and sink is not None:
                self._resume_reading()
            return True
        return sink(self.take())

    def recycle(self) -> bool:
        """Make the connection ready for another request, if this one ended as it should."""
        if self.state is not _DONE or not self._keep or not self._whole:
            return False
        if self._transport.get_write_buffer_size():
            return False
        self.pieces.clear()
        self._sink = None
        if self._paused:
            self._resume_reading()
        self.state = _IDLE
        self._reused = True
        return True

    def abort(self) -> None:
        """Close at once. A response that is not whole by now has failed."""
        self._end(FailureKind.RESET, "closed by the router")

    def limit(self, limit_s: float, down_s: float = inf, *, down: bool = False) -> float:
        """How long the node may be silent from now on: until the head is whole, or between two
        pieces of the body; and how long at most while it is `down`, as the probes say (`doubt`).
        Returns the time by which `overdue` has to be asked."""
        self._up_s = limit_s
        self._down_s = min(limit_s, down_s)
        self._limit_s = self._down_s if down else limit_s
        self.due = self._time() + self._limit_s
        return self.due

    def doubt(self, *, down: bool) -> float:
        """The probes have changed their mind: the other limit holds, the silence so far counts.
        Returns what `limit` does."""
        limit_s = self._down_s if down else self._up_s
        if limit_s != self._limit_s:  # both may be without end
            self.due += limit_s - self._limit_s
            self._limit_s = limit_s
        return self.due

    def overdue(self, now: float) -> float:
        """Cut off what has been silent for too long; says when to ask again."""
        if self.state is not _HEAD and self.state is not _BODY:
            return inf
        if self._paused or (self._alarm is not None and not self._full):
            # It is us who do not read, or have nothing to send.
            self.due = now + self._limit_s
        if self.due > now:
            return self.due
        kind = FailureKind.FIRST_BYTE_TIMEOUT if self.state is _HEAD else FailureKind.STALLED
        self._end(kind, self._silence())
        return inf

    def error(self) -> UpstreamError:
        """Why there is no more to read."""
        assert self.failure is not None, self
        return UpstreamError(self.failure)

    def _begin(self, *, no_body: bool) -> None:
        self.status = 0
        self.reason = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self._no_body = no_body
        self.chunked = False
        self._keep = False
        self._sent = False  # any byte of the request
        self._whole = False  # all of it
        self._quiet = 0  # bytes since the request began, or since the last piece of its body
        self._buffered = 0
        self._unseen = 0  # bytes of the request since the last look at what the node says
        if self.state is not _IDLE:  # a node that hangs up as soon as it is called
            self.failure = self._failed(FailureKind.RESET, "connection closed before the request")
            raise self.error()
        # A parser of its own for each response costs half a microsecond, and nothing that a node
        # said before can be left in it.
        self._parser = parser = HttpResponseParser(self)
        self._feed = parser.feed_data
        self.state = _HEAD

    async def _send(self, head: bytes, parts: Sequence[Bytes]) -> None:
        self._transport.write(head)
        for piece in _slices(parts):
            if not await self._put(piece):
                return
        self._whole = True

    async def _upload(self, head: bytes, body: Upload) -> None:
        """Send what comes until it ends, or until the node has answered or gone: that wakes even
        from a wait for the next piece, by a time limit that passes at that moment."""
        self._transport.write(head)
        try:
            async with asyncio.timeout(None) as self._alarm:
                async for piece in body:
                    if not await self._put(piece):
                        return
        except TimeoutError:
            if self.state is _HEAD:  # not ours
                raise
            return
        finally:
            self._alarm = None
        self._whole = True

    async def _put(self, piece: Bytes) -> bool:
        """Write when there is room; says whether the node wants more, or has answered early."""
        if self.state is not _HEAD:
            return False
        self._transport.write(piece)
        self.due = self._time() + self._limit_s
        self._unseen += len(piece)
        if self._full or self._unseen >= _SLICE_BYTES:
            self._unseen = 0
            await self._drain()
        return self.state is _HEAD

    async def _drain(self) -> None:
        """Wait until there is room to write.

        The loop gets a turn even if there is room: a write that fails throws away an answer
        that has arrived and was not read yet (413, then a reset).
        """
        await asyncio.sleep(0)
        while self._full and self.state is _HEAD:
            await self.wait()

    # The transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()
        self._time = self._loop.time

    def data_received(self, data: bytes) -> None:
        if self.state is not _BODY and self.state is not _HEAD:
            self.abort()  # nobody asked for anything
            return
        self._quiet += len(data)
        try:
            self._feed(data)
        except HttpParserError as error:
            self._refuse(error)
        self.due = self._time() + self._limit_s if self.state is _BODY else self.due
        pieces = self.pieces
        if pieces:
            if self._sink is not None:
                self._quiet = 0
                if self._sink(pieces.pop() if len(pieces) == 1 else self.take()):
                    if self.state is not _BODY:
                        self._wake()
                else:
                    self._hold_back()
                return
            self._buffered += self._quiet
            self._quiet = 0
            if self._buffered > self._high_water and not self._paused:
                self._paused = True
                self._transport.pause_reading()
        elif self._quiet > _FRAMING_BYTES and self.state is not _DONE:
            self._end(FailureKind.GARBAGE, "head, chunk extensions or trailers over 256 KiB")
        self._wake()

    def _hold_back(self) -> None:
        """The sink is full: read no more until it is not."""
        if self.state is _BODY and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        if self.state is _BODY and not self._framed():
            self.state = _DONE
        self._end(FailureKind.RESET, f"connection closed {self._where()}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(FailureKind.RESET, f"connection {'reset' if exc else 'closed'} {self._where()}")
        self._parser = None  # it holds bound methods of ours
        self._lost(self)

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._wake()

    # The parser's side

    def on_message_begin(self) -> None:
        if self.state is _DONE:
            raise _Strange("more than one response")

    def on_status(self, reason: bytes) -> None:
        self.reason += reason  # comes in pieces if the network cuts it

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.state is not _HEAD:  # a trailer: dropped, as nobody downstream reads one
            return
        if len(name) == 17 and name.lower() == b"transfer-encoding":
            # llhttp reads `gzip, chunked` as chunked and `xchunked` as the end of the stream.
            if self.chunked or value.strip().lower() != b"chunked":
                raise _Strange("a Transfer-Encoding other than chunked")
            self.chunked = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        status: int = self._parser.get_status_code()
        if status < 200:
            if status < 100:
                raise _Strange("a status below 100")
            if status == 101:
                raise _Strange("switches protocols without being asked")
            self.headers.clear()
            self.reason = b""
            self.chunked = False
            return
        if self.reason != b"OK" and _control(self.reason):  # llhttp lets them pass
            raise _Strange("control characters in the reason")
        if self._quiet > _FRAMING_BYTES and self._head_bytes() > _FRAMING_BYTES:
            raise _Strange("head over 256 KiB")
        self.status = status
        self.state = _BODY
        if self._no_body:  # llhttp cannot be told, and waits for a body for ever
            self.state = _DONE
            self._keep = self._parser.should_keep_alive() and not self.chunked

    def on_message_complete(self) -> None:
        if self.state is _BODY:
            self.state = _DONE
            self._keep = self._parser.should_keep_alive()

    # Between them

    def _refuse(self, error: HttpParserError) -> None:
        if self.state is _DONE:  # what follows a whole response costs the connection, no more
            self._keep = False
        else:
            self._end(FailureKind.GARBAGE, f"not HTTP: {error.__context__ or error}")

    def _end(self, kind: FailureKind, detail: str) -> None:
        if self.state is _HEAD or self.state is _BODY:
            self.failure = self._failed(kind, detail)
        self.state = _LOST
        self._transport.abort()
        self._wake()

    def _failed(self, kind: FailureKind, detail: str) -> Failure:
        received = bool(self.status or self._quiet)
        return Failure(kind, self._sent, self._reused, received, detail)

    def _wake(self) -> None:
        if self._alarm is not None and self.state is not _HEAD:
            self._alarm.reschedule(self._time())
            self._alarm = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        self._waiter = None

    def _resume_reading(self) -> None:
        self._paused = False
        self.due = self._time() + self._limit_s
        self._transport.resume_reading()

    def _framed(self) -> bool:
        return self.chunked or any(name.lower() == b"content-length" for name, _ in self.headers)

    def _head_bytes(self) -> int:
        return sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _silence(self) -> str:
        if self._limit_s < self._up_s:
            return f"sent nothing for {self._limit_s:g} s and fails its probes"
        if self.state is _HEAD:
            return f"no first byte within {self._limit_s:g} s"
        return f"sent nothing for {self._limit_s:g} s"

    def _where(self) -> str:
        return "before the response" if self.state is _HEAD else "inside the response"


def _slices(parts: Sequence[Bytes]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), _SLICE_BYTES):
            yield view[start : start + _SLICE_BYTES]
