"""The network between the router and one node, which does what networks do."""

import asyncio
import contextlib
import enum
import os
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from router import listeners
from tests.chaos.fleet import Node, listening

_PIECE_BYTES = 65536
_GARBAGE = b"\x16\x03\x01\x02\x00 this is no HTTP\r\n\r\n"


class Mode(enum.StrEnum):
    """What happens to what passes from now on."""

    OPEN = "open"
    RESET = "reset"  # every connection is reset at once, those that are open too
    HOLE = "black hole"  # connections are taken, and nothing passes in either direction
    SLOW = "throttle"  # `slow_bps` bytes per second to the router
    GARBAGE = "garbage"  # the next answer begins with something else


@dataclass(frozen=True)
class Cut:
    """End the connection of an inference after so many bytes of the answer."""

    at_byte: int
    reset: bool = False


@dataclass(eq=False)
class _Wire:
    """One connection: to the router and, once open, to the node."""

    near: asyncio.StreamWriter
    far: asyncio.StreamWriter | None = None
    passed: int = 0  # bytes of the present answer
    cut: Cut | None = None

    def break_off(self, *, reset: bool) -> None:
        sock = self.near.get_extra_info("socket")
        if reset and sock is not None and sock.fileno() >= 0:  # not closed yet
            with socket.socket(fileno=os.dup(sock.fileno())) as twin:  # uvloop guards its own
                twin.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for writer in (self.near, self.far):
            if writer is not None and (reset or writer is self.far):
                writer.transport.abort()
        self.near.close()


@dataclass
class Link:
    """Connections to any of `urls` lead to the node. `cuts` are for the inferences that come
    next, one each."""

    node: Node
    urls: Sequence[str]
    mode: Mode = Mode.OPEN
    slow_bps: int = 2000
    was_cut: int = 0  # answers
    cuts: deque[Cut] = field(default_factory=deque)
    _wires: set[_Wire] = field(default_factory=set, repr=False)
    _cleared: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    @property
    def url(self) -> str:
        return self.urls[0]

    def set(self, mode: Mode) -> None:
        self.mode = mode
        self._cleared.set()
        self._cleared = asyncio.Event()
        if mode is Mode.RESET:
            for wire in tuple(self._wires):
                wire.break_off(reset=True)

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection of the router."""
        wire = _Wire(writer)
        self._wires.add(wire)
        try:
            if self.mode is Mode.RESET:
                wire.break_off(reset=True)
                return
            answers, wire.far = await asyncio.open_connection("127.0.0.1", self.node.port)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._to_node(wire, reader))
                group.create_task(self._to_router(wire, answers))
        except* OSError:
            pass  # the node is down, or either side has gone
        finally:
            self._wires.discard(wire)
            wire.break_off(reset=False)

    async def _to_node(self, wire: _Wire, reader: asyncio.StreamReader) -> None:
        assert wire.far is not None
        while data := await reader.read(_PIECE_BYTES):
            await self._wait()
            if wire.near.is_closing() or wire.far.is_closing():
                break
            if data.startswith((b"POST ", b"GET ")):  # a probe is not cut in its stead
                asks = bool(self.cuts) and data.startswith(b"POST ")
                wire.passed, wire.cut = 0, self.cuts.popleft() if asks else None
            if self.mode is Mode.GARBAGE:
                wire.near.write(_GARBAGE)
                break
            wire.far.write(data)
            await wire.far.drain()
        raise ConnectionResetError

    async def _to_router(self, wire: _Wire, answers: asyncio.StreamReader) -> None:
        while True:
            size = max(1, self.slow_bps // 20) if self.mode is Mode.SLOW else _PIECE_BYTES
            data = await answers.read(size)
            await self._wait()
            if self.mode is Mode.SLOW:
                await asyncio.sleep(len(data) / self.slow_bps)
            if not data or wire.near.is_closing():
                raise ConnectionResetError
            if wire.cut is not None and wire.passed + len(data) >= wire.cut.at_byte:
                self.was_cut += 1
                wire.near.write(data[: wire.cut.at_byte - wire.passed])
                wire.break_off(reset=wire.cut.reset)
                raise ConnectionResetError
            wire.passed += len(data)
            wire.near.write(data)
            await wire.near.drain()

    async def _wait(self) -> None:
        while self.mode is Mode.HOLE:
            await self._cleared.wait()

    def close(self) -> None:
        self.set(Mode.OPEN)
        for wire in tuple(self._wires):
            wire.break_off(reset=True)


@contextlib.asynccontextmanager
async def linked(node: Node, *, doors: int = 1) -> AsyncIterator[Link]:
    """A link with so many addresses, each of which is another node to a router."""
    socks = [listening() for _ in range(doors)]
    link = Link(node, [f"http://127.0.0.1:{sock.getsockname()[1]}" for sock in socks])
    servers = [await asyncio.start_server(link.carry, sock=sock) for sock in socks]
    try:
        yield link
    finally:
        await listeners.close(*servers)
        link.close()
        for server in servers:
            await server.wait_closed()
