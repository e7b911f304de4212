"""How much is taken at a time: connections, requests, bytes held; and how the rest is refused."""

import asyncio
import contextlib
import enum
from dataclasses import dataclass
from typing import Protocol

from router.core import wording
from router.core.dialect import Family
from router.errors import ClientError

_MANY = 1 << 20
_SPARE_MAX = 2048
_BACKLOG_MAX = 4096
_TOLD_MAX = 512
_ADMINS_MAX = 128


class Cause(enum.StrEnum):
    """What there is too much of, where a request is refused for the sake of the others."""

    CONNECTIONS = "connections"
    IN_FLIGHT = "in_flight"
    BUFFERED = "buffered"


_PLEAS = {
    Cause.CONNECTIONS: "too many connections: try again later",
    Cause.IN_FLIGHT: "too many requests are being answered: try again later",
    Cause.BUFFERED: "too much of requests is held in memory: try again later",
}


_ALONE_TOO_LARGE = "request body too large: it alone is over limits.max_buffered_bytes"


class Overload(ClientError):
    """A request is refused although it is good: the same one may be taken a second later."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(503, _PLEAS[cause])
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Room:
    """For how many connections there is room at a time, and how many beyond those are `told` so
    with patience. Any more are told in passing: some of them will see a reset.

    `backlog`: how many the kernel may keep for a listener, since it accepts all of them before
    the first can be refused. `linger_s`, `linger_bytes`: how long patience lasts, and what a
    client may send meanwhile.
    """

    served: int = _MANY
    told: int = _TOLD_MAX
    backlog: int = _BACKLOG_MAX
    linger_s: float = 5.0
    linger_bytes: int = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Rooms:
    """The descriptors of a process, shared out."""

    clients: Room
    admins: Room

    @classmethod
    def of(cls, wanted: int, descriptors: int) -> "Rooms":
        """Room for `wanted` clients, or as many as the descriptors allow: a stream takes two,
        and a part is left for operators, probes, files, and those who are refused."""
        spare = min(descriptors // 4, _SPARE_MAX)
        served = max(1, min(wanted, (descriptors - spare) // 2))
        left = max(0, descriptors - 2 * served)
        told, backlog = min(left // 4, _TOLD_MAX), max(1, min(left // 2, _BACKLOG_MAX))
        admins = max(1, min(left // 16, _ADMINS_MAX))
        return cls(Room(served, told, backlog), Room(admins, admins, admins))


class Memory(Protocol):
    """What all requests together hold in memory, in bytes: `keep.Keep` is one."""

    limit_bytes: int

    @property
    def full(self) -> bool: ...

    def hold(self, size: int, /) -> None: ...

    def release(self, size: int, /) -> None: ...


class Held:
    """What one request holds of `memory`. Whoever makes it closes it, however the request ends."""

    __slots__ = ("_memory", "bytes")

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.bytes = 0

    def add(self, size: int) -> None:
        """Hold more. Raises Overload where that is too much."""
        self._memory.hold(size)
        self.bytes += size
        if self.bytes > self._memory.limit_bytes:  # no later try would do better
            raise ClientError(413, _ALONE_TOO_LARGE, last=True)
        if self._memory.full:
            raise Overload(Cause.BUFFERED)

    def close(self) -> None:
        self._memory.release(self.bytes)
        self.bytes = 0


_NO_ROOM_BODY = wording.error_body(Family.NATIVE, 503, _PLEAS[Cause.CONNECTIONS], "")
_NO_ROOM = (
    b"HTTP/1.1 503 Service Unavailable\r\n"
    b"Content-Type: %b\r\nContent-Length: %d\r\nRetry-After: 1\r\nConnection: close\r\n\r\n%b"
) % (wording.error_type(Family.NATIVE).encode(), len(_NO_ROOM_BODY), _NO_ROOM_BODY)


class Surplus(asyncio.Protocol):
    """A connection that there is no room for. Its first request is answered 503, whatever it is,
    and what else comes is dropped: a close with bytes unread is a reset, which may overtake the
    answer. `others` are those that this goes on for."""

    def __init__(self, transport: asyncio.Transport, others: "set[Surplus]", room: Room) -> None:
        self._transport = transport
        self._others = others
        self._left_bytes = room.linger_bytes
        self._told = False
        self._deadline: asyncio.TimerHandle | None = None
        transport.set_protocol(self)
        if len(others) >= room.told:
            self._tell()
            transport.close()
            return
        others.add(self)
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(room.linger_s, self.abort)

    def abort(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            self.abort()
        elif not self._told:
            self._tell()
            with contextlib.suppress(OSError):  # the client has reset it meanwhile
                self._transport.write_eof()

    def _tell(self) -> None:
        self._told = True
        self._transport.write(_NO_ROOM)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._others.discard(self)
        if self._deadline is not None:
            self._deadline.cancel()
