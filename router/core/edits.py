"""Bytes put into a JSON body where they belong; not one other byte of it is touched."""

from collections.abc import Iterable

import msgspec

from router.core import peek

Piece = bytes | bytearray | memoryview
_OPTIONS, _FLAG = "stream_options", "include_usage"
_ASKED = b'"include_usage":true'


class Splice(msgspec.Struct, frozen=True):
    """`text` in the place of what stands from `start` to `end`."""

    start: int
    end: int
    text: bytes


def spliced(body: bytes | bytearray, splices: Iterable[Splice]) -> tuple[Piece, ...]:
    """The body with splices that do not overlap: pieces to be written one after the other."""
    view, pieces, at = memoryview(body), list[Piece](), 0
    for splice in sorted(splices, key=lambda splice: splice.start):
        pieces += (view[at : splice.start], splice.text)
        at = splice.end
    return (*pieces, view[at:]) if pieces else (body,)


def ask_usage(body: bytes | bytearray) -> Splice | None:
    """What makes a node end a stream of OpenAI's with a record of its token counts.

    None where the body asks for it already, and where it says so oddly that Go might read
    something else out of it than we do: a key twice, a value of another type.
    """
    try:
        options, end = _look(body, 0, _OPTIONS)
        if not options:
            return added(end) if end else None
        return _inside(body, options[0]) if len(options) == 1 else None
    except peek.Unreadable:
        return None


def added(end: int) -> Splice:
    """The same, for a body that does not speak of it and whose last value ends at `end`."""
    return Splice(end, end, b',"stream_options":{%b}' % _ASKED)


def _inside(body: bytes | bytearray, options: peek.Span) -> Splice | None:
    start, end = options
    if body[start:end] == b"null":
        return Splice(start, end, b"{%b}" % _ASKED)
    flags, last = _look(body, start, _FLAG)
    if not flags:
        return Splice(last, last, b"," + _ASKED) if last else Splice(start + 1, start + 1, _ASKED)
    flag = flags[0]
    if len(flags) == 1 and body[flag[0] : flag[1]] in (b"false", b"null"):
        return Splice(*flag, b"true")
    return None


def _look(body: bytes | bytearray, at: int, key: str) -> tuple[list[peek.Span], int]:
    """Every value of `key` in the object at `at`, and where the last value of any key ends; 0 in
    an empty object."""
    spans, end = list[peek.Span](), 0
    for name, span in peek.entries(body, at):
        end = span[1]
        if name == key:
            spans.append(span)
    return spans, end
