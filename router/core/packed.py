"""Bodies that come compressed with zstd, unpacked within bounds.

Ollama unpacks them on its `/v1` endpoints, and refuses what is larger or has a wider window.
"""

import sys

if sys.version_info >= (3, 14):  # pragma: no cover
    from compression import zstd
else:
    from backports import zstd

MAX_BYTES = 20 * 1024 * 1024
_OPTIONS = {int(zstd.DecompressionParameter.window_log_max): 23}  # 8 MiB
_MAX_FRAMES = 16  # each further one copies what is left


class Unpackable(ValueError):
    """The body is no zstd, or not whole. Raised without any of its bytes."""


class TooLarge(Unpackable):
    """There is more in it than was asked for."""


def unpack(body: bytes | bytearray, max_bytes: int = MAX_BYTES) -> bytes | bytearray:
    """What was compressed. Raises TooLarge above `max_bytes`, and Unpackable."""
    whole = bytearray()
    rest: bytes | bytearray = body
    for _ in range(_MAX_FRAMES):
        if not rest:
            return whole
        frame = zstd.ZstdDecompressor(options=_OPTIONS)
        try:
            whole += frame.decompress(rest, max_bytes + 1 - len(whole))
        except zstd.ZstdError:
            raise Unpackable("failed to decompress request body") from None
        if len(whole) > max_bytes:
            raise TooLarge("request body too large once decompressed")
        if not frame.eof:
            raise Unpackable("compressed request body ends too early")
        rest = frame.unused_data
    raise Unpackable("compressed request body in too many frames")
