"""Exchanges over real sockets, with nodes that say exactly what their script says."""

import asyncio
import contextlib
import inspect
import random
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop

from router.core.types import Failure, FailureKind, NodeSpec, Tls
from router.errors import UpstreamError
from router.upload import CHUNKED as UNKNOWN
from router.upload import Upload
from router.upstream import Exchange, Upstream, request_head

GET = b"GET / HTTP/1.1\r\nHost: node\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\n"
EMPTY = OK + b"Content-Length: 0\r\n\r\n"
HELLO = OK + b"Content-Length: 5\r\n\r\nhello"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nT: x\r\n\r\n"
BIG = 16 * 1024 * 1024  # more than the sockets of both sides hold


class Peer:
    """The node's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def request(self) -> tuple[bytes, bytes]:
        """The next request: its head, and a body as long as Content-Length says."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = 0
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return head, await self.reader.readexactly(length)

    async def say(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def gone(self) -> None:
        """Returns when the router has closed the connection."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass

    def reset(self) -> None:
        sock: socket.socket = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[Peer], Awaitable[None]]


@dataclass
class Node:
    """A listening script. `accepted` counts the connections that it was given."""

    spec: NodeSpec
    accepted: int = 0


class Nodes:
    """Starts nodes, and ends every one of their connections with the test."""

    def __init__(self) -> None:
        self._servers: list[asyncio.Server] = []
        self._calls: set[asyncio.Task[None]] = set()

    async def start(
        self,
        script: Script,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> Node:
        async def serve(peer: Peer) -> None:
            try:
                with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                    await script(peer)
            finally:
                peer.writer.close()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            node.accepted += 1
            call = asyncio.ensure_future(serve(Peer(reader, writer)))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

        server = await asyncio.start_server(accept, host, port, ssl=tls)
        self._servers.append(server)
        node = Node(spec(host, server.sockets[0].getsockname()[1], Tls() if tls else None))
        return node

    async def stop(self) -> None:
        for server in self._servers:
            server.close()
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)


def spec(host: str, port: int, tls: Tls | None = None, **fields: Any) -> NodeSpec:
    scheme = "http" if tls is None else "https"
    where = f"[{host}]" if ":" in host else host
    url = f"{scheme}://{where}:{port}"
    return NodeSpec("n", url, scheme, host, port, tls=tls or Tls(), **fields)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def nodes() -> AsyncIterator[Nodes]:
    nodes = Nodes()
    yield nodes
    await nodes.stop()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@contextlib.asynccontextmanager
async def leakproof(nodes: Nodes, clock: Clock) -> AsyncIterator[Upstream]:
    """Whatever happens to it: at the end no connection is left and no task is."""
    before = asyncio.all_tasks()
    upstream = Upstream(connect_s=5, clock=clock)
    try:
        yield upstream
    finally:  # uvloop does not close while anything is open
        await upstream.close()
        await nodes.stop()
    assert repr(upstream) == "<Upstream 0 open, 0 idle>"
    assert not {task for task in asyncio.all_tasks() - before if task is not asyncio.current_task()}


@pytest.fixture
async def upstream(nodes: Nodes, clock: Clock) -> AsyncIterator[Upstream]:
    async with leakproof(nodes, clock) as upstream:
        yield upstream


async def whole(exchange: Exchange) -> bytes:
    pieces = []
    while piece := await exchange.read():
        pieces.append(piece)
    exchange.close()
    return b"".join(pieces)


async def call(upstream: Upstream, node: Node, **how: Any) -> bytes:
    return await whole(await upstream.open(node.spec, GET, **how))


async def failure(of: Awaitable[object]) -> Failure:
    with pytest.raises(UpstreamError) as caught:
        await of
    return caught.value.failure


def saying(*pieces: bytes) -> Script:
    """Answers every request of a connection with these bytes."""

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.say(*pieces)

    return script


# Requests


async def test_a_request_arrives_as_it_was_written(nodes: Nodes, upstream: Upstream) -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def script(peer: Peer) -> None:
        while True:
            seen.append(await peer.request())
            await peer.say(HELLO)

    node = await nodes.start(script)
    bodies: list[bytes | bytearray | memoryview | Sequence[bytes]] = [
        b"abc",
        bytearray(b"abc"),
        memoryview(b"abc"),
        [b"a", b"", b"bc"],
        (b"abc",),
    ]
    head = request_head(node.spec, "POST", "/api/chat?x=1", [(b"A", b"b")], 3)
    for body in bodies:
        exchange = await upstream.open(node.spec, head, body)
        assert (exchange.status, exchange.reason) == (200, b"OK")
        assert exchange.headers == [(b"Content-Length", b"5")]
        assert await whole(exchange) == b"hello"
    assert seen == [(head, b"abc")] * 5
    assert node.accepted == 1


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, "parts", "many parts"])
async def test_a_big_body_arrives_whole_at_a_node_that_reads_late(
    nodes: Nodes, upstream: Upstream, kind: Any
) -> None:
    body = random.Random(1).randbytes(BIG)
    stopped = asyncio.Event()
    seen: list[bytes] = []

    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await stopped.wait()
        seen.append(await peer.reader.readexactly(BIG))
        await peer.say(HELLO)
        await peer.gone()

    node = await nodes.start(script)
    match kind:
        case "parts":
            sent: Any = [body[:10], body[10 : BIG // 2], b"", body[BIG // 2 :]]
        case "many parts":
            sent = [body[i : i + 50_000] for i in range(0, BIG, 50_000)]
        case _:
            sent = kind(body)
    head = request_head(node.spec, "POST", "/", [], BIG)
    async with asyncio.TaskGroup() as group:
        opened = group.create_task(upstream.open(node.spec, head, sent))
        await asyncio.sleep(0)
        stopped.set()
    assert await whole(opened.result()) == b"hello"
    assert seen[0] == body
    assert repr(upstream) == "<Upstream 1 open, 1 idle>"


async def test_an_early_answer_is_delivered_and_its_connection_not_used_again(
    nodes: Nodes, upstream: Upstream
) -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.say(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        await peer.gone()

    node = await nodes.start(script)
    exchange = await upstream.open(
        node.spec, request_head(node.spec, "POST", "/", [], BIG), bytes(BIG)
    )
    assert exchange.status == 413
    assert await whole(exchange) == b"big"
    assert repr(upstream).endswith("0 idle>")


async def test_an_early_answer_is_delivered_though_the_node_then_resets(
    nodes: Nodes, upstream: Upstream
) -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.say(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")

    node = await nodes.start(script)
    exchange = await upstream.open(
        node.spec, request_head(node.spec, "POST", "/", [], BIG), bytes(BIG)
    )
    assert exchange.status == 413
    assert await exchange.read() == b"big"
    exchange.close()


async def test_a_node_that_resets_during_the_request_fails_it(
    nodes: Nodes, upstream: Upstream
) -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.reset()

    node = await nodes.start(script)
    head = request_head(node.spec, "POST", "/", [], BIG)
    told = await failure(upstream.open(node.spec, head, bytes(BIG)))
    assert (told.kind, told.sent, told.received) == (FailureKind.RESET, True, False)


# Responses


@pytest.mark.parametrize(
    ("pieces", "body"),
    [
        ((HELLO,), b"hello"),
        ((OK, b"Content-Length: 5\r\n\r\nhe", b"llo"), b"hello"),
        ((CHUNKED,), b"hello"),
        ((b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 E\r\nA: b\r\n\r\n" + HELLO), b"hello"),
        ((b"HTTP/1.1 100 C\r\nTransfer-Encoding: chunked\r\n\r\n", CHUNKED), b"hello"),
        ((b"HTTP/1.1 204 No Content\r\n\r\n",), b""),
        ((b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",), b""),
    ],
)
async def test_a_framed_response_is_read_whole_and_its_connection_used_again(
    nodes: Nodes, upstream: Upstream, pieces: tuple[bytes, ...], body: bytes
) -> None:
    node = await nodes.start(saying(*pieces))
    assert [await call(upstream, node) for _ in range(3)] == [body] * 3
    assert node.accepted == 1


async def test_a_response_to_head_has_no_body(nodes: Nodes, upstream: Upstream) -> None:
    node = await nodes.start(saying(OK + b"Content-Length: 17\r\n\r\n"))
    assert [await call(upstream, node, no_body=True) for _ in range(2)] == [b"", b""]
    assert node.accepted == 1


async def test_the_end_of_the_stream_ends_a_response_without_framing(
    nodes: Nodes, upstream: Upstream
) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(OK + b"\r\n", b"hello")

    node = await nodes.start(script)
    assert await call(upstream, node) == b"hello"


async def test_read_returns_each_piece_as_it_comes(nodes: Nodes, upstream: Upstream) -> None:
    more = asyncio.Semaphore(0)

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        for piece in (b"one", b"two"):
            await more.acquire()
            await peer.say(b"3\r\n" + piece + b"\r\n")
        await more.acquire()
        await peer.say(b"0\r\n\r\n")
        await peer.gone()

    node = await nodes.start(script)
    exchange = await upstream.open(node.spec, GET)
    for expected in (b"one", b"two", b"", b""):
        more.release()
        assert await exchange.read() == expected
    exchange.close()
    assert repr(upstream) == "<Upstream 1 open, 1 idle>"


async def test_a_client_that_does_not_read_stops_the_node(nodes: Nodes, upstream: Upstream) -> None:
    said = 0
    stuck = asyncio.Event()

    async def script(peer: Peer) -> None:
        nonlocal said
        peer.writer.transport.set_write_buffer_limits(high=0)
        await peer.request()
        await peer.say(OK + b"Content-Length: %d\r\n\r\n" % (BIG))
        while said < BIG:
            peer.writer.write(bytes(65536))
            if peer.writer.transport.get_write_buffer_size():
                stuck.set()
            await peer.writer.drain()
            said += 65536
        await peer.gone()

    node = await nodes.start(script)
    exchange = await upstream.open(node.spec, GET)
    await stuck.wait()
    assert said < BIG
    assert len(await whole(exchange)) == BIG
    assert repr(upstream) == "<Upstream 1 open, 1 idle>"


@pytest.mark.parametrize(
    ("said", "kind", "received"),
    [
        (b"", FailureKind.RESET, False),
        (b"HTTP/1.1 2", FailureKind.RESET, True),
        (b"SSH-2.0-OpenSSH\r\n", FailureKind.GARBAGE, True),
    ],
)
async def test_an_end_before_the_head_is_a_failure(
    nodes: Nodes, upstream: Upstream, said: bytes, kind: FailureKind, received: bool
) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(said)

    node = await nodes.start(script)
    told = await failure(upstream.open(node.spec, GET))
    assert replace(told, detail="") == Failure(kind, sent=True, received=received)


async def test_an_end_inside_the_body_fails_after_all_of_it_was_read(
    nodes: Nodes, upstream: Upstream
) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(OK + b"Content-Length: 10\r\n\r\nhalf")

    node = await nodes.start(script)
    exchange = await upstream.open(node.spec, GET)
    assert await exchange.read() == b"half"
    assert (await failure(exchange.read())).kind is FailureKind.RESET
    exchange.close()


async def test_a_reset_inside_the_body_is_a_failure(nodes: Nodes, upstream: Upstream) -> None:
    read = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(OK + b"\r\nhalf")
        await read.wait()
        peer.reset()

    node = await nodes.start(script)
    exchange = await upstream.open(node.spec, GET)
    assert await exchange.read() == b"half"
    read.set()
    assert (await failure(exchange.read())).kind is FailureKind.RESET
    exchange.close()


# Leaving


async def test_closing_an_unfinished_exchange_tells_the_node_at_once(
    nodes: Nodes, upstream: Upstream
) -> None:
    told = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        await peer.gone()
        told.set()

    node = await nodes.start(script)
    exchange = await upstream.open(node.spec, GET)
    exchange.close()
    exchange.close()
    await told.wait()


async def test_cancelling_a_read_leaves_the_exchange_to_be_closed(
    nodes: Nodes, upstream: Upstream
) -> None:
    told = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        await peer.gone()
        told.set()

    node = await nodes.start(script)
    exchange = await upstream.open(node.spec, GET)
    await cancelled(exchange.read(), started=asyncio.sleep(0))
    exchange.close()
    await told.wait()


async def cancelled(what: Awaitable[object], *, started: Awaitable[object]) -> None:
    task = asyncio.ensure_future(what)
    await started
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelling_while_waiting_for_the_head_tells_the_node(
    nodes: Nodes, upstream: Upstream
) -> None:
    asked, told = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        asked.set()
        await peer.gone()
        told.set()

    node = await nodes.start(script)
    await cancelled(upstream.open(node.spec, GET), started=asked.wait())
    await told.wait()


async def test_cancelling_a_write_tells_the_node(nodes: Nodes, upstream: Upstream) -> None:
    asked, left, told = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        asked.set()
        await left.wait()
        await peer.gone()
        told.set()

    node = await nodes.start(script)
    head = request_head(node.spec, "POST", "/", [], 4 * BIG)
    await cancelled(upstream.open(node.spec, head, bytes(4 * BIG)), started=asked.wait())
    left.set()
    await told.wait()


async def test_cancelling_at_any_step_leaks_nothing(nodes: Nodes, upstream: Upstream) -> None:
    node = await nodes.start(saying(HELLO))
    for turns in range(60):
        task = asyncio.ensure_future(call(upstream, node, fresh=bool(turns % 2)))
        for _ in range(turns // 2):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            assert await task == b"hello"
    assert await call(upstream, node) == b"hello"


# Bodies that are sent as they come


async def parts(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def slices(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 100_000):
        yield body[start : start + 100_000]


class Tap:
    """A source that gives what it has, and then waits until somebody gives up."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)
        self.dry = asyncio.Event()

    def __aiter__(self) -> "Tap":
        return self

    async def __anext__(self) -> bytes:
        if self.pieces:
            return self.pieces.pop(0)
        self.dry.set()
        await asyncio.get_running_loop().create_future()
        raise AssertionError


def send(upstream: Upstream, node: Node, source: Any, length: int, **how: Any) -> Any:
    head = request_head(node.spec, "POST", "/", [], length)
    return upstream.open(node.spec, head, Upload(source, length), **how)


@pytest.mark.parametrize("pieces", [[], [b""], [b"abc"], [b"a", b"", b"bc"]])
async def test_a_body_of_known_length_goes_piece_by_piece(
    nodes: Nodes, upstream: Upstream, pieces: list[bytes]
) -> None:
    body = b"".join(pieces)
    seen: list[tuple[bytes, bytes]] = []

    async def script(peer: Peer) -> None:
        while True:
            seen.append(await peer.request())
            await peer.say(HELLO)

    node = await nodes.start(script)
    for _ in range(2):
        assert await whole(await send(upstream, node, parts(*pieces), len(body))) == b"hello"
    assert [got for _, got in seen] == [body] * 2
    assert b"Content-Length: %d\r\n" % len(body) in seen[0][0]
    assert node.accepted == 1


async def test_a_body_of_unknown_length_goes_in_chunks(nodes: Nodes, upstream: Upstream) -> None:
    async def script(peer: Peer) -> None:
        head = await peer.reader.readuntil(b"\r\n\r\n")
        assert b"Transfer-Encoding: chunked\r\n" in head
        assert b"Content-Length" not in head
        wire = await peer.reader.readuntil(b"\r\n0\r\n\r\n")
        assert wire == b"3\r\nabc\r\na\r\n0123456789\r\n0\r\n\r\n"
        await peer.say(HELLO)
        await peer.gone()

    node = await nodes.start(script)
    source = parts(b"abc", b"", b"0123456789")
    assert await whole(await send(upstream, node, source, UNKNOWN)) == b"hello"
    assert repr(upstream) == "<Upstream 1 open, 1 idle>"


async def test_a_node_that_does_not_read_stops_the_source(nodes: Nodes, upstream: Upstream) -> None:
    body = random.Random(2).randbytes(BIG)
    go, seen = asyncio.Event(), bytearray()
    given = 0

    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await go.wait()
        seen.extend(await peer.reader.readexactly(BIG))
        await peer.say(HELLO)
        await peer.gone()

    async def source() -> AsyncIterator[bytes]:
        nonlocal given
        async for piece in slices(body):
            given += len(piece)
            yield piece

    node = await nodes.start(script)
    async with asyncio.TaskGroup() as group:
        opened = group.create_task(send(upstream, node, source(), BIG))
        before = -1
        while before != given or not given:
            before = given
            for _ in range(20):
                await asyncio.sleep(0)
        assert given < BIG
        go.set()
    assert await whole(opened.result()) == b"hello"
    assert seen == body


async def test_an_early_answer_ends_a_wait_for_the_next_piece(
    nodes: Nodes, upstream: Upstream
) -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.reader.readexactly(3)
        await peer.say(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\n\r\nbad")
        await peer.gone()

    node = await nodes.start(script)
    exchange = await send(upstream, node, Tap(b"abc"), 10)
    assert exchange.status == 400
    assert await whole(exchange) == b"bad"
    assert repr(upstream).endswith("0 idle>")


async def test_a_node_that_dies_ends_a_wait_for_the_next_piece(
    nodes: Nodes, upstream: Upstream
) -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.reset()

    node = await nodes.start(script)
    told = await failure(send(upstream, node, Tap(b"abc"), 10))
    assert (told.kind, told.sent) == (FailureKind.RESET, True)


async def test_an_early_answer_stops_a_body_that_keeps_coming(
    nodes: Nodes, upstream: Upstream
) -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.say(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        await peer.gone()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(1000)

    node = await nodes.start(script)
    exchange = await send(upstream, node, endless(), UNKNOWN)
    assert exchange.status == 413
    assert await whole(exchange) == b"big"


@pytest.mark.parametrize("error", [ConnectionResetError, TimeoutError])
async def test_what_a_source_raises_comes_out_and_cuts_the_connection(
    nodes: Nodes, upstream: Upstream, error: type[Exception]
) -> None:
    told = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.gone()
        told.set()

    async def broken() -> AsyncIterator[bytes]:
        yield b"abc"
        raise error

    node = await nodes.start(script)
    with pytest.raises(error):
        await send(upstream, node, broken(), 10)
    await told.wait()


@pytest.mark.parametrize("pieces", [[b"abc"], [b"abc", b"0123456789"]])
async def test_a_body_of_another_length_than_announced_cuts_the_connection(
    nodes: Nodes, upstream: Upstream, pieces: list[bytes]
) -> None:
    seen: list[bytes] = []
    told = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        seen.append(await peer.reader.read())
        told.set()

    node = await nodes.start(script)
    with pytest.raises(ValueError, match="its length"):
        await send(upstream, node, parts(*pieces), 10)
    await told.wait()
    assert len(seen[0]) <= 3


async def test_cancelling_an_upload_tells_the_node(nodes: Nodes, upstream: Upstream) -> None:
    told = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.gone()
        told.set()

    node = await nodes.start(script)
    tap = Tap(b"abc")
    await cancelled(send(upstream, node, tap, 10), started=tap.dry.wait())
    await told.wait()


async def test_a_node_is_not_silent_while_it_has_nothing_to_answer(
    nodes: Nodes, upstream: Upstream
) -> None:
    late = asyncio.Event()

    async def source() -> AsyncIterator[bytes]:
        yield b"ab"
        asyncio.get_running_loop().call_later(0.2, late.set)
        await late.wait()
        yield b"c"

    node = await nodes.start(saying(HELLO))
    exchange = await send(upstream, node, source(), 3, first_byte_s=0.05)
    assert await whole(exchange) == b"hello"


async def test_a_node_that_does_not_read_has_a_limit_too(nodes: Nodes, upstream: Upstream) -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await asyncio.get_running_loop().create_future()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(100_000)

    node = await nodes.start(script)
    told = await failure(send(upstream, node, endless(), UNKNOWN, first_byte_s=0.05))
    assert told.kind is FailureKind.FIRST_BYTE_TIMEOUT


# Doubt


PART = OK + b"Content-Length: 5\r\n\r\nhe"
SHORT: dict[str, Any] = {"first_byte_s": 600.0, "between_s": 600.0, "down_s": 0.02}
TOLD = "sent nothing for 0.02 s and fails its probes"


class Mute:
    """Says `first` to a request, and the rest only when told to. `asked`: it has a request."""

    def __init__(self, first: bytes = b"") -> None:
        self.first = first
        self.asked = asyncio.Event()
        self.go = asyncio.Event()

    async def __call__(self, peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.say(self.first)
            self.asked.set()
            await self.go.wait()
            await peer.say(HELLO.removeprefix(self.first))


async def test_what_a_node_has_not_answered_fails_soon_once_it_is_down(
    nodes: Nodes, upstream: Upstream
) -> None:
    mute = Mute()
    node = await nodes.start(mute)
    async with asyncio.TaskGroup() as group:
        asked = [
            group.create_task(failure(upstream.open(node.spec, GET, **SHORT))) for _ in range(3)
        ]
        await mute.asked.wait()  # by one of them: the others may be on their way
        upstream.doubt(node.spec.url, down=True)
    told = {(task.result().kind, task.result().detail) for task in asked}
    assert told == {(FailureKind.FIRST_BYTE_TIMEOUT, TOLD)}


async def test_an_answer_that_stands_still_fails_soon_once_its_node_is_down(
    nodes: Nodes, upstream: Upstream
) -> None:
    node = await nodes.start(Mute(PART))
    exchange = await upstream.open(node.spec, GET, **SHORT)
    assert await exchange.read() == b"he"
    upstream.doubt(node.spec.url, down=True)
    told = await failure(exchange.read())
    exchange.close()
    assert (told.kind, told.detail) == (FailureKind.STALLED, TOLD)


@pytest.mark.parametrize(
    ("first", "kind"), [(b"", FailureKind.FIRST_BYTE_TIMEOUT), (PART, FailureKind.STALLED)]
)
async def test_a_node_that_is_down_already_has_the_shorter_limit_from_the_start(
    nodes: Nodes, upstream: Upstream, first: bytes, kind: FailureKind
) -> None:
    node = await nodes.start(Mute(first))
    upstream.doubt(node.spec.url, down=True)

    async def ask() -> None:
        await whole(await upstream.open(node.spec, GET, **SHORT))

    told = await failure(ask())
    assert (told.kind, told.detail) == (kind, TOLD)


async def test_without_limits_an_exchange_has_one_while_its_node_is_down(
    nodes: Nodes, upstream: Upstream
) -> None:
    node = await nodes.start(Mute(PART))
    exchange = await upstream.open(node.spec, GET, down_s=0.02)
    upstream.doubt(node.spec.url, down=True)
    assert await exchange.read() == b"he"
    told = await failure(exchange.read())
    exchange.close()
    assert (told.kind, told.detail) == (FailureKind.STALLED, TOLD)


async def test_doubt_of_one_node_is_none_of_another(nodes: Nodes, upstream: Upstream) -> None:
    mutes = Mute(PART), Mute(PART)
    lost, kept = [await nodes.start(mute) for mute in mutes]
    exchanges = [await upstream.open(node.spec, GET, **SHORT) for node in (lost, kept)]
    upstream.doubt(lost.spec.url, down=True)
    assert await exchanges[0].read() == b"he"
    told = await failure(exchanges[0].read())
    exchanges[0].close()
    assert told.kind is FailureKind.STALLED
    mutes[1].go.set()
    assert await whole(exchanges[1]) == b"hello"


@pytest.mark.parametrize("end", ["answers", "forgotten"])
async def test_a_node_that_is_no_longer_down_has_all_its_time_again(
    nodes: Nodes, upstream: Upstream, end: str
) -> None:
    mute = Mute()
    node = await nodes.start(mute)
    upstream.doubt(node.spec.url, down=True)
    if end == "forgotten":
        upstream.forget(node.spec.url)
    async with asyncio.TaskGroup() as group:
        answer = group.create_task(call(upstream, node, **SHORT))
        if end == "answers":
            await asyncio.sleep(0)
            upstream.doubt(node.spec.url, down=False)
        await mute.asked.wait()
        asyncio.get_running_loop().call_later(0.1, mute.go.set)
    assert answer.result() == b"hello"


async def test_a_running_exchange_keeps_its_time_if_its_node_answers_in_time(
    nodes: Nodes, upstream: Upstream
) -> None:
    mute = Mute(PART)
    node = await nodes.start(mute)
    exchange = await upstream.open(node.spec, GET, **SHORT)
    upstream.doubt(node.spec.url, down=True)
    upstream.doubt(node.spec.url, down=False)
    asyncio.get_running_loop().call_later(0.1, mute.go.set)
    assert await whole(exchange) == b"hello"


# Connecting


async def test_nobody_listening_is_refused(upstream: Upstream) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        told = await failure(upstream.open(spec("127.0.0.1", taken.getsockname()[1]), GET))
    assert told == Failure(FailureKind.REFUSED, detail="connection refused")


async def test_ipv6_is_spoken(nodes: Nodes, upstream: Upstream) -> None:
    node = await nodes.start(saying(HELLO), host="::1")
    assert await call(upstream, node) == b"hello"


async def test_a_name_that_is_none_is_a_failed_connection(upstream: Upstream) -> None:
    for name in ("no-such-node.invalid", "x" * 64 + ".example"):
        told = await failure(upstream.open(spec(name, 11434), GET))
        assert told.kind is FailureKind.CONNECT
        assert told.detail.startswith(f"no address for {name}: ")


Named = Callable[..., None]


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Named:
    """Gives every name these addresses, and counts how often it was asked."""

    def name(*addresses: str, asked: list[str] | None = None) -> None:
        async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
            if asked is not None:
                asked.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)

    return name


async def test_every_address_is_tried(nodes: Nodes, upstream: Upstream, named: Named) -> None:
    node = await nodes.start(saying(HELLO))
    named("127.0.0.2", "127.0.0.3", "127.0.0.1")
    assert await whole(await upstream.open(spec("node", node.spec.port), GET)) == b"hello"


async def test_every_address_refusing_is_refused(
    nodes: Nodes, upstream: Upstream, named: Named
) -> None:
    node = await nodes.start(saying(HELLO))
    named("127.0.0.2", "127.0.0.3")
    told = await failure(upstream.open(spec("node", node.spec.port), GET))
    assert told.kind is FailureKind.REFUSED


async def test_an_unreachable_address_says_more_than_a_refusal(
    nodes: Nodes, upstream: Upstream, named: Named
) -> None:
    node = await nodes.start(saying(HELLO))
    named("127.0.0.2", "255.255.255.255")
    told = await failure(upstream.open(spec("node", node.spec.port), GET))
    assert told.kind is FailureKind.CONNECT
    assert told.detail in {"Network is unreachable", "Permission denied"}


async def test_a_name_is_resolved_again_at_each_connect(
    nodes: Nodes, upstream: Upstream, named: Named
) -> None:
    node = await nodes.start(saying(HELLO))
    asked: list[str] = []
    named("127.0.0.1", asked=asked)
    there = spec("node", node.spec.port)
    await whole(await upstream.open(there, GET))
    await whole(await upstream.open(there, GET))
    assert asked == ["node"]
    await whole(await upstream.open(there, GET, fresh=True))
    assert asked == ["node", "node"]


async def test_the_connect_limit_covers_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    async def getaddrinfo(*_: Any, **__: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    upstream = Upstream(connect_s=0.01)
    told = await failure(upstream.open(spec("node", 1), GET))
    assert told == Failure(FailureKind.CONNECT, detail="no connection within 0.01 s")


# TLS


@dataclass
class Ca:
    """An authority that issues certificates to nodes, and how to trust it."""

    tls: Tls
    authority: trustme.CA

    def context(self, *names: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert(*names).configure_cert(context)
        return context


@pytest.fixture(scope="session")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Ca:
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    authority = trustme.CA()
    authority.cert_pem.write_to_path(path)
    return Ca(Tls(ca=str(path)), authority)


async def test_tls_is_checked_against_the_ca_file(nodes: Nodes, upstream: Upstream, ca: Ca) -> None:
    node = await nodes.start(saying(HELLO), tls=ca.context("127.0.0.1"))
    node.spec = replace(node.spec, tls=ca.tls)
    assert [await call(upstream, node) for _ in range(2)] == [b"hello", b"hello"]
    assert node.accepted == 1
    assert await call(upstream, node, fresh=True) == b"hello"


async def test_the_node_is_asked_for_by_name(
    nodes: Nodes, upstream: Upstream, ca: Ca, named: Named
) -> None:
    asked: list[str | None] = []
    context = ca.context("gpu.example")
    context.sni_callback = lambda _, name, __: asked.append(name)
    node = await nodes.start(saying(HELLO), tls=context)
    named("127.0.0.1")
    there = spec("gpu.example", node.spec.port, ca.tls)
    assert await whole(await upstream.open(there, GET)) == b"hello"
    assert asked == ["gpu.example"]


async def test_a_response_without_framing_ends_over_tls_too(
    nodes: Nodes, upstream: Upstream, ca: Ca
) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(OK + b"\r\n", bytes(300_000))

    node = await nodes.start(script, tls=ca.context("127.0.0.1"))
    node.spec = replace(node.spec, tls=ca.tls)
    assert len(await call(upstream, node)) == 300_000


async def test_big_bodies_go_both_ways_over_tls(nodes: Nodes, upstream: Upstream, ca: Ca) -> None:
    async def script(peer: Peer) -> None:
        while True:
            _, body = await peer.request()
            await peer.say(OK + b"Content-Length: %d\r\n\r\n" % len(body), body)

    node = await nodes.start(script, tls=ca.context("127.0.0.1"))
    node.spec = replace(node.spec, tls=ca.tls)
    body = random.Random(2).randbytes(BIG // 4)
    head = request_head(node.spec, "POST", "/", [], len(body))
    for _ in range(2):
        assert await whole(await upstream.open(node.spec, head, body)) == body
    assert node.accepted == 1


async def test_an_unfinished_exchange_over_tls_tells_the_node(
    nodes: Nodes, upstream: Upstream, ca: Ca
) -> None:
    told = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        await peer.gone()
        told.set()

    node = await nodes.start(script, tls=ca.context("127.0.0.1"))
    node.spec = replace(node.spec, tls=ca.tls)
    exchange = await upstream.open(node.spec, GET)
    assert await exchange.read() == b"one"
    exchange.close()
    await told.wait()


async def test_a_certificate_for_another_name_is_refused_unless_nobody_checks(
    nodes: Nodes, upstream: Upstream, ca: Ca
) -> None:
    node = await nodes.start(saying(HELLO), tls=ca.context("elsewhere.example"))
    node.spec = replace(node.spec, tls=ca.tls)
    told = await failure(upstream.open(node.spec, GET))
    assert told.kind is FailureKind.CONNECT
    assert told.detail.startswith("TLS: IP address mismatch")
    node.spec = replace(node.spec, tls=Tls(verify=False))
    assert await call(upstream, node) == b"hello"


async def test_a_connection_made_without_a_check_is_not_used_once_there_is_one(
    nodes: Nodes, upstream: Upstream, ca: Ca
) -> None:
    node = await nodes.start(saying(HELLO), tls=ca.context("elsewhere.example"))
    node.spec = replace(node.spec, tls=Tls(verify=False))
    assert await call(upstream, node) == b"hello"
    node.spec = replace(node.spec, tls=ca.tls)
    assert (await failure(call(upstream, node))).kind is FailureKind.CONNECT


async def test_an_unknown_authority_is_refused(nodes: Nodes, upstream: Upstream, ca: Ca) -> None:
    node = await nodes.start(saying(HELLO), tls=ca.context("127.0.0.1"))
    told = await failure(upstream.open(node.spec, GET))
    assert told.kind is FailureKind.CONNECT
    assert told.detail.startswith("TLS: unable to get local issuer certificate")


async def test_a_node_that_does_not_speak_tls_says_so(nodes: Nodes, upstream: Upstream) -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.read(100)
        await peer.say(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await peer.gone()

    node = await nodes.start(script)
    there = spec("127.0.0.1", node.spec.port, Tls(verify=False))
    told = await failure(upstream.open(there, GET))
    assert (told.kind, told.detail) == (FailureKind.CONNECT, "TLS: wrong version number")


async def test_a_node_that_hangs_up_in_the_handshake_is_a_failed_connection(
    nodes: Nodes, upstream: Upstream
) -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.read(100)

    node = await nodes.start(script)
    there = spec("127.0.0.1", node.spec.port, Tls(verify=False))
    told = await failure(upstream.open(there, GET))
    assert told.kind is FailureKind.CONNECT


@pytest.mark.parametrize("text", [None, "no certificate"])
async def test_a_ca_file_that_cannot_be_read_is_a_failed_connection(
    upstream: Upstream, tmp_path: Path, text: str | None
) -> None:
    path = tmp_path / "ca.pem"
    if text is not None:
        path.write_text(text)
    told = await failure(upstream.open(spec("127.0.0.1", 1, Tls(ca=str(path))), GET))
    assert told.kind is FailureKind.CONNECT
    assert told.detail.startswith("the CA file cannot be used: ")


async def deaf(peer: Peer) -> None:
    await peer.gone()


async def test_the_connect_limit_covers_the_handshake(nodes: Nodes) -> None:
    node = await nodes.start(deaf)
    upstream = Upstream(connect_s=0.05)
    told = await failure(upstream.open(spec("127.0.0.1", node.spec.port, Tls(verify=False)), GET))
    assert told == Failure(FailureKind.CONNECT, detail="no connection within 0.05 s")
    await upstream.close()


async def test_an_address_that_does_not_answer_leaves_time_for_the_next(
    nodes: Nodes, named: Named, ca: Ca
) -> None:
    node = await nodes.start(saying(HELLO), tls=ca.context("node"))
    await nodes.start(deaf, host="127.0.0.2", port=node.spec.port)
    named("127.0.0.2", "127.0.0.1")
    upstream = Upstream(connect_s=2)
    there = spec("node", node.spec.port, ca.tls)
    assert await whole(await upstream.open(there, GET)) == b"hello"
    await upstream.close()


async def test_addresses_that_do_not_answer_or_refuse_are_a_failed_connection(
    nodes: Nodes, named: Named
) -> None:
    node = await nodes.start(deaf)
    named("127.0.0.1", "127.0.0.2")
    upstream = Upstream(connect_s=0.5)
    told = await failure(upstream.open(spec("node", node.spec.port, Tls(verify=False)), GET))
    assert told == Failure(FailureKind.CONNECT, detail="no answer")


async def test_cancelling_a_handshake_leaves_no_connection(
    nodes: Nodes, upstream: Upstream
) -> None:
    asked, told = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.reader.read(100)
        asked.set()
        await peer.gone()
        told.set()

    node = await nodes.start(script)
    there = spec("127.0.0.1", node.spec.port, Tls(verify=False))
    await cancelled(upstream.open(there, GET), started=asked.wait())
    await told.wait()


# Keeping


async def test_connections_are_used_again_the_latest_first(
    nodes: Nodes, upstream: Upstream
) -> None:
    numbers = iter(range(10))

    async def script(peer: Peer) -> None:
        number = next(numbers)
        while True:
            await peer.request()
            await peer.say(OK + b"Content-Length: 1\r\n\r\n%d" % number)

    node = await nodes.start(script)
    first, second = [await upstream.open(node.spec, GET) for _ in range(2)]
    assert await whole(second) == b"1"
    assert await whole(first) == b"0"
    assert [await call(upstream, node) for _ in range(3)] == [b"0"] * 3
    assert await call(upstream, node, fresh=True) == b"2"
    assert await call(upstream, node) == b"2"


async def test_no_more_than_the_limit_are_idle(nodes: Nodes, clock: Clock) -> None:
    upstream = Upstream(connect_s=5, max_idle=2, clock=clock)
    node = await nodes.start(saying(HELLO))
    for exchange in [await upstream.open(node.spec, GET) for _ in range(4)]:
        assert await whole(exchange) == b"hello"
    assert sum(map(len, upstream._idle.values())) == 2
    await upstream.close()


async def test_what_is_idle_too_long_is_closed(
    nodes: Nodes, upstream: Upstream, clock: Clock
) -> None:
    node = await nodes.start(saying(HELLO))
    for exchange in [await upstream.open(node.spec, GET) for _ in range(3)]:
        await whole(exchange)
    clock.now += 29.9
    assert await call(upstream, node) == b"hello"
    assert node.accepted == 3
    clock.now += 0.1  # two are over the limit now, the one used last is not
    assert await call(upstream, node) == b"hello"
    assert node.accepted == 3
    clock.now += 30
    assert await call(upstream, node) == b"hello"
    assert node.accepted == 4
    assert "1 idle" in repr(upstream)


@pytest.mark.parametrize("step", [3599.9, 3600.0])
async def test_no_connection_gets_older_than_the_limit(
    nodes: Nodes, clock: Clock, step: float
) -> None:
    upstream = Upstream(connect_s=5, idle_s=1e9, clock=clock)
    node = await nodes.start(saying(HELLO))
    assert await call(upstream, node) == b"hello"
    clock.now += step
    exchange = await upstream.open(node.spec, GET)
    assert node.accepted == (2 if step == 3600 else 1)
    clock.now += 3600
    assert await whole(exchange) == b"hello"
    assert repr(upstream).endswith("0 idle>")
    await upstream.close()


@pytest.mark.parametrize("rubbish", [b"", b"x", HELLO])
async def test_an_idle_connection_that_says_anything_or_ends_is_dropped(
    nodes: Nodes, upstream: Upstream, rubbish: bytes
) -> None:
    idle, told = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(HELLO)
        if not idle.is_set():
            await idle.wait()
            if rubbish:
                await peer.say(rubbish)
            else:
                peer.writer.write_eof()
        await peer.gone()
        told.set()

    node = await nodes.start(script)
    assert await call(upstream, node) == b"hello"
    assert "1 idle" in repr(upstream)
    idle.set()
    await told.wait()
    assert await call(upstream, node) == b"hello"
    assert node.accepted == 2


async def test_an_idle_connection_that_has_just_ended_is_not_lent(
    nodes: Nodes, upstream: Upstream
) -> None:
    node = await nodes.start(saying(HELLO))
    assert await call(upstream, node) == b"hello"
    (idle,) = upstream._connections
    idle.eof_received()  # and no turn of the loop in which it could be taken away
    assert await call(upstream, node) == b"hello"
    assert node.accepted == 2


async def test_a_failure_on_a_used_connection_says_so_and_a_fresh_one_works(
    nodes: Nodes, upstream: Upstream
) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(HELLO)
        await peer.request()

    node = await nodes.start(script)
    assert await call(upstream, node) == b"hello"
    told = await failure(upstream.open(node.spec, GET))
    assert replace(told, detail="") == Failure(FailureKind.RESET, sent=True, reused=True)
    assert await call(upstream, node, fresh=True) == b"hello"


async def test_a_forgotten_node_has_no_idle_connections_and_its_busy_ones_end(
    nodes: Nodes, upstream: Upstream
) -> None:
    ended = asyncio.Semaphore(0)

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(HELLO)
        await peer.gone()
        ended.release()

    node = await nodes.start(script)
    busy, idle = [await upstream.open(node.spec, GET) for _ in range(2)]
    await whole(idle)
    upstream.forget(node.spec.url)
    upstream.forget(node.spec.url)
    await ended.acquire()
    assert await whole(busy) == b"hello"
    await ended.acquire()
    assert await call(upstream, node) == b"hello"
    assert node.accepted == 3


async def test_closing_ends_what_is_busy_and_what_comes_later(
    nodes: Nodes, upstream: Upstream
) -> None:
    node = await nodes.start(saying(OK + b"Content-Length: 9\r\n\r\n"))
    exchange = await upstream.open(node.spec, GET)
    await upstream.close()
    told = await failure(exchange.read())
    assert (told.kind, told.detail) == (FailureKind.RESET, "closed by the router")
    exchange.close()
    told = await failure(upstream.open(node.spec, GET))
    assert told == Failure(FailureKind.CONNECT, detail="the router is stopping")


# All at once


async def test_every_response_belongs_to_its_request_whatever_the_nodes_do(
    nodes: Nodes, upstream: Upstream
) -> None:
    dice = random.Random(20240601)
    node = await nodes.start(faulty(dice))
    fine = failed = 0

    async def client(name: int) -> None:
        nonlocal fine, failed
        for turn in range(200):
            mark = b"%d-%d" % (name, turn)
            try:
                body = await asked(upstream, node, mark)
            except UpstreamError:
                failed += 1
            else:
                fine += body is not None

    async with asyncio.TaskGroup() as group:
        for name in range(25):
            group.create_task(client(name))
    assert fine > 3000
    assert failed > 300
    assert 300 < node.accepted < 4000


async def asked(upstream: Upstream, node: Node, mark: bytes) -> bytes | None:
    """What the node answered to `mark`, read whole, or left in the middle now and then."""
    head = request_head(node.spec, "POST", "/", [(b"X-Mark", mark)], len(mark))
    exchange = await upstream.open(node.spec, head, mark)
    try:
        assert dict(exchange.headers)[b"X-Mark"] == mark
        body = b""
        while piece := await exchange.read():
            body += piece
            assert (mark * 100).startswith(body)
            if mark.endswith(b"7"):
                return None
        assert body == mark * 100
        return body
    finally:
        exchange.close()


def faulty(dice: random.Random) -> Script:
    """A node that answers in every framing, and misbehaves now and then."""

    async def script(peer: Peer) -> None:
        while True:
            _, mark = await peer.request()
            framed = framings(mark)[dice.randrange(3)]
            half = dice.randrange(len(framed))
            match dice.randrange(24):
                case 0 | 1 as part:
                    await peer.say(framed[: half * part])
                    return peer.reset()
                case 2:
                    return await peer.say(framed[:half])
                case 3:
                    await peer.say(framed + HELLO)
                case 4:
                    return await peer.say(framed)
                case 5:
                    return await peer.say(OK + b"X-Mark: %b\r\n\r\n" % mark + mark * 100)
                case 6:
                    await peer.say(b"\0" + framed)
                case 7:
                    await peer.say(framed[:half], framed[half:])
                case _:
                    await peer.say(framed)

    return script


def framings(mark: bytes) -> tuple[bytes, bytes, bytes]:
    head, body = OK + b"X-Mark: %b\r\n" % mark, mark * 100
    sized = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    return (
        sized,
        head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks,
        b"HTTP/1.1 100 Continue\r\n\r\n" + sized,
    )


# The same under the loop that the daemon runs on


def plain(test: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(test) and (
        inspect.signature(test).parameters.keys() <= {"nodes", "upstream", "clock", "ca"}
    )


CHECKS = [test for name, test in globals().items() if name.startswith("test_") and plain(test)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_holds_under_uvloop(check: Callable[..., Awaitable[None]], ca: Ca) -> None:
    async def run() -> None:
        nodes, clock = Nodes(), Clock()
        async with asyncio.timeout(60), leakproof(nodes, clock) as upstream:
            has = {"nodes": nodes, "clock": clock, "upstream": upstream, "ca": ca}
            await check(**{name: has[name] for name in inspect.signature(check).parameters})

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


# The head of a request


NODE = spec("10.0.0.7", 11434)


def test_a_head_has_the_nodes_host_and_the_length_of_the_body() -> None:
    headers = [
        *((b"Host", b"client.example"), (b"content-length", b"7"), (b"Connection", b"close")),
        *((b"Transfer-Encoding", b"chunked"), (b"Accept", b"*/*"), (b"accept", b"again")),
    ]
    assert request_head(NODE, "POST", "/api/chat", headers, 3) == (
        b"POST /api/chat HTTP/1.1\r\nHost: 10.0.0.7:11434\r\nContent-Length: 3\r\n"
        b"Accept: */*\r\naccept: again\r\n\r\n"
    )


def test_a_request_without_a_body_has_no_length() -> None:
    assert request_head(replace(NODE, prefix="/gpu"), "GET", "/api/tags?a=%20", [], None) == (
        b"GET /gpu/api/tags?a=%20 HTTP/1.1\r\nHost: 10.0.0.7:11434\r\n\r\n"
    )


def test_a_nodes_own_headers_take_the_place_of_their_namesakes() -> None:
    own = replace(NODE, headers=(("Authorization", "Bearer t\xf6ken"), ("HOST", "inner")))
    given = [(b"authorization", b"Bearer client"), (b"B", b"c")]
    assert request_head(own, "GET", "/", given, None) == (
        b"GET / HTTP/1.1\r\nAuthorization: Bearer t\xc3\xb6ken\r\nHOST: inner\r\nB: c\r\n\r\n"
    )


@pytest.mark.parametrize("bad", ["\r", "\n", "\0"])
def test_no_value_can_end_its_line(bad: str) -> None:
    raw = bad.encode()
    for node, method, target, headers in (
        (NODE, "GET" + bad, "/", []),
        (NODE, "GET", "/" + bad, []),
        (NODE, "GET", "/", [(b"A", b"b" + raw + b"c")]),
        (NODE, "GET", "/", [(b"A" + raw, b"b")]),
        (replace(NODE, headers=(("A", "b" + bad),)), "GET", "/", []),
        (replace(NODE, prefix=bad), "GET", "/", []),
    ):
        with pytest.raises(ValueError, match="with") as caught:
            request_head(node, method, target, headers, None)
        assert bad not in str(caught.value)


@pytest.mark.parametrize("target", ["", "/a b", "/\xe9", "/\x7f"])
def test_a_target_is_visible_ascii(target: str) -> None:
    with pytest.raises(ValueError, match="target"):
        request_head(NODE, "GET", target, [], None)


def test_a_nodes_own_headers_cannot_change_the_framing() -> None:
    for name in ("Content-Length", "transfer-encoding", "Connection"):
        with pytest.raises(ValueError, match="belongs"):
            request_head(replace(NODE, headers=((name, "1"),)), "GET", "/", [], None)
