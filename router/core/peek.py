"""Read the few fields of a JSON body that route it, as Go's decoder would, and where they stand.

Ollama matches keys without regard to case, takes the last of equal keys, ignores what follows
the first value and accepts invalid UTF-8 inside strings. A strict decoder refuses all of that,
so only the top level is scanned here, and nothing is ever rebuilt.
"""

import json
import re
from collections.abc import Mapping

_BLANK = re.compile(rb"[ \t\r\n]*")
_SCALAR = re.compile(rb"-?[0-9][0-9.eE+-]*|true|false|null")
_SURROGATE = re.compile("[\ud800-\udfff]")
_BRACKET = re.compile(rb'["{}\[\]]')
_MAX_DEPTH = 9_999  # Go's decoder refuses deeper nesting


class Unreadable(ValueError):
    """The body is not a JSON object. Raised without any of its bytes."""


Span = tuple[int, int]


def top_level(body: bytes | bytearray) -> Mapping[str, Span]:
    """Map each top-level key, case-folded, to the span of its last value. Raises Unreadable."""
    at = _blank(body, 0)
    if body[at : at + 1] != b"{":
        raise Unreadable("not a JSON object")
    spans: dict[str, Span] = {}
    at = _blank(body, at + 1)
    if body[at : at + 1] == b"}":
        return spans
    while True:
        end = _string_end(body, at)
        key = text(body, (at, end))
        at = _blank(body, end)
        if body[at : at + 1] != b":":
            raise Unreadable("a key without a value")
        at = _blank(body, at + 1)
        end = _value_end(body, at)
        spans[_fold(key)] = (at, end)
        at = _blank(body, end)
        mark = body[at : at + 1]
        if mark == b"}":
            return spans
        if mark != b",":
            raise Unreadable("neither a comma nor the end of the object")
        at = _blank(body, at + 1)


def _fold(key: str) -> str:
    """Equal for keys that Go takes for equal: ASCII case, the long s and the Kelvin sign."""
    return key.replace("\u017f", "s").replace("\u212a", "k").lower()


def text(body: bytes | bytearray, span: Span) -> str:
    """The string at `span`; invalid UTF-8 and lone surrogates become replacement characters."""
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


def _value_end(body: bytes | bytearray, at: int) -> int:
    first = body[at : at + 1]
    if first == b'"':
        return _string_end(body, at)
    if first in (b"{", b"["):
        return _container_end(body, at)
    match = _SCALAR.match(body, at)
    if match is None:
        raise Unreadable("a value that is none of JSON's")
    return match.end()


def _string_end(body: bytes | bytearray, at: int) -> int:
    if body[at : at + 1] != b'"':
        raise Unreadable("a key that is not a string")
    end = at
    while True:
        end = body.find(b'"', end + 1)
        if end < 0:
            raise Unreadable("an unfinished string")
        slash = end - 1
        while body[slash] == 0x5C:
            slash -= 1
        if (end - slash) % 2:
            return end + 1


def _container_end(body: bytes | bytearray, at: int) -> int:
    depth = 0
    while True:
        match = _BRACKET.search(body, at)
        if match is None:
            raise Unreadable("an unfinished array or object")
        at = match.end()
        mark = match[0]
        if mark == b'"':
            at = _string_end(body, at - 1)
        elif mark in (b"{", b"["):
            depth += 1
            if depth > _MAX_DEPTH:
                raise Unreadable("nested too deep")
        else:
            depth -= 1
            if not depth:
                return at
