"""JSON as Go reads and writes it, and the two framings of a stream."""

import json
import math
import re
from datetime import UTC, datetime, timedelta

_ESCAPES = str.maketrans({one: f"\\u{ord(one):04x}" for one in "<>&\u2028\u2029"})
_SURROGATE = re.compile("[\ud800-\udfff]")
# Go's longest duration, 2^63 - 1 ns: what keep_alive -1 shows as.
_FOREVER = timedelta(seconds=9_223_372_036)


class BadJson(ValueError):
    """A body that Go's decoder refuses; the text is what it would say."""


def dumps(value: object) -> bytes:
    """Compact, non-ASCII raw, with the characters escaped that Go escapes.

    They can only stand inside strings, so the finished text may be replaced as a whole.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.translate(_ESCAPES).encode("utf-8", "replace")


def line(value: object) -> bytes:
    """One NDJSON record."""
    return dumps(value) + b"\n"


def event(value: object, name: str = "") -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + dumps(value) + b"\n\n"


def _no_constant(name: str) -> object:
    raise BadJson(f"invalid character '{name[0]}' looking for beginning of value")


def _last_wins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        # Moved to the end: `fold` must see the last spelling of a field last.
        found.pop(key, None)
        found[key] = value
    return found


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_last_wins)


def decode_object(body: bytes) -> dict[str, object]:
    """The first value of a request body, as fields with lower-case names.

    What follows it is ignored; invalid UTF-8 is accepted; `null` sets nothing. Raises BadJson.
    """
    text = body.decode("utf-8", "replace").lstrip(" \t\r\n")
    if not text:
        raise BadJson("unexpected EOF")
    try:
        value, _ = _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        raise BadJson(_complaint(text, error)) from None
    except RecursionError:
        raise BadJson("exceeded max depth") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadJson(f"json: cannot unmarshal {kind(value)} into Go value of type api.Request")
    return fold(_clean(value) if "\\ud" in text.lower() else value)


def _clean(value: dict[str, object]) -> dict[str, object]:
    """Lone surrogates (legal as escapes) become U+FFFD, as in Go."""
    text = json.dumps(value, ensure_ascii=False)
    cleaned: dict[str, object] = json.loads(_SURROGATE.sub("\ufffd", text))
    return cleaned


def _complaint(text: str, error: json.JSONDecodeError) -> str:
    if error.pos >= len(text):
        return "unexpected EOF"
    where = "in string literal" if "control" in error.msg else "looking for beginning of value"
    return f"invalid character '{text[error.pos]}' {where}"


def fold(value: dict[str, object]) -> dict[str, object]:
    """Field names in lower case, the last of equal ones wins."""
    return {key.lower(): one for key, one in value.items()}


def kind(value: object) -> str:
    """Go's name for the type of a JSON value."""
    names: list[tuple[type, str]] = [
        (bool, "bool"),
        (str, "string"),
        (int, "number"),
        (float, "number"),
        (list, "array"),
        (dict, "object"),
    ]
    return next((name for one, name in names if isinstance(value, one)), "null")


def timestamp(when: datetime) -> str:
    """RFC 3339 with fraction, in UTC."""
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def in_s(seconds: float) -> str:
    """The time `seconds` from now; for ever is 292 years ahead."""
    ahead = _FOREVER if math.isinf(seconds) else timedelta(seconds=seconds)
    return timestamp(datetime.now(UTC) + ahead)
