"""Whether a request does nothing but unload a model: no content, and a `keep_alive` of nothing."""

import re

import msgspec

LOOKED_AT_BYTES = 65  # of a field: what is longer has content
# A duration as Go writes it, of nothing.
_ZERO = re.compile(r"[+-]?(?:0|(?:(?:0+(?:\.0*)?|\.0+)(?:ns|us|µs|μs|ms|s|m|h))+)")


def asked(keep_alive: bytes, content: bytes) -> bool:
    """Both as they stand in the body, as JSON; empty where they do not."""
    if len(keep_alive) >= LOOKED_AT_BYTES or len(content) >= LOOKED_AT_BYTES:
        return False
    try:
        lasts = msgspec.json.decode(keep_alive)
        has_content = bool(content) and bool(msgspec.json.decode(content))
    except (msgspec.MsgspecError, UnicodeError):
        return False
    if isinstance(lasts, str):
        return not has_content and _ZERO.fullmatch(lasts) is not None
    is_number = isinstance(lasts, int | float) and not isinstance(lasts, bool)
    return is_number and lasts == 0 and not has_content
