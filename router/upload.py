"""A request body that is sent as it comes: in chunks, or in as many bytes as were announced."""

from collections.abc import AsyncIterator
from typing import Final, Self

CHUNKED: Final = -1  # the length, in a head, of a body whose end nobody knows


class Upload:
    """The pieces of `source`, framed for the wire. `length`: of the body in bytes, or CHUNKED.

    Whoever made the source closes it. Raises what it raises, and ValueError if it gives more or
    less than its length: then the connection must be cut.
    """

    __slots__ = ("_ended", "_left", "_source")

    def __init__(self, source: AsyncIterator[bytes], length: int) -> None:
        self._source = source
        self._left = length
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._ended:
            raise StopAsyncIteration
        async for piece in self._source:
            if piece:
                return self._framed(piece)
        self._ended = True
        if self._left == CHUNKED:
            return b"0\r\n\r\n"
        if self._left:
            raise ValueError("a body shorter than its length")
        raise StopAsyncIteration

    def _framed(self, piece: bytes) -> bytes:
        if self._left == CHUNKED:
            return b"%x\r\n%b\r\n" % (len(piece), piece)
        if len(piece) > self._left:
            raise ValueError("a body longer than its length")
        self._left -= len(piece)
        return piece
