"""An answer that broke off and that another node finishes: what this one is asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from router.core import edits, peek, wording
from router.core.dialect import QUICK_BYTES, Call, Family, Route
from router.core.edits import Piece, Splice
from router.core.peek import Span
from router.core.stitch import Stitch

_GENERATE, _RAW = "/api/generate", b'"raw"'
_CHATS = frozenset(("/api/chat", "/v1/chat/completions"))
_BLANKS = b" \t\r\n"
_DATA, _DONE = b"data:", b"data: [DONE]"
_NOTHING = frozenset((b"", b"null", b'""', b"[]", b"{}"))
_CONTENT, _THINKING = ("content", "response"), ("thinking", "reasoning")
_OTHERS = {"tool_calls": "tool calls", "image": "images", "images": "images", "audio": "audio"}
_PARTS = frozenset((*_CONTENT, *_THINKING, *_OTHERS))
_HEAD = ("id", "created", "model", "system_fingerprint", "created_at")
_LIMITS: tuple[str, ...] = ("max_tokens", "max_completion_tokens")
# What is not ASCII stands inside strings only. Without it, and without escapes that may be half
# of a pair, msgspec tells the parts of an array in all that Go reads.
_ASCII = bytes(range(128)) + b"?" * 128

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_array = msgspec.json.Decoder(list[msgspec.Raw]).decode
_string = msgspec.json.Decoder(str | None).decode
_NOT_DECODED = (msgspec.MsgspecError, RecursionError, UnicodeError)
_UNREADABLE = "unreadable request"


class _Choice(msgspec.Struct):
    delta: dict[str, msgspec.Raw] = {}
    finish_reason: str | None = None
    index: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: msgspec.Raw = msgspec.Raw()
    error: msgspec.Raw = msgspec.Raw()


_chunk = msgspec.json.Decoder(_Chunk).decode


class Unable(Exception):
    """An answer cannot be continued; the text says why, in a few words for a log."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How an answer goes on: `body` is for another node, and `stitch` for what that one says;
    or `ending` is all that the answer lacks, and no node is asked."""

    stitch: "Stitch"
    body: tuple[Piece, ...] = field(default=(), repr=False)
    ending: bytes = b""


def may(call: Call, body: bytes | bytearray) -> bool:
    """Whether the text of an answer is worth keeping. Every request is looked at in this way, so
    it is a cheap look, and no promise."""
    if not call.streams:
        return False
    path = call.route.path
    if path in _CHATS:
        return True
    if path != _GENERATE:
        return False
    # Only images make a body large; they stand in its midst.
    behind = max(QUICK_BYTES, len(body) - QUICK_BYTES) - len(_RAW)
    return body.find(_RAW, 0, QUICK_BYTES) >= 0 or body.find(_RAW, behind) >= 0


def plan(
    route: Route, body: Sequence[Piece], relayed: bytes | bytearray, *, withholds: bool = False
) -> Plan:
    """How to go on with the answer to `body` of which the client has seen `relayed`, whole
    records. Raises Unable.

    `body` is what the first node was sent, and `relayed` everything since, however many nodes
    said it. `withholds`: the body asks for token counts that the client did not ask for.

    A large body or a long answer takes a while: not in the event loop."""
    if route.path not in _CHATS and route.path != _GENERATE:
        raise Unable("another endpoint")
    said = _said(route, relayed)
    if said.complete:
        raise Unable("complete")
    if said.bar and not said.finished:
        raise Unable(said.bar)
    try:
        return _plan(route, _Request(body), said, withholds=withholds)
    except peek.Unreadable:
        raise Unable(_UNREADABLE) from None


def _plan(route: Route, request: "_Request", said: "_Said", *, withholds: bool) -> Plan:
    stitch = Stitch(route.family, said.tokens, said.head, said.role)
    tells = not withholds and request.flag("stream_options", "include_usage")
    if said.finished:
        if tells and not said.counted:
            raise Unable("no token counts")
        return Plan(stitch, ending=_DONE + b"\n\n")
    if not said.tokens:
        return Plan(stitch, (request.body,))
    request.bar(route)
    splices: list[Splice] = []
    limit = request.limit(route)
    if limit is not None:
        span, most = limit
        if most <= said.tokens:
            return Plan(stitch, ending=_length(route, said, tells=tells))
        splices.append(Splice(*span, b"%d" % (most - said.tokens)))
    splices.append(request.appended(route, said))
    return Plan(stitch, edits.spliced(request.body, splices))


# What the client has seen


@dataclass(slots=True)
class _Said:
    """What relayed records come to. `tokens`: how many carried a part of the answer. `head`: the
    fields that name a stream, as JSON. `bar`: what is in it that no other node can be told.
    `finished`: only what follows the answer is missing; `complete`: nothing is. `counted`: so are
    its token counts."""

    contents: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    tokens: int = 0
    head: Mapping[str, bytes] = field(default_factory=dict)
    role: bool = False
    bar: str = ""
    finished: bool = False
    complete: bool = False
    counted: bool = False

    def line(self, record: bytes) -> None:
        """Take a record of Ollama's own."""
        fields = _fields(record)
        if "error" in fields:
            raise Unable("an error relayed")
        self.head = _head(fields)
        self.complete = self.complete or bytes(fields.get("done", b"")) == b"true"
        if "message" in fields:
            self._part(_fields(fields["message"]))
        else:
            self._part({name: fields[name] for name in _PARTS & fields.keys()})

    def event(self, line: bytes) -> None:
        """Take a line of OpenAI's events."""
        if line.startswith(b":"):
            return
        if not line.startswith(_DATA):
            raise Unable("unreadable records")
        if line.startswith(_DONE):
            self.complete = True
            return
        data = line[len(_DATA) :]
        self.head = self.head or _head(_fields(data))
        chunk = _chunk(data)
        if chunk.error:
            raise Unable("an error relayed")
        self.counted = self.counted or bytes(chunk.usage) not in _NOTHING
        for choice in chunk.choices or ():
            if choice.index:
                raise Unable("several choices")
            self.finished = self.finished or choice.finish_reason is not None
            self._part(choice.delta)

    def _part(self, parts: Mapping[str, msgspec.Raw]) -> None:
        content = thought = ""
        for name, raw in parts.items():
            if name in _CONTENT:
                content = _string(raw) or ""
            elif name in _THINKING:
                thought = _string(raw) or ""
            elif name == "role":
                self.role = True
            elif bytes(raw) not in _NOTHING:
                self.bar = _OTHERS.get(name, "an unknown part")
        if thought and self.contents:
            self.bar = "thinking"
        self.tokens += bool(content or thought)
        if content:
            self.contents.append(content)
        if thought:
            self.thoughts.append(thought)


def _head(fields: Mapping[str, msgspec.Raw]) -> Mapping[str, bytes]:
    return {name: bytes(fields[name]) for name in _HEAD if name in fields}


def _said(route: Route, relayed: bytes | bytearray) -> _Said:
    said = _Said()
    take = said.line if route.family is Family.NATIVE else said.event
    try:
        for line in bytes(relayed).split(b"\n"):
            if line.strip(_BLANKS):
                take(line)
    except _NOT_DECODED:
        raise Unable("unreadable records") from None
    return said


# What another node is asked


class _Request:
    """What the first node was sent. Raises peek.Unreadable for what is no JSON object."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        first, *more = pieces
        self.body: bytes | bytearray
        self.body = b"".join(pieces) if more or isinstance(first, memoryview) else first
        self._fields = self._of(0)

    def flag(self, name: str, inner: str) -> bool:
        """Whether `inner` is true in the object `name`."""
        span = self._fields.get(name)
        return span is not None and self._is(self._of(span[0]), inner, b"true", absent=False)

    def bar(self, route: Route) -> None:
        """Raise Unable where only the node that has begun can go on."""
        if route.path == _GENERATE and not self._is(self._fields, "raw", b"true", absent=False):
            raise Unable("no raw prompt")
        plain = self._is(self._fields, "format", b'""')
        if route.family is not Family.NATIVE:
            wanted = self._fields.get("response_format")
            plain = wanted is None or self._is(self._of(wanted[0]), "type", b'"text"')
        if not plain:
            raise Unable("structured output")

    def appended(self, route: Route, said: _Said) -> Splice:
        """What was said, at the end of the prompt or of the messages."""
        text, thoughts = "".join(said.contents), "".join(said.thoughts)
        if thoughts and (not text or route.path == _GENERATE):
            raise Unable("thinking")  # a model can be told all of its thoughts, or none
        if route.path == _GENERATE:
            return self._longer(self._fields, "prompt", text)
        start, end = self._last_message()
        message = self._of(start)
        if "role" in message and peek.text(self.body, message["role"]).lower() == "assistant":
            if thoughts or not self._is(message, "tool_calls", b"[]"):
                raise Unable("thinking" if thoughts else "tool calls")
            return self._longer(message, "content", text)
        added = {"role": "assistant", "content": text}
        if thoughts:
            added["thinking" if route.family is Family.NATIVE else "reasoning"] = thoughts
        return Splice(end, end, b"," + wording.dumps(added))

    def limit(self, route: Route) -> tuple[Span, int] | None:
        """Where the most tokens of an answer stand, and how many; None for no limit."""
        fields, names = self._fields, _LIMITS
        if route.family is Family.NATIVE:
            if "options" not in fields:
                return None
            fields, names = self._of(fields["options"][0]), ("num_predict",)
        for name in names:
            if name in fields and (most := peek.number(self.body, fields[name])) > 0:
                return fields[name], most
        return None

    def _of(self, at: int) -> Mapping[str, Span]:
        """The object at `at`, without what is null."""
        fields = dict(peek.entries(self.body, at))
        return {
            name: span for name, span in fields.items() if not self.body.startswith(b"null", *span)
        }

    def _is(
        self, fields: Mapping[str, Span], name: str, value: bytes, *, absent: bool = True
    ) -> bool:
        """Whether a field has this value; `absent` is what it is where the field is not there."""
        span = fields.get(name)
        return absent if span is None else self.body[slice(*span)] == value

    def _longer(self, fields: Mapping[str, Span], name: str, text: str) -> Splice:
        """`text` at the end of a string."""
        start, end = fields.get(name, (0, 0))
        if self.body[start : start + 1] != b'"':
            raise Unable(f"no text in {name}")
        return Splice(end - 1, end - 1, wording.dumps(text)[1:-1])

    def _last_message(self) -> Span:
        start, end = self._fields.get("messages", (0, 0))
        array = bytes(self.body[start:end]).translate(_ASCII).replace(b"\\u", b"\\n")
        try:
            last = _array(array)[-1]
        except (*_NOT_DECODED, IndexError):
            raise Unable("no messages") from None
        end = start + len(array[:-1].rstrip(_BLANKS))
        return end - len(last), end


def _length(route: Route, said: _Said, *, tells: bool) -> bytes:
    """The end of an answer that has as many tokens as it may."""
    head = b"".join(b'"%b":%b,' % (name.encode(), value) for name, value in said.head.items())
    if route.family is Family.NATIVE:
        empty = b'"response":""'
        if route.path != _GENERATE:
            empty = b'"message":{"role":"assistant","content":""}'
        end = b'"done":true,"done_reason":"length","eval_count":%d' % said.tokens
        return b"{%b%b,%b}\n" % (head, empty, end)
    start = b'data: {"object":"chat.completion.chunk",' + head
    choice = b'{"index":0,"delta":{},"finish_reason":"length"}'
    events = [start + b'"choices":[%b]}' % choice]
    if tells:
        # No node has counted the prompt: as of all that it does not know, Ollama says 0.
        counts = b'"prompt_tokens":0,"completion_tokens":%d,"total_tokens":%d'
        usage = counts % (said.tokens, said.tokens)
        events.append(start + b'"choices":[],"usage":{%b}}' % usage)
    return b"\n\n".join((*events, _DONE, b""))
