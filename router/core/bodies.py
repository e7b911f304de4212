"""What a request asks where its body is no plain JSON: compressed, or a form."""

from router.core import dialect, multipart, packed
from router.core.dialect import Call, Family, Route


def is_packed(route: Route, encoding: str) -> bool:
    """Whether Ollama unpacks such a body, by its Content-Encoding; others it cannot read."""
    return encoding == "zstd" and route.family is not Family.NATIVE and not route.form


def unpack(
    route: Route, body: bytes | bytearray, max_bytes: int = packed.MAX_BYTES
) -> tuple[Call, bytes | bytearray]:
    """What a compressed body asks, and what it holds. Raises `packed.Unpackable`."""
    plain = packed.unpack(body, max_bytes)
    return dialect.parse(route, plain), plain


def parse_form(route: Route, body: bytes | bytearray, content_type: str) -> Call:
    """Look for the model. A form that cannot be read gives a Call without one, never an error."""
    between = multipart.boundary(content_type)
    span = multipart.find(body, between, route.model_in[0]) if between else None
    if span is None:
        return Call(route)
    model = body[span[0] : span[1]].decode("utf-8", "replace")
    return Call(route, model if model.strip() else "", span=span)
