"""One request and its answer on a simulated node: writes records, and misbehaves as told."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from aiohttp import HttpVersion11, web

from router.sim import encoding, gojson, transport
from router.sim.account import Account
from router.sim.driver import Driver
from router.sim.faults import Fault, FaultKind
from router.sim.models import SimModel, SimSpec
from router.sim.request import Refused
from router.sim.shelf import Shelf
from router.sim.transport import Stream

# What Go's server collects before it gives up on telling the length.
_CHUNKED_FROM = 2048
Outcome = Literal["done", "cancelled", "error"]
_OPENAI_TYPES = {400: "invalid_request_error", 404: "not_found_error"}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


@dataclass(slots=True)
class Seen:
    """A request that reached the node. Times are the loop's; `outcome` None: still in flight.

    "error" is an answer of 400 and above or one that a fault broke, "cancelled" a client that left.
    `received` counts the bytes of the body read so far; those of an upload are not kept in `body`.
    """

    method: str
    raw_path: str
    headers: list[tuple[str, str]]
    started: float
    body: bytes = b""
    received: int = 0
    finished: float | None = None
    status: int | None = None
    records: int = 0
    outcome: Outcome | None = None

    def header(self, name: str) -> str | None:
        """The first value of a header, whatever its case."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


@dataclass(slots=True)
class Machine:
    """What every exchange of a node shares. `released` ends the present hangs and stalls.

    `held` is the number of requests that hang or stall now. What runs at ollama.com has a driver
    of its own, `remote`: it takes no slot and no memory of the node.
    """

    spec: SimSpec
    shelf: Shelf
    driver: Driver
    remote: Driver
    account: Account
    changed: Callable[[], None]
    released: asyncio.Event = field(default_factory=asyncio.Event)
    held: int = 0

    def driver_of(self, model: SimModel) -> Driver:
        """Where a model runs."""
        return self.remote if model.remote_model else self.driver


class Broken(Exception):
    """A fault ended the answer; nothing more may be written."""


class Exchange:
    """One request. Either `whole` is called, or `begin`, any number of `record`, and `end`."""

    def __init__(self, request: web.Request, path: str, seen: Seen, machine: Machine) -> None:
        self.request = request
        self.path = path
        self.seen = seen
        self.machine = machine
        self.fault: Fault | None = None
        self.failure_record = b""
        self._response: web.StreamResponse | None = None

    @cached_property
    def body(self) -> bytes:
        """The request's body, decompressed where the endpoint does that. Raises Refused."""
        seen, spec = self.seen, self.machine.spec
        return encoding.decoded(seen.body, self.path, self.request.headers, spec.release)

    @property
    def here(self) -> str:
        """The node's own address, as its `url` tells it."""
        transport = self.request.transport
        host, port = transport.get_extra_info("sockname")[:2] if transport else ("", 0)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def pace(self) -> float:
        """What every duration is multiplied with."""
        return self.fault.factor if self.fault and self.fault.kind is FaultKind.SLOW else 1.0

    @property
    def response(self) -> web.StreamResponse:
        """The answer so far; an empty one if a fault left nothing to send."""
        return self._response or web.Response()

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes, for one reader; a client that waits for leave to send gets it."""
        if self.request.headers.get("Expect", "").lower() == "100-continue":
            self._raw(b"HTTP/1.1 100 Continue\r\n\r\n")
        async for piece in self.request.content.iter_any():
            self.seen.received += len(piece)
            self.machine.changed()
            yield piece

    async def receive(self) -> None:
        """Read the whole body."""
        self.seen.body = b"".join([piece async for piece in self.pieces()])

    async def misbehave_early(self) -> None:
        """Do what the fault wants before the request is served at all."""
        fault = self.fault
        if fault is None:
            return
        match fault.kind:
            case FaultKind.HANG:
                await self._hold()
            case FaultKind.STATUS:
                headers = dict(fault.headers)
                if not fault.body:
                    raise Refused(fault.status, fault.message)
                self._send(fault.status, fault.body.encode(), headers)
                raise Broken
            case FaultKind.GARBAGE:
                self._raw(fault.body.encode() or b"\x00\x01 no HTTP here\r\n\r\n")
                self._break()
            case FaultKind.CUT:
                transport.cut(self.request, fault.at_byte)
            case _:
                pass

    async def begin(self, content_type: str, headers: Mapping[str, str] | None = None) -> None:
        """Start a stream. Status and headers leave with the first record."""
        self._response = Stream(headers={"Content-Type": content_type, **(headers or {})})
        self.seen.status = 200
        await self._response.prepare(self.request)

    async def record(self, data: bytes) -> None:
        """Write one record of a stream."""
        await self._misbehave(data)
        await self.response.write(data)
        self.seen.records += 1
        self.machine.changed()
        # A node without delays must still notice that its client left.
        await asyncio.sleep(0)

    async def end(self) -> None:
        """End a stream."""
        await self._misbehave(b"")

    async def whole(
        self, value: object, *, status: int = 200, content_type: str = "application/json"
    ) -> None:
        """Answer with one JSON value, framed by its length."""
        data = gojson.dumps(value)
        await self._misbehave(data, content_type)
        self._send(status, data, {"Content-Type": content_type})
        self.seen.records += 1

    async def plain(self, text: str, status: int = 200, **headers: str) -> None:
        """Answer with a line of text."""
        kind = "text/plain" if status >= 400 else "text/plain; charset=utf-8"
        await self._misbehave(text.encode(), kind)
        self._send(status, text.encode(), {"Content-Type": kind, **headers})

    async def empty(self, status: int, **headers: str) -> None:
        """Answer without a body."""
        await self._misbehave(b"", "none")
        self._send(status, b"", headers)

    async def refuse(self, error: Refused) -> None:
        """Answer with an error in the dialect of the request's path."""
        content_type = "application/json"
        value: dict[str, object]
        if error.native or not self.path.startswith("/v1/"):
            content_type += "; charset=utf-8"
            value = {"error": error.message, **error.extra}
        elif self.path == "/v1/messages":
            kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
            detail = {"type": kind, "message": error.message}
            identity = f"req_{secrets.token_hex(12)}"
            value = {"type": "error", "error": detail, "request_id": identity}
        else:
            kind = _OPENAI_TYPES.get(error.status, "api_error")
            detail = {"message": error.message, "type": kind}
            value = {"error": {**detail, "param": None, "code": None}}
        self._send(error.status, gojson.dumps(value), {"Content-Type": content_type})

    def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        """Prepare a whole answer; it is written when the handler returns it."""
        self.seen.status = status
        response = web.Response(status=status, body=data, headers=headers)
        if len(data) > _CHUNKED_FROM and self.request.version >= HttpVersion11:
            response.enable_chunked_encoding()
        if not self.request.content.at_eof():
            # What is left of the body will not be read.
            response.force_close()
        self._response = response

    async def _misbehave(self, data: bytes, content_type: str = "") -> None:
        """Do what the fault wants before the next record, `data` (empty at the end of a stream)."""
        fault = self.fault
        if fault is None or self.seen.records != fault.after:
            return
        if fault.kind is FaultKind.STALL:
            await self._hold()
        elif fault.kind is FaultKind.DIE:
            if fault.partial and data:
                await self._write_half(data, content_type)
            self._break()
        elif fault.kind in (FaultKind.ERROR, FaultKind.END):
            await self._end_early(fault, content_type)

    async def _end_early(self, fault: Fault, content_type: str) -> None:
        if content_type:
            raise Refused(500, fault.message)
        if fault.kind is FaultKind.ERROR and self.failure_record:
            await self.response.write(self.failure_record)
        await self.response.write_eof()
        raise Broken

    async def _write_half(self, data: bytes, content_type: str) -> None:
        """Send a record without its second half, in a frame that promises all of it."""
        if content_type:
            headers = {"Content-Type": content_type, "Content-Length": str(len(data))}
            self._response = Stream(headers=headers)
            await self._response.prepare(self.request)
        held = bytearray()
        real = transport.tap(self.request, held.extend)
        await self.response.write(data)
        real.write(held[: -(len(data) // 2 + 2)])

    async def _hold(self) -> None:
        """Wait until the node is told to release what it holds."""
        machine = self.machine
        machine.held += 1
        machine.changed()
        try:
            await machine.released.wait()
        finally:
            machine.held -= 1

    def _raw(self, data: bytes) -> None:
        if self.request.transport is not None:
            self.request.transport.write(data)

    def _break(self) -> None:
        transport.abort(self.request, reset=self.fault is not None and self.fault.reset)
        raise Broken
