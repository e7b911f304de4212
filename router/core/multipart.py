"""Find one field of a `multipart/form-data` body, and where its value stands (RFC 7578).

Only the heads of the parts and that value are read: a file goes by in one search.
"""

import re
from collections.abc import Mapping

_PARAMETER = re.compile(
    r"[ \t]*;[ \t]*([!#$%&'*+.^_`|~0-9A-Za-z-]+)=(\"(?:[^\"\\]|\\.)*\"|[^\s;\"]+)"
)
_FORM = re.compile(r"[ \t]*multipart/form-data", re.IGNORECASE)
_PART = re.compile(r"[ \t]*form-data", re.IGNORECASE)
_AS_IT_IS = frozenset(("7bit", "8bit", "binary"))
_AFTER_DELIMITER = re.compile(rb"[ \t]{0,100}\r\n")
_ESCAPED = re.compile(r"\\(.)")
_MAX_BOUNDARY = 70
_MAX_HEAD_BYTES = 8192
_MAX_PARTS = 1000
_MAX_VALUE_BYTES = 4096

Span = tuple[int, int]


def boundary(content_type: str) -> bytes:
    """What stands between the parts; empty for a type that has none, or is another one."""
    given = _parameters(_FORM, content_type[:_MAX_HEAD_BYTES]).get("boundary", "")
    fits = given.isascii() and given.isprintable() and len(given) <= _MAX_BOUNDARY
    return given.encode() if fits else b""


def find(body: bytes | bytearray, between: bytes, field: str) -> Span | None:
    """The span of the value of the first part with this name that is no file; None if there is
    none, or what leads up to it is malformed."""
    delimiter = b"\r\n--" + between
    at = len(delimiter) - 2 if body.startswith(delimiter[2:]) else _behind(body, delimiter, 0)
    for _ in range(_MAX_PARTS):
        line = _AFTER_DELIMITER.match(body, at) if at > 0 else None
        if line is None:  # the last delimiter, or none
            return None
        start = line.end()
        end = body.find(b"\r\n\r\n", start - 2, start + _MAX_HEAD_BYTES)
        if end < 0:
            return None
        named = _name(body[start : max(start, end)])
        at = _behind(body, delimiter, end + 2)
        if named == field:
            span = end + 4, at - len(delimiter)
            return span if at > 0 and span[0] <= span[1] <= span[0] + _MAX_VALUE_BYTES else None
    return None


def _behind(body: bytes | bytearray, delimiter: bytes, start: int) -> int:
    found = body.find(delimiter, start)
    return -1 if found < 0 else found + len(delimiter)


def _name(head: bytes | bytearray) -> str | None:
    """The field that a part's head names; None for a file, and for what is encoded."""
    name = None
    for line in head.decode("utf-8", "replace").split("\r\n"):
        key, _, value = line.partition(":")
        key = key.lower()
        if key == "content-transfer-encoding" and value.strip().lower() not in _AS_IT_IS:
            return None
        if key == "content-disposition":
            given = _parameters(_PART, value)
            name = None if given.keys() & {"filename", "filename*"} else given.get("name")
    return name


def _parameters(kind: re.Pattern[str], text: str) -> Mapping[str, str]:
    """The parameters behind what `kind` matches, by names in lower case."""
    found: dict[str, str] = {}
    match = kind.match(text)
    while match is not None:
        match = _PARAMETER.match(text, match.end())
        if match is not None:
            key, value = match.groups()
            if value.startswith('"'):
                value = _ESCAPED.sub(r"\1", value[1:-1])
            found.setdefault(key.lower(), value)
    return found
