"""The only code that speaks HTTP to a node for a relayed request: connects, keeps, lends."""

import asyncio
import errno
import ipaddress
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial

from router.core import retry
from router.core.retry import Verdict
from router.core.types import Failure, FailureKind, NodeSpec, Tls
from router.errors import UpstreamError
from router.exchange import Exchange
from router.headers import HOP_BY_HOP, Header, Passing, without
from router.sweep import Sweep
from router.upload import CHUNKED, Upload
from router.wire import Body, Connection

__all__ = ["Exchange", "Upstream", "request_head"]

# Written by `request_head` itself, or part of one connection.
_OWN = HOP_BY_HOP | {b"content-length", b"host"}
_LACKING = frozenset((
    errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EAGAIN,
))  # fmt: skip
_passing = Passing(lambda name: name not in _OWN)
_request_line = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ [!-~]+ HTTP/1\.1").fullmatch


def request_head(
    node: NodeSpec,
    method: str,
    target: str,
    headers: Iterable[Header],
    body_length: int | None,
    passing: Passing = _passing,
) -> bytes:
    """The head of a request to `node`, from the request line to the blank line.

    Of `headers`, those that belong to the client's connection are left out (`passing` may leave
    out more), and a header of the node's own takes the place of its namesakes. `body_length` is
    None for a request without a body, CHUNKED for one of unknown length. Raises ValueError,
    without the offending text, for a value that could end its line.
    """
    line = _known_line if "?" not in target else _line
    lines = [line(method, node.prefix, target), b"Host: " + node.authority.encode()]
    if body_length == CHUNKED:
        lines.append(b"Transfer-Encoding: chunked")
    elif body_length is not None:
        lines.append(b"Content-Length: %d" % body_length)
    if node.headers:
        own = {name.lower().encode(): f"{name}: {value}".encode() for name, value in node.headers}
        if not own.keys().isdisjoint(_OWN - {b"host"}):
            raise ValueError("a header of the node's own that belongs to the connection")
        if b"host" in own:
            del lines[1]
        lines += own.values()
        headers = without(headers, frozenset(own))
    lines += passing.lines(headers)
    head, ends = b"\r\n".join(lines), len(lines) - 1
    if head.count(b"\r") != ends or head.count(b"\n") != ends or b"\0" in head:
        raise ValueError("a header with CR, LF or NUL in it")
    return head + b"\r\n\r\n"


def _line(method: str, prefix: str, target: str) -> bytes:
    line = f"{method} {prefix}{target} HTTP/1.1".encode()
    if not _request_line(line):
        raise ValueError("a method or target with characters that may not stand there")
    return line


_known_line = lru_cache(1024)(_line)  # a few endpoints, asked over and over


@dataclass(frozen=True, slots=True)
class _Limits:
    """How many connections to one node may be idle, and for how long; how old one may get."""

    max_idle: int
    idle_s: float
    max_age_s: float


class _Idle:
    """The idle connections to one node, the one used last at the end.

    There is no timer: what has been idle for too long goes when somebody takes or gives one.
    """

    __slots__ = ("_clock", "_limits", "_since", "closed", "tls")

    def __init__(self, tls: Tls, limits: _Limits, clock: Callable[[], float]) -> None:
        self.tls = tls
        self.closed = False
        self._limits = limits
        self._clock = clock
        self._since: dict[Connection, float] = {}

    def __len__(self) -> int:
        return len(self._since)

    def take(self) -> Connection | None:
        """The connection used last, if one is left that may still be used."""
        now = self._clock()
        while self._since:
            conn, since = self._since.popitem()
            young = now - conn.born < self._limits.max_age_s
            if conn.idle and young and now - since < self._limits.idle_s:
                return conn
            conn.abort()
        return None

    def give(self, conn: Connection) -> None:
        """Keep a connection whose exchange is over, or cut it if it cannot be used again."""
        now = self._clock()
        if self.closed or now - conn.born >= self._limits.max_age_s or not conn.recycle():
            conn.abort()
            return
        self._since[conn] = now
        oldest, since = next(iter(self._since.items()))
        if len(self._since) > self._limits.max_idle or now - since >= self._limits.idle_s:
            del self._since[oldest]
            oldest.abort()

    def drop(self, conn: Connection) -> None:
        """The connection is gone, whether it was idle or not."""
        self._since.pop(conn, None)

    def close(self) -> None:
        """Cut what is idle now, and what is given back from now on."""
        self.closed = True
        while self._since:
            self._since.popitem()[0].abort()


class Upstream:
    """Exchanges with nodes, over kept connections where there are any.

    `connect_s` is the limit for name, connection and TLS together, and may be changed at any
    time; `max_idle` counts per node; `high_water_bytes` is how much of a response waits for a
    slow reader before the node has to.
    """

    def __init__(
        self,
        *,
        connect_s: float,
        max_idle: int = 64,
        idle_s: float = 30.0,
        max_age_s: float = 3600.0,
        high_water_bytes: int = 64 * 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.connect_s = connect_s
        self._limits = _Limits(max_idle, idle_s, max_age_s)
        self._high_water_bytes = high_water_bytes
        self._clock = clock
        self._closed = False
        self._idle: dict[str, _Idle] = {}
        self._contexts: dict[Tls, ssl.SSLContext] = {}
        self._connections: dict[Connection, str] = {}  # to which url
        self._down: set[str] = set()
        self._sweep = Sweep(self._connections)
        self._all_gone = asyncio.Event()

    def __repr__(self) -> str:
        idle = sum(map(len, self._idle.values()))
        return f"<Upstream {len(self._connections)} open, {idle} idle>"

    async def open(
        self,
        node: NodeSpec,
        head: bytes,
        body: Body | Upload = b"",
        *,
        fresh: bool = False,
        renew: bool = False,
        no_body: bool = False,
        first_byte_s: float | None = None,
        between_s: float | None = None,
        down_s: float | None = None,
    ) -> Exchange:
        """Send a request and wait for the status and headers of its response.

        `head` is whole, from the request line to the blank line (`request_head`). `fresh`: over
        a new connection; `renew`: so, too, if a kept one proves to be stale. `no_body`: the
        response to a HEAD. `first_byte_s`: how long the head of the response may take once
        connected; `between_s`: how long the node may then be silent; `down_s`: how long at most
        in both cases while it is in doubt (`doubt`).
        The caller closes the exchange. Raises `UpstreamError`; cancelled, it cuts the connection.
        A `body` that can change must not, until the exchange is closed; an Upload is sent as it
        comes, and what its source raises cuts the connection.
        """
        idle = self._idle_of(node)
        conn = None if fresh else idle.take()
        if conn is None:
            conn = await self._connect(node, idle)
        self._sweep.limit(conn, first_byte_s, down_s, down=node.url in self._down)
        try:
            await conn.request(head, body, no_body=no_body)
        except BaseException as error:
            conn.abort()
            if not (renew and isinstance(error, UpstreamError) and _is_stale(error)):
                raise
            return await self.open(
                node, head, body, fresh=True, no_body=no_body, first_byte_s=first_byte_s,
                between_s=between_s, down_s=down_s,
            )  # fmt: skip
        if not conn.whole:
            self._sweep.limit(conn, between_s, down_s, down=node.url in self._down)
        return Exchange(conn, idle.give)

    def doubt(self, url: str, *, down: bool) -> None:
        """The node fails its probes, or answers them again. While it fails them, `down_s` is the
        limit of every exchange with it: of those that run, too, whose silence so far counts."""
        if down:
            self._down.add(url)
        else:
            self._down.discard(url)
        self._sweep.doubt((conn for conn, to in self._connections.items() if to == url), down=down)

    def forget(self, url: str) -> None:
        """Close the node's idle connections now, and its busy ones as they finish."""
        self._down.discard(url)
        self._drop_idle(url)

    async def close(self) -> None:
        """Cut every connection, idle or busy, and wait until all are gone."""
        self._closed = True
        for conn in tuple(self._connections):
            conn.abort()
        if self._connections:
            self._all_gone.clear()
            await self._all_gone.wait()
        self._sweep.stop()

    def _idle_of(self, node: NodeSpec) -> _Idle:
        idle = self._idle.get(node.url)
        if idle is None or (idle.tls is not node.tls and idle.tls != node.tls):
            # A connection made without a check must not outlive the switch.
            self._drop_idle(node.url)
            idle = self._idle[node.url] = _Idle(node.tls, self._limits, self._clock)
        return idle

    def _drop_idle(self, url: str) -> None:
        idle = self._idle.pop(url, None)
        if idle is not None:
            idle.close()

    async def _connect(self, node: NodeSpec, idle: _Idle) -> Connection:
        try:
            async with asyncio.timeout(self.connect_s):
                context = await self._context(node.tls) if node.scheme == "https" else None
                conn = await self._dial(node, context, idle)
        except TimeoutError:
            raise _no_connection(f"no connection within {self.connect_s:g} s") from None
        self._connections[conn] = node.url
        if self._closed:
            conn.abort()
            raise _no_connection("the router is stopping")
        return conn

    async def _dial(
        self, node: NodeSpec, context: ssl.SSLContext | None, idle: _Idle
    ) -> Connection:
        """Try one address after the other, each with its fair share of the time that is left."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.connect_s
        addresses = await _resolve(node)
        errors: list[OSError] = []
        for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
            try:
                share = (deadline - loop.time()) / left if left > 1 else None
                async with asyncio.timeout(share):
                    _, conn = await loop.create_connection(
                        partial(self._connection, idle),
                        address,
                        node.port,
                        ssl=context,
                        server_hostname=node.host if context else None,
                    )
            except OSError as error:  # a TimeoutError is one
                errors.append(error)
            else:
                return conn
        raise _verdict(errors)

    def _connection(self, idle: _Idle) -> Connection:
        return Connection(self._clock(), self._high_water_bytes, partial(self._lost, idle))

    def _lost(self, idle: _Idle, conn: Connection) -> None:
        idle.drop(conn)
        self._connections.pop(conn, None)
        if not self._connections:
            self._all_gone.set()

    async def _context(self, tls: Tls) -> ssl.SSLContext:
        context = self._contexts.get(tls)
        if context is None:  # reading the system's certificates takes milliseconds
            loop = asyncio.get_running_loop()
            try:
                context = await loop.run_in_executor(None, _build_context, tls)
            except OSError as error:
                raise _no_connection(f"the CA file cannot be used: {_told(error)}") from None
            self._contexts[tls] = context
        return context


def _is_stale(error: UpstreamError) -> bool:
    """Whether it was an end of the connection's that came before the node read anything."""
    return retry.decide(error.failure) is Verdict.FRESH


def _build_context(tls: Tls) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=tls.ca)
    if not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


async def _resolve(node: NodeSpec) -> list[str]:
    try:
        ipaddress.ip_address(node.host)
    except ValueError:
        pass
    else:
        return [node.host]
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(node.host, node.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        told = error.strerror if isinstance(error, OSError) else "not a host name"
        raise _no_connection(f"no address for {node.host}: {told}") from None
    return [str(address[0]) for *_, address in found]


def _no_connection(detail: str) -> UpstreamError:
    return UpstreamError(Failure(FailureKind.CONNECT, detail=detail))


def _verdict(errors: list[OSError]) -> UpstreamError:
    """Refused if every address refused; else the first thing that says more. What this process
    lacks is no fault of the node's."""
    for error in errors:
        if error.errno in _LACKING:
            return UpstreamError(Failure(FailureKind.OURS, detail=_told(error)))
        if not isinstance(error, ConnectionRefusedError):
            return _no_connection(_told(error))
    return UpstreamError(Failure(FailureKind.REFUSED, detail="connection refused"))


def _told(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {(error.reason or 'failed').replace('_', ' ').lower()}"
    if error.errno:
        return os.strerror(error.errno)
    return "no answer" if isinstance(error, TimeoutError) else "connection lost on the way"
