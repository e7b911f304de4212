"""Bytes put into a JSON body where they belong; not one other byte of it is touched."""

import re
from collections.abc import Iterable

import msgspec

from router.core import peek

Piece = bytes | bytearray | memoryview
_OPTIONS, _FLAG = "stream_options", "include_usage"
_CONTEXT = b'"num_ctx"'
_BLANKS = b" \t\r\n"
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_NUMBER = re.compile(rb"(-?[0-9]{1,15})(?:\.[0-9]*)?")
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


def with_context(pieces: tuple[Piece, ...], num_ctx: int) -> tuple[Piece, ...]:
    """A body with a context of at least so many tokens: as it is where it has it."""
    body = b"".join(pieces) if len(pieces) > 1 or isinstance(pieces[0], memoryview) else pieces[0]
    splice = raise_context(body, num_ctx)
    return pieces if splice is None else spliced(body, (splice,))


def raise_context(body: bytes | bytearray, num_ctx: int) -> Splice | None:
    """What makes a native request ask for a context of at least so many tokens.

    None where it asks for as many already, and where it says so oddly that a node might read
    something else out of it than we do.
    """
    asked = b"%b:%d" % (_CONTEXT, num_ctx)
    try:
        options, end = _options(body)
        if not options:
            return Splice(end, end, b',"options":{%b}' % asked) if end else None
        return _raised(body, options[0], num_ctx, asked) if len(options) == 1 else None
    except peek.Unreadable:
        return None


def _options(body: bytes | bytearray) -> tuple[list[peek.Span], int]:
    """What `_look` would say of them. A body is cut in a fraction of the time that it takes to be
    scanned; whatever holds the word twice, or otherwise spelled, is scanned."""
    try:
        fields = _fields(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return _look(body, 0, "options")
    named = [key for key in fields if peek.fold(key) == "options"]
    if fields and not named:
        return [], len(body.rstrip(_BLANKS)[:-1].rstrip(_BLANKS))
    if named == ["options"] and body.count(b'"options"') == 1:
        value = bytes(fields["options"])
        if body.count(value) == 1:
            start = body.find(value)
            return [(start, start + len(value))], 0
    return _look(body, 0, "options")


def _raised(
    body: bytes | bytearray, options: peek.Span, num_ctx: int, asked: bytes
) -> Splice | None:
    start, end = options
    if body[start:end] == b"null":
        return Splice(start, end, b"{%b}" % asked)
    found, last = _look(body, start, "num_ctx")
    if not found:
        return Splice(last, last, b"," + asked) if last else Splice(start + 1, start + 1, asked)
    (first, stop), text = found[0], bytes(body[slice(*found[0])])
    # An option of another spelling is none, and of two Go takes the last.
    if len(found) > 1 or body.count(_CONTEXT, start, end) != 1:
        return None
    number = _NUMBER.fullmatch(text)
    smaller = text == b"null" or (number is not None and int(number[1]) < num_ctx)
    return Splice(first, stop, b"%d" % num_ctx) if smaller else None


def _look(body: bytes | bytearray, at: int, key: str) -> tuple[list[peek.Span], int]:
    """Every value of `key` in the object at `at`, and where the last value of any key ends; 0 in
    an empty object."""
    spans, end = list[peek.Span](), 0
    for name, span in peek.entries(body, at):
        end = span[1]
        if name == key:
            spans.append(span)
    return spans, end
