"""The Ollama, OpenAI and Anthropic APIs as one table, and how each says that something failed.

Source: Ollama's own API, as described in `docs/compatibility.md`.
"""

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from router.core import names, peek
from router.core.types import NodeSpec, Refusal, Rejected

# Which routers a request has passed, so that one that comes back is known.
VIA = "X-Ollamux-Via"


class Kind(enum.Enum):
    """Who answers."""

    ROUTED = "routed"  # one node
    LOCAL = "local"  # the router, from what the pool knows
    UNBUILT = "unbuilt"  # nobody yet: 501


class Family(enum.Enum):
    """Whose API it is: this decides how an error looks."""

    NATIVE = "native"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"


class Framing(enum.Enum):
    """How a body is cut into records."""

    NDJSON = "ndjson"
    SSE = "sse"
    WHOLE = "whole"  # no records: one document
    OPAQUE = "opaque"  # a stream that is compressed, so that its records cannot be seen


@dataclass(frozen=True, slots=True)
class Route:
    """One endpoint. `path` is also its metric label.

    `model_in`: the body's fields that may hold the model, first filled one wins. `streams`:
    the default of `stream`, None where the endpoint never streams. `missing`: the text of 404.
    `final` tells the last record of a complete stream: the field that is true in it, or how a
    line of it begins.
    """

    path: str
    methods: tuple[str, ...]
    kind: Kind
    family: Family = Family.NATIVE
    model_in: tuple[str, ...] = ()
    streams: bool | None = None
    missing: str = "model '{name}' not found"
    final: bytes = b""


_TRY_PULLING = 'model "{name}" not found, try pulling it first'
_GET, _HEAD_GET, _POST, _DELETE = ("GET",), ("GET", "HEAD"), ("POST",), ("DELETE",)
_R, _L, _U = Kind.ROUTED, Kind.LOCAL, Kind.UNBUILT
_OPENAI, _ANTHROPIC = Family.OPENAI, Family.ANTHROPIC
_M, _MN = ("model",), ("model", "name")
_DONE, _OPENAI_END = b"done", b"data: [DONE]"
_COMPLETED, _STOPPED = b"event: response.completed", b"event: message_stop"
_N = Family.NATIVE

ROUTES: tuple[Route, ...] = (
    Route("/api/chat", _POST, _R, model_in=_M, streams=True, final=_DONE),
    Route("/api/generate", _POST, _R, model_in=_M, streams=True, final=_DONE),
    Route("/api/embed", _POST, _R, model_in=_M, missing=_TRY_PULLING),
    Route("/api/embeddings", _POST, _R, model_in=_M, missing=_TRY_PULLING),
    Route("/api/show", _POST, _R, model_in=_MN, missing="model '{key}' not found"),
    Route(
        "/v1/chat/completions", _POST, _R, _OPENAI, _M, streams=False, final=_OPENAI_END
    ),
    Route("/v1/completions", _POST, _R, _OPENAI, _M, streams=False, final=_OPENAI_END),
    Route("/v1/embeddings", _POST, _R, _OPENAI, _M, missing=_TRY_PULLING),
    Route("/v1/responses", _POST, _R, _OPENAI, _M, streams=False, final=_COMPLETED),
    Route("/v1/messages", _POST, _R, _ANTHROPIC, _M, streams=False, final=_STOPPED),
    Route("/", _HEAD_GET, _L),
    Route("/api/version", _HEAD_GET, _L),
    Route("/api/tags", _HEAD_GET, _L),
    Route("/api/ps", _GET, _L),
    Route("/v1/models", _GET, _L, _OPENAI),
    Route("/v1/models/:model", _GET, _L, _OPENAI),
    Route("/v1/audio/transcriptions", _POST, _U, _OPENAI),
    Route("/api/pull", _POST, _U),
    Route("/api/push", _POST, _U),
    Route("/api/create", _POST, _U),
    Route("/api/copy", _POST, _U),
    Route("/api/delete", _DELETE, _U),
    Route("/api/blobs/:digest", ("HEAD", "POST"), _U),
    Route("/api/me", _POST, _U),
    Route("/api/signout", _POST, _U),
    Route("/api/user/keys/:key", _DELETE, _U),
    Route("/api/status", _GET, _U),
    Route("/api/experimental/web_search", _POST, _U),
    Route("/api/experimental/web_fetch", _POST, _U),
    Route("/api/experimental/model-recommendations", _GET, _U),
)  # fmt: skip

_EXACT = {route.path: route for route in ROUTES if ":" not in route.path}
_WITH_LAST = {route.path.rpartition("/")[0]: route for route in ROUTES if ":" in route.path}


def find(path: str) -> Route | None:
    """The route of a decoded path without its query; None for an unknown one."""
    route = _EXACT.get(path)
    if route is not None:
        return route
    head, _, last = path.rpartition("/")
    return _WITH_LAST.get(head) if last else None


class Call(msgspec.Struct, frozen=True):
    """What the client asked. `model` is empty where the body names none that can be read.
    `streams`: the answer may be a stream."""

    route: Route
    model: str = ""
    streams: bool = False


_ROUTING = frozenset(("model", "name", "stream"))
# What most bodies hold; any other key is looked at more closely.
_USUAL = _ROUTING | {
    "messages", "prompt", "input", "options", "tools", "format", "keep_alive", "think", "system",
    "max_tokens", "temperature", "top_p", "stop", "seed", "stream_options", "tool_choice",
}  # fmt: skip
_MAX_KEYS, _MAX_KEY = 1000, 1000
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_text = msgspec.json.Decoder(str | None).decode
_flag = msgspec.json.Decoder(bool | None).decode
QUICK_BYTES = 256 * 1024


def parse(route: Route, body: bytes | bytearray) -> Call:
    """Peek at a body. One that cannot be read gives a Call without a model, never an error:
    a node's own answer to it is the right one.

    Above QUICK_BYTES it may take a while: not in the event loop."""
    call = _parse_quickly(route, body) if len(body) <= QUICK_BYTES else None
    return _parse_exactly(route, body) if call is None else call


def _parse_quickly(route: Route, body: bytes | bytearray) -> Call | None:
    """What the exact way would say, or None where it has to be asked."""
    try:
        fields = _fields(body)
        if not fields.keys() <= _USUAL and not _plain(fields):
            return None
        model = stream = None
        for field in route.model_in:
            if field in fields:
                model = _text(fields[field])
                if model is not None and model.strip():
                    break
                model = None
        if route.streams is not None:
            stream = route.streams
            if "stream" in fields and (asked := _flag(fields["stream"])) is not None:
                stream = asked
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return None
    return Call(route, model or "", bool(stream))


def _plain(fields: Mapping[str, object]) -> bool:
    """Whether no key is another spelling of one of ours, which Go would take for the same."""
    return len(fields) <= _MAX_KEYS and all(
        key in _ROUTING or (len(key) <= _MAX_KEY and peek.fold(key) not in _ROUTING)
        for key in fields
    )


def _parse_exactly(route: Route, body: bytes | bytearray) -> Call:
    try:
        fields = peek.top_level(body)
    except peek.Unreadable:
        return Call(route, streams=bool(route.streams))
    model, _ = _model(route, body, fields)
    return Call(route, model, _streams(route, body, fields))


def _model(
    route: Route, body: bytes | bytearray, fields: Mapping[str, peek.Span]
) -> tuple[str, peek.Span | None]:
    """The first field that names a model, and where its string stands."""
    for field in route.model_in:
        span = fields.get(field)
        if span is not None:
            try:
                model = peek.text(body, span)
            except peek.Unreadable:
                continue
            if model.strip():
                return model, span
    return "", None


def _streams(route: Route, body: bytes | bytearray, fields: Mapping[str, peek.Span]) -> bool:
    if route.streams is None:
        return False
    start, end = fields.get("stream", (0, 0))
    value = bytes(body[start:end])
    return value == b"true" if value in (b"true", b"false") else route.streams


def rename(
    body: bytes | bytearray, call: Call, sent: str
) -> tuple[bytes | bytearray | memoryview, ...]:
    """The body with the model's name replaced: pieces to be written one after the other."""
    if not call.model or call.model.strip() == sent:
        return (body,)
    _, span = _model(call.route, body, peek.top_level(body))
    assert span is not None  # the call's model was read from this body
    view = memoryview(body)
    return view[: span[0]], json.dumps(sent).encode(), view[span[1] :]


def refusal(route: Route, model: str, rejected: Rejected) -> tuple[int, str]:
    """(status, text) for a request that gets no node; `model` without its pin."""
    nodes = ", ".join(node.name for node in rejected.nodes)
    what = f"model '{model}'" if model else "any model"
    match rejected.refusal:
        case Refusal.BAD_NAME:
            return 400, "invalid model name"
        case Refusal.UNKNOWN_PIN:
            return 400, f"no such node; the nodes are: {_listed(rejected.nodes)}"
        case Refusal.AMBIGUOUS_PIN:
            return 400, f"several nodes have that address, pin one by its name: {nodes}"
        case Refusal.PIN_DOWN:
            return 503, f"cannot connect to Ollama server at {rejected.nodes[0].url}"
        case Refusal.NOT_ON_PIN:
            return 404, f"model '{model}' not found on {rejected.nodes[0].url}"
        case Refusal.NO_MODEL:
            return 404, route.missing.format(name=model, key=names.parse(model).key)
        case Refusal.NODES_DOWN:
            return 503, f"no node is up for {what}: {nodes}"
        case Refusal.ALL_TRIED:  # pragma: no branch
            return 503, f"cannot connect to any node that has {what}: {nodes}"


def _listed(nodes: tuple[NodeSpec, ...]) -> str:
    return ", ".join(f"{node.name} ({node.url})" for node in nodes)


def is_final(route: Route, records: bytes) -> bool:
    """Whether the last of these whole records is the one that ends a complete answer.

    The text of an answer may spell such a record too, so it is read and not only searched for.
    """
    if not route.final:
        return False
    if route.family is not Family.NATIVE:
        return any(line.startswith(route.final) for line in records.splitlines())
    try:
        last = records.rstrip(b"\n").rpartition(b"\n")[2]
        start, end = peek.top_level(last).get(route.final.decode(), (0, 0))
    except peek.Unreadable:
        return False
    return last[start:end] == b"true"


_OPENAI_TYPES = {400: "invalid_request_error", 404: "not_found_error"}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


def error_body(family: Family, status: int, message: str, request_id: str) -> bytes:
    """An error as the API of `family` words it: one JSON object, UTF-8."""
    error: object
    match family:
        case Family.NATIVE:
            error = {"error": message}
        case Family.OPENAI:
            kind = _OPENAI_TYPES.get(status, "api_error")
            error = {"error": {"message": message, "type": kind, "param": None, "code": None}}
        case Family.ANTHROPIC:  # pragma: no branch
            kind = _ANTHROPIC_TYPES.get(status, "api_error")
            inner = {"type": kind, "message": message}
            error = {"type": "error", "error": inner, "request_id": request_id}
    return dumps(error)


def error_type(family: Family) -> str:
    """The Content-Type of an error that is answered directly."""
    return "application/json; charset=utf-8" if family is Family.NATIVE else "application/json"


def error_record(
    route: Route, framing: Framing, status: int, message: str, request_id: str
) -> bytes:
    """The record that ends a stream that cannot go on, in the stream's own framing.

    Ollama's clients raise on the one-line error; the OpenAI and Anthropic SDKs raise on these.
    """
    body = error_body(route.family, status, message, request_id)
    if framing is Framing.NDJSON:
        return body + b"\n"
    named = route.family is Family.ANTHROPIC or route.path == "/v1/responses"
    return (b"event: error\n" if named else b"") + b"data: " + body + b"\n\n"


_LINE_ENDS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}


def dumps(value: object) -> bytes:
    """JSON as Go's encoder spaces it, with non-ASCII text as it is."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False).translate(_LINE_ENDS)
    return text.encode("utf-8", "replace")
