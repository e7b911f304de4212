"""Which header lines pass from one connection to the next (RFC 9110, 7.6.1)."""

from collections.abc import Callable, Iterable, Sequence

Header = tuple[bytes, bytes]

HOP_BY_HOP = frozenset({
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
    b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
})  # fmt: skip
# Not for a node: what is ours to frame, what made a browser or a proxy talk to us, and every
# credential of the client, which a cloud-routed request would carry outward.
_NOT_FORWARDED = HOP_BY_HOP | {
    b"host", b"content-length", b"expect", b"accept-encoding", b"origin",
    b"authorization", b"x-api-key", b"api-key", b"cookie",
}  # fmt: skip
_SECRET_ENDS = (b"-key", b"-token", b"authorization")
_KNOWN_MAX = 2000
_NAME_MAX_BYTES = 64


class Passing(dict[bytes, bool]):
    """Whether a header passes, by its name as it is spelled. Each spelling is judged once, by
    `passes`, which is given the name in lower case: a look-up per line is all that is left."""

    def __init__(self, passes: Callable[[bytes], bool]) -> None:
        super().__init__()
        self._passes = passes

    def __missing__(self, name: bytes) -> bool:
        found = self._passes(name.lower())
        if len(name) <= _NAME_MAX_BYTES and len(self) < _KNOWN_MAX:
            self[name] = found
        return found

    def lines(self, headers: Iterable[Header]) -> list[bytes]:
        """The lines that pass, without their ends."""
        return [b": ".join(header) for header in headers if self[header[0]]]


def without(headers: Iterable[Header], names: frozenset[bytes]) -> Iterable[Header]:
    """The headers that have none of these names, which are in lower case."""
    return [header for header in headers if header[0].lower() not in names] if names else headers


def forwarded(
    headers: Sequence[Header], connection: Sequence[str] | None, via: Header
) -> Sequence[Header]:
    """What a client sent, without what its `Connection` headers name, and by which router it
    comes: this one's line goes with others."""
    if connection is None:
        return (*headers, via)
    return (*without(headers, named(",".join(connection))), via)


def named(connection: str) -> frozenset[bytes]:
    """The headers that a `Connection` header names, which end at this hop like itself; without
    those that always do."""
    if connection in ("keep-alive", "close"):
        return frozenset()
    tokens = (token.strip().lower() for token in connection.split(","))
    return frozenset(token.encode("utf-8", "surrogateescape") for token in tokens) - HOP_BY_HOP


TO_NODE = Passing(lambda name: name not in _NOT_FORWARDED and not name.endswith(_SECRET_ENDS))
