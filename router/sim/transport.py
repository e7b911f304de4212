"""Doing to a connection what no well-behaved server does."""

import asyncio
import os
import socket
import struct
from collections.abc import Callable, Iterable
from typing import cast

from aiohttp import web


class Stream(web.StreamResponse):
    """A response whose headers leave together with its first bytes, as Go's do."""

    _send_headers_immediately = False


def cut(request: web.Request, at_byte: int) -> None:
    """Break the connection as soon as the response has sent `at_byte` bytes, headers included."""
    left = at_byte

    def take(data: bytes) -> None:
        nonlocal left
        real.write(data[:left])
        left -= len(data)
        if left <= 0:
            real.abort()

    real = tap(request, take)


def tap(request: web.Request, sink: Callable[[bytes], None]) -> asyncio.Transport:
    """Have `sink` take what would be sent from here on; returns the real transport.

    Raises ConnectionResetError when the client has left.
    """
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client has left")
    request.protocol.transport = cast("asyncio.Transport", _Tap(transport, sink))
    return transport


def abort(request: web.Request, *, reset: bool) -> None:
    """Close the connection as a process does that dies; with `reset` its client sees an RST."""
    transport = request.transport
    if transport is None:
        return
    if reset:
        # The option belongs to the connection, not to the descriptor it is set through; uvloop
        # does not let its own be used.
        twin = os.dup(transport.get_extra_info("socket").fileno())
        with socket.socket(fileno=twin) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


class _Tap:
    """A transport whose writes go elsewhere; in all else the one it stands for."""

    def __init__(self, transport: asyncio.Transport, sink: Callable[[bytes], None]) -> None:
        self._transport = transport
        self._sink = sink

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Give the bytes to the sink."""
        self._sink(bytes(data))

    def writelines(self, parts: Iterable[bytes]) -> None:
        """Give them as one."""
        self._sink(b"".join(parts))
