"""Compressed request bodies: zstd, on the endpoints that take it."""

import sys
from collections.abc import Mapping

from router.sim.request import Refused
from router.sim.versions import Release

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAX_BYTES = 20 << 20
_WINDOW_LOG = 23
_SINCE = (0, 18, 0)
_PATHS = frozenset(
    (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/messages",
    )
)


def decoded(body: bytes, path: str, headers: Mapping[str, str], release: Release) -> bytes:
    """The body as its sender wrote it. Whatever the endpoint does not decode stays as it is.

    Raises Refused(400), native on every path, for bad zstd and for more than MAX_BYTES.
    """
    coding = headers.get("Content-Encoding", "").strip().lower()
    if coding != "zstd" or path not in _PATHS or release < _SINCE:
        return body
    try:
        return _unpacked(body)
    except (zstd.ZstdError, EOFError):
        raise Refused(400, "the request body is no valid zstd", native=True) from None


def _unpacked(body: bytes) -> bytes:
    """All frames of `body`. Raises ZstdError, EOFError, Refused."""
    found = bytearray()
    options: Mapping[int, int] = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}
    while body:
        frame = zstd.ZstdDecompressor(options=options)
        found += frame.decompress(body, max_length=MAX_BYTES + 1 - len(found))
        if len(found) > MAX_BYTES:
            raise Refused(400, "the request body is too large", native=True)
        if not frame.eof:
            raise EOFError
        body = frame.unused_data
    return bytes(found)
