"""The Ollama, OpenAI and Anthropic APIs as one table, and what a request for one asks.

Source: Ollama's own API, as described in `docs/compatibility.md`.
"""

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote

import msgspec

from router.core import edits, peek, unload
from router.core.types import FailureKind, Need, Scope

# Which routers a request has passed, so that one that comes back is known.
VIA = "X-Ollamux-Via"


class Kind(enum.Enum):
    """Who answers."""

    ROUTED = "routed"  # one node
    LOCAL = "local"  # the router, from what the pool knows
    MANAGED = "managed"  # all nodes that a change of a model concerns


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
    line of it begins. `chunk`: what each record that carries a part of the
    answer holds once. `asks_usage`: a stream tells token counts only where `stream_options` ask
    for them. `need`: what it needs of a node beside the model; `since`: the version of
    Ollama that first had it, none where the router answers or every version in use has it.
    `form`: its body is a multipart form. `content`: the field without which it only loads, or
    unloads. `options`: its body may hold those of a model, such as `num_ctx`.
    `infers`: the model that it names has to run for it.
    """

    path: str
    methods: tuple[str, ...]
    kind: Kind
    family: Family = Family.NATIVE
    model_in: tuple[str, ...] = ()
    streams: bool | None = None
    missing: str = "model '{name}' not found"
    final: bytes = b""
    need: Need = Need.NONE
    since: tuple[int, ...] = ()
    chunk: bytes = b""
    asks_usage: bool = False
    form: bool = False
    content: str = ""
    options: bool = False
    infers: bool = True


_AS_SHOWN = "model '{key}' not found"
_TRY_PULLING = 'model "{name}" not found, try pulling it first'
_GET, _HEAD_GET, _POST, _DELETE = ("GET",), ("GET", "HEAD"), ("POST",), ("DELETE",)
_R, _L, _G = Kind.ROUTED, Kind.LOCAL, Kind.MANAGED
_OPENAI, _ANTHROPIC = Family.OPENAI, Family.ANTHROPIC
_M, _MN = ("model",), ("model", "name")
_DONE, OPENAI_END = b"done", b"data: [DONE]"
_COMPLETED, _STOPPED = b"event: response.completed", b"event: message_stop"
_TOLD = (b"event: error", b"event: response.failed", b"event: response.incomplete")
NO_MODEL = b'"model":""'
_GOING_ON, _UNFINISHED = b'"done":false', b'"finish_reason":null'
_ITEM_DELTA, _BLOCK_DELTA = b".delta\n", b"event: content_block_delta\n"
_PRIMARY, _CLOUD, _ANY = Need.PRIMARY, Need.CLOUD, Need.ANY

ROUTES: tuple[Route, ...] = (
    Route("/api/chat", _POST, _R, model_in=_M, streams=True, final=_DONE, chunk=_GOING_ON,
          content="messages", options=True),
    Route("/api/generate", _POST, _R, model_in=_M, streams=True, final=_DONE, chunk=_GOING_ON,
          content="prompt", options=True),
    Route("/api/embed", _POST, _R, model_in=_M, missing=_TRY_PULLING, since=(0, 2, 6),
          content="input", options=True),
    Route("/api/embeddings", _POST, _R, model_in=_M, missing=_TRY_PULLING, options=True),
    Route("/api/show", _POST, _R, model_in=_MN, missing=_AS_SHOWN, infers=False),
    Route(
        "/v1/chat/completions", _POST, _R, _OPENAI, _M, streams=False, final=OPENAI_END,
        chunk=_UNFINISHED, asks_usage=True,
    ),
    Route(
        "/v1/completions", _POST, _R, _OPENAI, _M, streams=False, final=OPENAI_END,
        chunk=_UNFINISHED,
    ),
    Route("/v1/embeddings", _POST, _R, _OPENAI, _M, missing=_TRY_PULLING),
    Route(
        "/v1/responses", _POST, _R, _OPENAI, _M, streams=False, final=_COMPLETED, since=(0, 13, 3),
        chunk=_ITEM_DELTA,
    ),
    Route(
        "/v1/messages", _POST, _R, _ANTHROPIC, _M, streams=False, final=_STOPPED, since=(0, 14, 0),
        chunk=_BLOCK_DELTA,
    ),
    Route("/", _HEAD_GET, _L),
    Route("/api/version", _HEAD_GET, _L),
    Route("/api/tags", _HEAD_GET, _L),
    Route("/api/ps", _GET, _L),
    Route("/v1/models", _GET, _L, _OPENAI),
    Route("/v1/models/:model", _GET, _L, _OPENAI, missing=_AS_SHOWN),
    Route("/v1/audio/transcriptions", _POST, _R, _OPENAI, _M, since=(0, 20, 0), form=True),
    Route("/api/pull", _POST, _G, model_in=_MN, streams=True),
    Route("/api/push", _POST, _R, model_in=_MN, streams=True, need=_PRIMARY, infers=False),
    Route("/api/create", _POST, _G, model_in=_MN, streams=True),
    Route("/api/copy", _POST, _G, model_in=("source",), missing='model "{name}" not found'),
    Route("/api/delete", _DELETE, _G, model_in=_MN),
    Route("/api/blobs/:digest", ("HEAD", "POST"), _G),
    Route("/api/me", _POST, _R, need=_PRIMARY, since=(0, 12, 0)),
    Route("/api/signout", _POST, _R, need=_PRIMARY, since=(0, 12, 0)),
    Route("/api/user/keys/:key", _DELETE, _R, need=_PRIMARY),
    Route("/api/status", _GET, _R, need=_ANY, since=(0, 16, 2)),
    Route("/api/experimental/web_search", _POST, _R, need=_CLOUD, since=(0, 18, 0)),
    Route("/api/experimental/web_fetch", _POST, _R, need=_CLOUD, since=(0, 18, 0)),
    Route("/api/experimental/model-recommendations", _GET, _R, need=_ANY, since=(0, 22, 1)),
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


class Asked(msgspec.Struct, frozen=True):
    """What the first line of a request asks for: `path` is decoded and without its pin, `query`
    has its question mark."""

    route: Route
    path: str
    query: str = ""
    scope: Scope | None = None

    @property
    def target(self) -> str:
        """What a node is to be asked for."""
        path = self.route.path
        return (path if path == self.path else quote(self.path, safe="/:")) + self.query


class Call(msgspec.Struct, frozen=True):
    """What the client asked. `model` is empty where the body names none that can be read.
    `streams`: the answer may be a stream. `usage`: the edit that makes it tell token counts
    which the client did not ask for. `span`: where a form has the model, which is no JSON.
    `unloads`: it does nothing but free the memory that the model takes. `tools`: it offers some,
    so that a stream may begin late: a call of one is told when it is whole."""

    route: Route
    model: str = ""
    streams: bool = False
    usage: edits.Splice | None = None
    span: peek.Span | None = None
    unloads: bool = False
    tools: bool = False


_BLANKS = b" \t\r\n"
_ROUTING = frozenset((
    "from", "model", "name", "source", "stream", "stream_options", "keep_alive", "messages",
    "prompt", "input",
))  # fmt: skip
# What most bodies hold; any other key is looked at more closely.
_USUAL = _ROUTING | {
    "options", "tools", "format", "think", "system", "max_tokens", "temperature", "top_p", "stop",
    "seed", "tool_choice",
}  # fmt: skip
_MAX_KEYS, _MAX_KEY = 1000, 1000
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_text = msgspec.json.Decoder(str | None).decode
_flag = msgspec.json.Decoder(bool | None).decode
QUICK_BYTES = 256 * 1024


def parse(route: Route, body: bytes | bytearray, *, exact_usage: bool = False) -> Call:
    """Peek at a body. One that cannot be read gives a Call without a model, never an error:
    a node's own answer to it is the right one.

    `exact_usage`: a stream that would tell no token counts shall be asked to.

    Above QUICK_BYTES it may take a while: not in the event loop."""
    asks = exact_usage and route.asks_usage
    call = _parse_quickly(route, body, asks=asks) if len(body) <= QUICK_BYTES else None
    return _parse_exactly(route, body, asks=asks) if call is None else call


def _parse_quickly(route: Route, body: bytes | bytearray, *, asks: bool = False) -> Call | None:
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
    usage = _asking(body, fields) if asks and stream else None
    unloads = (
        "keep_alive" in fields
        and bool(route.content)
        and unload.asked(bytes(fields["keep_alive"]), bytes(fields.get(route.content, b"")))
    )
    return Call(route, model or "", bool(stream), usage, None, unloads, "tools" in fields)


def _asking(body: bytes | bytearray, fields: Mapping[str, object]) -> edits.Splice | None:
    if "stream_options" in fields:
        return edits.ask_usage(body)
    return edits.added(len(body.rstrip(_BLANKS)[:-1].rstrip(_BLANKS)))


def _plain(fields: Mapping[str, object]) -> bool:
    """Whether no key is another spelling of one of ours, which Go would take for the same."""
    return len(fields) <= _MAX_KEYS and all(
        key in _ROUTING or (len(key) <= _MAX_KEY and peek.fold(key) not in _ROUTING)
        for key in fields
    )


def _parse_exactly(route: Route, body: bytes | bytearray, *, asks: bool = False) -> Call:
    try:
        fields = peek.top_level(body)
    except peek.Unreadable:
        return Call(route, streams=bool(route.streams))
    model, _ = _model(route, body, fields)
    streams = _streams(route, body, fields)
    usage = edits.ask_usage(body) if asks and streams else None
    unloads = bool(route.content) and unload.asked(
        _raw(body, fields, "keep_alive"), _raw(body, fields, route.content)
    )
    return Call(route, model, streams, usage, None, unloads, "tools" in fields)


def _raw(body: bytes | bytearray, fields: Mapping[str, peek.Span], field: str) -> bytes:
    start, end = fields.get(field, (0, 0))
    return bytes(body[start : min(end, start + unload.LOOKED_AT_BYTES)])


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
    """The body with the model's name replaced, and `call.usage` made: pieces to be written one
    after the other."""
    splices = [] if call.usage is None else [call.usage]
    if call.model and call.model.strip() != sent and call.span is not None:
        splices.append(edits.Splice(*call.span, sent.encode()))
    elif call.model and call.model.strip() != sent:
        _, span = _model(call.route, body, peek.top_level(body))
        assert span is not None  # the call's model was read from this body
        splices.append(edits.Splice(*span, json.dumps(sent).encode()))
    return edits.spliced(body, splices) if splices else (body,)


def broke(route: Route, records: bytes) -> FailureKind | None:
    """What a stream of events has failed in, that has ended with these records; None for nothing.

    Ollama loses the error of a runner that fails in the midst. Of OpenAI's chat and completions
    it leaves an empty chunk that names no model; without that, they have been cut because the
    model repeated itself for ever. The others just end, so there it may be either.
    """
    if route.family is Family.NATIVE or is_final(route, records):
        return None
    if route.final == OPENAI_END:
        return FailureKind.ANSWERED if NO_MODEL in records else None
    told = any(line.startswith(_TOLD) for line in records.splitlines())
    return None if told else FailureKind.ASTRAY


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
