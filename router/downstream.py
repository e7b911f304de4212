"""The face towards clients: aiohttp's server, with our own answers to what is not HTTP."""

import asyncio
import contextlib
import ipaddress
import re
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from itertools import chain
from typing import TypeVar, cast
from urllib.parse import unquote

import aiohttp.web_protocol
from aiohttp import hdrs, web
from aiohttp.http_exceptions import LineTooLong
from multidict import istr

from router import log
from router.admission import Cause, Held, Room, Surplus
from router.errors import ClientError

_ID = istr("X-Request-Id")  # looked up in half the time of a plain text
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_VISIBLE = re.compile(r"[!-~]*")
_PIPELINED = 8
_IDLE_S = 75.0
_VERSIONS = (aiohttp.HttpVersion11, aiohttp.HttpVersion10)
_SHORTEST_FIELD_BYTES = 4  # a name, a colon, a line end
_FRAMING_BYTES = 64 * 1024
_FRAMING_SHARE = 16  # times the body: a byte in a chunk of its own takes six
_Data = TypeVar("_Data", bytes, bytearray)
_ROOMY = Room()
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Handler = Callable[["Request"], Awaitable["web.StreamResponse | Reply"]]


class Request(web.BaseRequest):
    """A request whose response names no server software, as Ollama's does not."""

    ATTRS = web.BaseRequest.ATTRS | {"server"}
    server: "Server"

    @property
    def last(self) -> bool:
        """Its answer ends the connection: the server is closing, or the client offers another
        protocol, and the parser may have dropped what followed."""
        return self.server.closing or self._message.upgrade

    @property
    def called(self) -> str:
        """The host that the client means, empty for none. Not `host`, which then asks the
        resolver for this machine's name; in a whole URL it goes before the header."""
        host = self._headers.get(hdrs.HOST, "")
        return host if self._message.path[:1] == "/" else self._message.url.host or host

    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        del response.headers[hdrs.SERVER]
        if self.last:
            response.force_close()
            response.headers[hdrs.CONNECTION] = "close"


class Reply:
    """A relayed answer on its way to the client. It writes to the transport itself: head and
    first piece in one packet, every further piece in one call.

    `head`: header lines, each with its line end. `length`: of the body, None if not known before
    its end. aiohttp finishes it like a response of its own: `prepare`, `write_eof`, `keep_alive`.
    `last`: no request can follow, since the body of this one is not read.
    """

    __slots__ = (
        "_chunked", "_empty", "_ended", "_head", "_protocol", "_request", "_rest", "begun",
        "keep_alive", "status",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        status: int,
        reason: bytes,
        head: bytes,
        length: int | None,
        *,
        last: bool = False,
    ) -> None:
        self.status = status
        self.begun = False
        self._request = request
        self._protocol = request.protocol
        self._ended = False
        self._rest = b""
        modern = request.version >= aiohttp.HttpVersion11
        self._empty = empty = status in (204, 304)
        self._chunked = modern and length is None and not empty
        delimited = modern or empty or length is not None
        self.keep_alive = request.keep_alive and delimited and not (last or request.last)
        lines = [b"HTTP/1.1 " if modern else b"HTTP/1.0 ", b"%d %b\r\n" % (status, reason), head]
        if self._chunked:
            lines.append(b"Transfer-Encoding: chunked\r\n")
        elif length is not None and not empty:
            lines.append(b"Content-Length: %d\r\n" % length)
        if self.keep_alive is not modern:
            lines.append(b"Connection: close\r\n" if modern else b"Connection: keep-alive\r\n")
        lines.append(b"\r\n")
        self._head = b"".join(lines)

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing is left to prepare: called by aiohttp."""

    def push(self, data: bytes) -> bool:
        """Write a piece of the body; says whether the client takes more for now."""
        if self._chunked and data:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        elif self._empty:  # a body would be taken for the next response
            data = b""
        if not self.begun:
            self.begun = True
            self._request.writer.output_size = 1  # aiohttp then adds no answer of its own
            data = self._head + data
        protocol = self._protocol
        transport = protocol.transport
        if transport is None or transport.is_closing():
            return False
        transport.write(data)
        return not protocol.writing_paused

    async def drain(self) -> None:
        """Wait until the client takes more. Raises ConnectionResetError if it has left."""
        await self._request.writer.drain()
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")

    def finish_with(self, rest: bytes) -> None:
        """What `write_eof` is to send as the end of the body."""
        self._rest = rest

    async def write_eof(self) -> None:
        if self._ended:
            return
        self._ended = True
        rest, self._rest = self._rest, b""
        if self._chunked:
            rest = (b"%x\r\n%b\r\n" % (len(rest), rest) if rest else b"") + b"0\r\n\r\n"
            self._chunked = False
        if not self.push(rest):
            await self.drain()

    def cut(self) -> None:
        """End the connection in a way that the client cannot take for the end of the body."""
        self._ended = True
        if self._request.transport is not None:
            self._request.transport.abort()


class Connection(web.RequestHandler):
    """A client's connection. What is not HTTP gets plain text, and is no error of ours."""

    __slots__ = (
        "_content", "_head_handle", "_head_timeout_s", "_wire_bytes", "admitted", "broken", "local"
    )  # fmt: skip

    def __init__(
        self, manager: "Server", *, head_timeout_s: float, loop: asyncio.AbstractEventLoop,
        **settings: object,
    ) -> None:  # fmt: skip
        super().__init__(manager, loop=loop, **settings)  # type: ignore[arg-type]
        self._head_timeout_s = head_timeout_s
        self._head_handle: asyncio.TimerHandle | None = None
        self._content: aiohttp.StreamReader | None = None  # the body that is being received,
        self._wire_bytes = 0  # and what has come of it, with its framing
        self.broken = False
        self.local: tuple[str, int] | None = None  # the address it came to
        self.admitted: str | None = None  # the Host that `Guard` last let pass

    @property
    def idle_since(self) -> float | None:
        """When its last request ended, by the loop's clock; None while one is there, or begins."""
        waits = self._waiter is not None and not self._waiter.done()
        if not waits or self._head_handle is not None:
            return None
        return self._next_keepalive_close_time - self._keepalive_timeout

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        server = cast(Server, self._manager)
        if server.full:
            server.turn_away(cast(asyncio.Transport, transport))
            return
        super().connection_made(transport)
        self.local = transport.get_extra_info("sockname")[:2]

    def data_received(self, data: bytes) -> None:
        """Give a request's head, once begun, a bounded time to be whole, and the framing of a
        body a bounded size."""
        super().data_received(data)
        if self._current_request is not None and not self._current_request.content.is_eof():
            self._weigh(self._current_request.content, len(data))
        if self._messages and isinstance(self._messages[-1][0], aiohttp.web_protocol._ErrInfo):
            self.broken = True
            self.abandon_body()
        if self._current_request is not None and len(self._messages) > _PIPELINED:
            # With its queue full aiohttp reads no more, and would not see this client leave.
            self.force_close()
        elif self._current_request is None and not self._messages:
            if self._head_handle is None:
                self._head_handle = self._loop.call_later(self._head_timeout_s, self.force_close)
        else:
            self._head_ends()

    def _head_ends(self) -> None:
        """No head is begun, or a body that came before its handler was taken for one."""
        if self._head_handle is not None:
            self._head_handle.cancel()
            self._head_handle = None

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Whoever reads a body asks for this each time. Where nothing was paused there is nothing
        to resume, and aiohttp's parser need not be run for that."""
        if self._reading_paused:
            super().resume_reading(resume_parser)
        elif self._current_request is not None:
            self._head_ends()

    def _weigh(self, content: aiohttp.StreamReader, received: int) -> None:
        if content is not self._content:
            self._content, self._wire_bytes = content, 0
        self._wire_bytes += received
        if self._wire_bytes > _FRAMING_BYTES + _FRAMING_SHARE * content.total_bytes:
            self.broken = True  # chunk extensions, or zeros before a size, without end
            self.abandon_body()

    def abandon_body(self) -> None:
        """The parser has given up: a body that is being read would be waited for for ever."""
        request = self._current_request
        if request is not None and not request.content.is_eof():
            request.content.set_exception(aiohttp.web_protocol.RequestPayloadError())
            request.content.feed_eof()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._head_handle is not None:
            self._head_handle.cancel()
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what aiohttp's parser refused, without an echo of it; then close."""
        if request.writer.output_size > 0:
            raise ConnectionResetError("an answer has begun: nothing can be added to it")
        if status >= 500:
            self.logger.error("unhandled error in a request", exc_info=exc)
        status = 431 if isinstance(exc, LineTooLong) else status
        response = web.Response(status=status)
        response.text = f"{status} {response.reason}"
        response.force_close()
        return response


class Server(web.Server):
    """Makes connections; `handler` answers each request on them. `closing`, once set, makes
    every answer the last of its connection. `refusals` are counted by their cause."""

    def __init__(
        self,
        handler: Handler,
        *,
        max_header_bytes: int,
        head_timeout_s: float,
        room: Room = _ROOMY,
        refusals: Counter[str] | None = None,
        cancels: bool = True,
    ) -> None:
        # A client that leaves must end its handler at once, or its lease outlives it; and
        # bodies are relayed as they came, so nothing is unpacked here.
        super().__init__(
            handler,  # type: ignore[arg-type]
            request_factory=self._request,
            handler_cancellation=cancels,
        )
        self.closing = False
        self._empty = asyncio.Event()
        self.refusals: Counter[str] = Counter() if refusals is None else refusals
        self.open = 0  # aiohttp's own list still has what was lost in this turn of the loop
        self.surplus: set[Surplus] = set()
        self._crowded = False
        self.reconfigure(
            max_header_bytes=max_header_bytes, head_timeout_s=head_timeout_s, room=room
        )

    def reconfigure(self, *, max_header_bytes: int, head_timeout_s: float, room: Room) -> None:
        """Take new limits; they hold for connections that come from now on."""
        self.room = room
        self.max_header_bytes = max_header_bytes
        self._head_timeout_s = head_timeout_s
        self._settings = {
            "access_log": None,
            "auto_decompress": False,
            "keepalive_timeout": _IDLE_S,
            "max_line_size": max_header_bytes,
            "max_field_size": max_header_bytes,
            "max_headers": max_header_bytes // _SHORTEST_FIELD_BYTES,
        }

    def __call__(self) -> web.RequestHandler:
        return Connection(
            self, head_timeout_s=self._head_timeout_s, loop=self._loop, **self._settings
        )

    @property
    def full(self) -> bool:
        """Whether there is no room for one more connection."""
        return self.open >= self.room.served

    def turn_away(self, transport: asyncio.Transport) -> None:
        """Refuse a connection."""
        self.refusals[Cause.CONNECTIONS] += 1
        if not self._crowded:
            self._crowded = True
            log.logger().warning("connections refused", limit=self.room.served)
        Surplus(transport, self.surplus, self.room)

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        self.open += 1
        super().connection_made(handler, transport)

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        self.open -= 1
        super().connection_lost(handler, exc)
        if handler._task_handler is None:
            self._check_empty()
        else:  # it counts until its task has ended
            handler._task_handler.add_done_callback(self._check_empty)
        # Not at the first place that is free: at the limit, there would be a line for each.
        if self._crowded and self.open <= self.room.served // 2:
            self._crowded = False
            log.logger().info("connections accepted again", limit=self.room.served)

    def _check_empty(self, _: object = None) -> None:
        if not self._connections:
            self._empty.set()

    async def deserted(self, idle_s: float) -> None:
        """Wait until the last connection has gone; each is closed when it is idle for `idle_s`.

        Before that a client may be about to send its next request, which would be lost.
        """
        while self._connections:
            due = self._close_idle(idle_s)
            self._empty.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._empty.wait()

    def _close_idle(self, idle_s: float) -> float:
        """Close what is due; says when to look again, before which nothing can be."""
        now = self._loop.time()
        again = now + idle_s
        for connection in self.connections:
            since = cast(Connection, connection).idle_since
            if since is not None and since + idle_s <= now:
                connection.force_close()
            elif since is not None:
                again = min(again, since + idle_s)
        return again

    def pre_shutdown(self) -> None:
        super().pre_shutdown()
        for one in list(self.surplus):
            one.abort()

    def _request(self, message, payload, protocol, writer, task) -> Request:  # type: ignore[no-untyped-def]
        if message is aiohttp.web_protocol.ERROR:
            # Its version would be 1.0; an HTTP/1.1 client expects its own.
            message = message._replace(version=aiohttp.HttpVersion11)
        request = Request(message, payload, protocol, writer, task, self._loop)
        request.server = self
        return request


def target(request: Request) -> tuple[str, str]:
    """(decoded path, query with its `?` or empty), from the bytes that the client sent.

    Raises ClientError for a head that is no good, although each line of it is.
    """
    if sum(map(len, chain.from_iterable(request.raw_headers))) > request.server.max_header_bytes:
        raise ClientError(431, "request header fields too large", last=True)
    if request.version not in _VERSIONS:
        raise ClientError(505, "HTTP version not supported", last=True)
    coding = request.headers.get(hdrs.TRANSFER_ENCODING)
    if coding is not None and coding.lower() != "chunked":
        raise ClientError(501, "unsupported transfer encoding", last=True)
    raw = request.raw_path
    if not raw.startswith("/"):
        return request.rel_url.path, ("?" + q if (q := request.rel_url.raw_query_string) else "")
    path, mark, query = raw.partition("?")
    if mark and not _VISIBLE.fullmatch(query):
        raise ClientError(400, "invalid query")
    return (unquote(path) if "%" in path else path), mark + query


def request_id(request: web.BaseRequest) -> str | None:
    """The client's own id, where it is fit to stand in a header and a log."""
    given = request.headers.get(_ID)
    return given if given is not None and _REQUEST_ID.fullmatch(given) else None


def client_address(request: web.BaseRequest, trusted: Sequence[Network]) -> str:
    """The address that asks: the peer's, or, behind a trusted proxy, the last one that no
    trusted proxy wrote into `X-Forwarded-For`."""
    peer = request.remote or ""
    if not trusted:
        return peer
    chain = [*",".join(request.headers.getall("X-Forwarded-For", [])).split(","), peer]
    hops = [hop for hop in map(_address, reversed(chain)) if hop is not None]
    for hop in hops:
        if not _within(hop, trusted):
            return str(hop)
    return str(hops[-1]) if hops else peer


def is_trusted(request: web.BaseRequest, trusted: Sequence[Network]) -> bool:
    """Whether the peer is one whose headers are believed."""
    peer = _address(request.remote or "")
    return peer is not None and _within(peer, trusted)


def _within(address: _Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)


def _address(text: str) -> _Address | None:
    try:
        return None if "%" in text else ipaddress.ip_address(text.strip())
    except ValueError:
        return None


def body_at_hand(request: web.BaseRequest, limit: int) -> bytes | None:
    """A body that came with its head; None where it has to be waited for.

    Raises ClientError 413 above `limit` bytes.
    """
    content = request.content
    if not content.is_eof() or content.exception() is not None:
        return None
    return _bounded(content.read_nowait(), limit)


async def body(
    request: web.BaseRequest, limit: int, stall_s: float | None = None, held: Held | None = None
) -> bytes | bytearray:
    """The whole body. Raises ClientError 413 above `limit` bytes, 400 for broken framing, and 408
    if nothing of it came for `stall_s`: a slow upload is none that has stalled. Each piece is
    added to `held`, which may refuse it."""
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    if waits(request):
        await go_ahead(request)
    whole = bytearray()
    async with contextlib.aclosing(pieces(request, stall_s)) as source:
        async for piece in source:
            if held is not None:
                held.add(len(piece))
            whole += piece
            _bounded(whole, limit)
    return whole


def waits(request: web.BaseRequest) -> bool:
    """Whether the client sends its body only once it is told to, or has waited for long."""
    modern = request.version >= aiohttp.HttpVersion11
    return modern and request.headers.get(hdrs.EXPECT, "").lower() == "100-continue"


async def go_ahead(request: web.BaseRequest) -> None:
    """Tell a client that waits for it to send its body."""
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0


async def pieces(
    request: web.BaseRequest, stall_s: float | None = None
) -> AsyncGenerator[bytes, None]:
    """The body as it comes, of any size: a client that is faster than the reader has to wait.

    Raises ClientError as `body` does. Whoever may leave it unfinished closes it.
    """
    if isinstance(request.protocol, Connection) and request.protocol.broken:
        request.protocol.abandon_body()  # it broke before its handler had begun
    content = request.content
    try:
        while True:
            async with asyncio.timeout(stall_s):
                piece = await content.readany()
            if not piece:
                return
            yield piece
    except aiohttp.web_protocol.RequestPayloadError:
        raise ClientError(400, "malformed request body") from None
    except TimeoutError:
        content.set_exception(TimeoutError())  # the rest is no request
        raise ClientError(408, f"no more of the request body for {stall_s:g} s") from None


def _bounded(data: _Data, limit: int) -> _Data:
    if len(data) > limit:
        raise _too_large(limit)
    return data


def _too_large(limit: int) -> ClientError:
    return ClientError(413, f"request body too large: the limit is {limit} bytes")
