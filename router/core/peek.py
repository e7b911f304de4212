"""Read the few fields of a JSON body that route it, as Go's decoder would, and where they stand.

Ollama matches keys without regard to case, takes the last of equal keys, ignores what follows
the first value and accepts invalid UTF-8 inside strings. A strict decoder refuses all of that,
so only the top level is scanned here, and nothing is ever rebuilt.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping

_BLANK = re.compile(rb"[ \t\r\n]*")
_SCALAR = re.compile(rb"-?[0-9][0-9.eE+-]*|true|false|null")
_SURROGATE = re.compile("[\ud800-\udfff]")
# The repeats are bounded, as the matcher keeps memory for each; possessive ones would need none,
# but match wrongly before Python 3.11.5.
_ESCAPES = re.compile(rb'[^"\\]*(?:\\.[^"\\]*){0,1000}', re.DOTALL)
# Strings that are short and plain go by in one step; a long one is found by its end, which is
# fifty times as fast, and stops this at its beginning.
_UP_TO_BRACKET = re.compile(rb'[^"{}\[\]]*(?:"[^"\\]{0,200}"[^"{}\[\]]*){0,1000}')
_BACKSLASH = 0x5C
# No client writes as many; whoever does shall not keep the process busy.
_MAX_STEPS = 500_000
_MAX_KEYS = 10_000
_MAX_TEXT_BYTES = 4096
_MAX_DEPTH = 9_999  # Go's decoder refuses deeper nesting


class Unreadable(ValueError):
    """The body is not a JSON object. Raised without any of its bytes."""


Span = tuple[int, int]


def top_level(body: bytes | bytearray) -> Mapping[str, Span]:
    """Map each top-level key, case-folded, to the span of its last value. Raises Unreadable."""
    return dict(entries(body))


def entries(body: bytes | bytearray, at: int = 0) -> Iterator[tuple[str, Span]]:
    """Each key of the object at `at`, case-folded, and the span of its value, as they come.

    Raises Unreadable where the first thing is found that is not JSON."""
    at = _blank(body, at)
    if body[at : at + 1] != b"{":
        raise Unreadable("not a JSON object")
    keys, steps = itertools.count(), itertools.count()
    at = _blank(body, at + 1)
    if body[at : at + 1] == b"}":
        return
    while True:
        if next(keys) > _MAX_KEYS:
            raise Unreadable("too many keys")
        end = _string_end(body, at)
        key = text(body, (at, end))
        at = _blank(body, end)
        if body[at : at + 1] != b":":
            raise Unreadable("a key without a value")
        at = _blank(body, at + 1)
        end = _value_end(body, at, steps)
        yield fold(key), (at, end)
        at = _blank(body, end)
        mark = body[at : at + 1]
        if mark == b"}":
            return
        if mark != b",":
            raise Unreadable("neither a comma nor the end of the object")
        at = _blank(body, at + 1)


def fold(key: str) -> str:
    """Equal for keys that Go takes for equal: ASCII case, the long s and the Kelvin sign."""
    return key.replace("\u017f", "s").replace("\u212a", "k").lower()


def text(body: bytes | bytearray, span: Span) -> str:
    """The string at `span`; invalid UTF-8 and lone surrogates become replacement characters."""
    if span[1] - span[0] > _MAX_TEXT_BYTES:
        raise Unreadable("a name longer than any")
    raw = body[span[0] : span[1]].decode("utf-8", "replace")
    if raw[:1] != '"':
        raise Unreadable("not a string")
    try:
        value: str = json.loads(raw)
    except ValueError:
        raise Unreadable("a malformed string") from None
    return _SURROGATE.sub("\ufffd", value)


def _blank(body: bytes | bytearray, at: int) -> int:
    match = _BLANK.match(body, at)
    return match.end() if match else at


def _value_end(body: bytes | bytearray, at: int, steps: Iterator[int]) -> int:
    first = body[at : at + 1]
    if first == b'"':
        return _string_end(body, at)
    if first in (b"{", b"["):
        return _container_end(body, at, steps)
    match = _SCALAR.match(body, at)
    if match is None:
        raise Unreadable("a value that is none of JSON's")
    return match.end()


def _string_end(body: bytes | bytearray, at: int) -> int:
    if body[at : at + 1] != b'"':
        raise Unreadable("a key that is not a string")
    end = body.find(b'"', at + 1)
    if end > 0 and body[end - 1] == _BACKSLASH:
        end = _escaped_end(body, at + 1)
    if end < 0:
        raise Unreadable("an unfinished string")
    return end + 1


def _escaped_end(body: bytes | bytearray, at: int) -> int:
    """Where the quote stands that ends a string with escapes in it; -1 if there is none."""
    while True:
        match = _ESCAPES.match(body, at)
        assert match is not None  # it matches nothing, too
        at = match.end()
        if body[at : at + 1] == b'"':
            return at
        if at + 1 >= len(body):
            return -1


def _container_end(body: bytes | bytearray, at: int, steps: Iterator[int]) -> int:
    depth = 0
    while True:
        if next(steps) > _MAX_STEPS:
            raise Unreadable("too many parts")
        match = _UP_TO_BRACKET.match(body, at)
        at = match.end() if match else at
        mark = body[at : at + 1]
        if mark == b'"':
            at = _string_end(body, at)
            continue
        at += 1
        if mark in (b"{", b"["):
            depth += 1
            if depth > _MAX_DEPTH:
                raise Unreadable("nested too deep")
        elif not mark:
            raise Unreadable("an unfinished array or object")
        else:
            depth -= 1
            if not depth:
                return at


def number(data: bytes | bytearray, span: Span) -> int:
    """The whole number that stands there. Raises Unreadable."""
    try:
        return int(data[slice(*span)])
    except ValueError:
        raise Unreadable("no whole number") from None
