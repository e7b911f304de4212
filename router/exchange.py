"""One response of a node, from its head to the end of its body."""

from collections.abc import Awaitable, Callable

from router.wire import Connection, Sink, State


class Exchange:
    """A response whose status and headers have arrived. `headers`: raw, in order, as they came.
    `chunked`: its body comes in chunks, so that its end can be told from its connection's."""

    __slots__ = ("_conn", "_release", "chunked", "headers", "reason", "status")

    def __init__(self, conn: Connection, release: Callable[[Connection], None]) -> None:
        self._conn: Connection | None = conn
        self._release = release
        self.status = conn.status
        self.reason = conn.reason
        self.headers = conn.headers
        self.chunked = conn.chunked

    @property
    def whole(self) -> bool:
        """The end of the body has arrived with what is there already."""
        return self._conn is not None and self._conn.whole

    def rest(self) -> bytes | None:
        """The whole body, if all of it is there."""
        conn = self._held()
        return conn.take() if conn.whole else None

    async def read(self) -> bytes:
        """All of the body that is there, at least one byte; b"" at its clean end.

        Raises `UpstreamError` if it ends in any other way, after all that came before is read.
        """
        # Asked anew after each wait: a closed exchange's connection may serve another by now.
        while True:
            conn = self._held()
            if conn.pieces:
                return conn.take()
            if _ended(conn):
                return b""
            await conn.wait()

    async def pump(self, sink: Sink, drain: Callable[[], Awaitable[None]]) -> None:
        """Give the body to `sink` as it comes, to its clean end; raises as `read` does.

        `sink` says whether it takes more. If not, `drain` is awaited, and the node has to wait.
        """
        full = not self._held().pour(sink)
        while True:
            if full:
                await drain()
                full = not self._held().pour(sink)
            elif _ended(self._held()):
                return
            else:
                await self._held().wait()
                full = self._held().full

    def close(self) -> None:
        """Give the connection back if the response is whole, else cut it: so a node is told."""
        conn, self._conn = self._conn, None
        if conn is not None:
            self._release(conn)

    def _held(self) -> Connection:
        if self._conn is None:
            raise RuntimeError("the exchange is closed")
        return self._conn


def _ended(conn: Connection) -> bool:
    """Whether the body is whole. Raises UpstreamError if it never will be."""
    if conn.state is State.BODY:
        return False
    if conn.failure is not None:
        raise conn.error()
    return True
