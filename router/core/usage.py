"""Token counts and durations out of a final record.

A small JSON document is decoded, which is the cheapest. Of anything else the end is searched:
Ollama, OpenAI and Anthropic all put the counts there, and inside a JSON string a quote is
escaped, so text that a model writes can never be taken for one of these fields.
"""

import enum
import re
from typing import Annotated

import msgspec

_SMALL_BYTES = 64 * 1024
_TAIL_BYTES = 2048
_COUNT = re.compile(
    rb'"(prompt_eval_count|eval_count|total_duration|load_duration|eval_duration'
    rb"|prompt_eval_duration"
    rb'|prompt_tokens|completion_tokens|input_tokens|output_tokens)":\s*([0-9]{1,18})\b'
)
_PROMPT = (b"prompt_eval_count", b"prompt_tokens", b"input_tokens")
_COMPLETION = (b"eval_count", b"completion_tokens", b"output_tokens")


class Source(enum.StrEnum):
    """Who counted completion tokens, for the `source` label."""

    NODE = "node"
    CHUNKS = "chunks"  # nobody: as many records as carried a part of the answer


_NODE, _CHUNKS = Source.NODE, Source.CHUNKS


class Usage(msgspec.Struct, frozen=True):
    """What a final record told; None for what it did not. Durations in seconds."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    load_s: float | None = None
    eval_s: float | None = None
    prompt_s: float | None = None  # prefill of what was not cached
    source: Source = _NODE
    total_s: float | None = None

    @property
    def waited_s(self) -> float | None:
        """How long it waited on the node for a slot; None where that was not told."""
        if self.total_s is None or self.eval_s is None:
            return None
        return max(0.0, self.total_s - self.eval_s - (self.load_s or 0.0) - (self.prompt_s or 0.0))


NOTHING = Usage()
_Number = Annotated[int, msgspec.Meta(ge=0, lt=10**18)] | None


class _Tokens(msgspec.Struct):
    prompt_tokens: _Number = None
    completion_tokens: _Number = None
    input_tokens: _Number = None
    output_tokens: _Number = None


class _Record(msgspec.Struct):
    prompt_eval_count: _Number = None
    eval_count: _Number = None
    load_duration: _Number = None
    eval_duration: _Number = None
    prompt_eval_duration: _Number = None
    total_duration: _Number = None
    usage: _Tokens | None = None


class _Response(msgspec.Struct):
    usage: _Tokens | None = None


class _Event(msgspec.Struct):
    """What an event of OpenAI's or Anthropic's may hold of it. The estimate in a message_start
    stands deeper, and is no count."""

    usage: _Tokens | None = None
    response: _Response | None = None
    choices: list[msgspec.Raw] | None = None


_decode = msgspec.json.Decoder(_Record).decode
_decode_event = msgspec.json.Decoder(_Event).decode
_NOT_DECODED = (msgspec.MsgspecError, RecursionError, UnicodeError)
_EVENTS = (b"data:", b"event:", b":")
_DATA, _ESTIMATE = b"data:", b"event: message_start"
_EVENT_ENDS = (b"\n\n", b"\n\r\n")
_EVENT_END = re.compile(rb"\n\r?\n")
USAGE = b'"usage"'  # what any event that tells counts holds


def read(records: bytes) -> Usage:
    """Look at the last of these whole records; where it tells nothing, at those before it.

    `records` may begin in the midst of one, where one was too large to be held."""
    if records[:1] == b"{":
        last = records[records.rfind(b"\n", 0, -1) + 1 :]
        if len(last) <= _SMALL_BYTES:
            try:
                return _of(_decode(last))
            except _NOT_DECODED:
                pass
    elif records.startswith(_EVENTS):
        return _of_events(records)
    return _searched(records)


def counted(told: Usage, chunks: int) -> Usage:
    """What was told of a stream of which `chunks` records carried a part of the answer: they
    count where the node's own number never came."""
    if told.completion_tokens is not None or not chunks:
        return told
    return msgspec.structs.replace(told, completion_tokens=chunks, source=_CHUNKS)


def withhold(events: bytes) -> tuple[bytes, bytes]:
    """Take the event that holds nothing but token counts out of whole events of a chat: what is
    left, and that event, b"" if there is none."""
    at = events.find(USAGE)
    while at >= 0:
        start, end = events.rfind(b"\n", 0, at) + 1, _EVENT_END.search(events, at)
        if end is None:
            break
        first = not start or events.endswith(_EVENT_ENDS, 0, start)
        if first and _only_counts(events[start : end.start()]):
            return events[:start] + events[end.end() :], events[start : end.end()]
        at = events.find(USAGE, end.end())
    return events, b""


def _only_counts(event: bytes) -> bool:
    if not event.startswith(_DATA):
        return False
    try:
        record = _decode_event(event[len(_DATA) :])
    except _NOT_DECODED:
        return False
    return record.usage is not None and record.choices == []


def _of_events(records: bytes) -> Usage:
    """What the last event told that told anything. Events of Ollama have one line of data."""
    lines = records.split(b"\n")
    for at in range(len(lines) - 1, -1, -1):
        line = lines[at]
        if USAGE in line and line.startswith(_DATA) and not lines[at - 1].startswith(_ESTIMATE):
            told = _of_event(line[len(_DATA) :])
            if told is not NOTHING:
                return told
    return NOTHING


def _of_event(data: bytes) -> Usage:
    if len(data) > _SMALL_BYTES:
        return _searched(data)
    try:
        event = _decode_event(data)
    except _NOT_DECODED:
        return NOTHING
    tokens = event.usage
    if tokens is None and event.response is not None:
        tokens = event.response.usage
    told = NOTHING if tokens is None else _of_tokens(tokens)
    # Completions that are asked for usage say zero in every event but the last.
    return told if told.prompt_tokens or told.completion_tokens else NOTHING


def _of(record: _Record) -> Usage:
    tokens = record.usage
    if tokens is None:
        return Usage(
            record.prompt_eval_count,
            record.eval_count,
            None if record.load_duration is None else record.load_duration / 1e9,
            None if record.eval_duration is None else record.eval_duration / 1e9,
            None if record.prompt_eval_duration is None else record.prompt_eval_duration / 1e9,
            total_s=None if record.total_duration is None else record.total_duration / 1e9,
        )
    return _of_tokens(tokens)


def _of_tokens(tokens: _Tokens) -> Usage:
    prompt, completion = tokens.prompt_tokens, tokens.completion_tokens
    return Usage(
        tokens.input_tokens if prompt is None else prompt,
        tokens.output_tokens if completion is None else completion,
    )


def _searched(records: bytes) -> Usage:
    found = {match[1]: int(match[2]) for match in _COUNT.finditer(records[-_TAIL_BYTES:])}
    if not found:
        return NOTHING
    return Usage(
        prompt_tokens=_first(found, _PROMPT),
        completion_tokens=_first(found, _COMPLETION),
        load_s=_seconds(found, b"load_duration"),
        eval_s=_seconds(found, b"eval_duration"),
        prompt_s=_seconds(found, b"prompt_eval_duration"),
        total_s=_seconds(found, b"total_duration"),
    )


def _first(found: dict[bytes, int], keys: tuple[bytes, ...]) -> int | None:
    return next((found[key] for key in keys if key in found), None)


def _seconds(found: dict[bytes, int], key: bytes) -> float | None:
    return found[key] / 1e9 if key in found else None
