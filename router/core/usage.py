"""Token counts and durations out of a final record.

A small JSON document is decoded, which is the cheapest. Of anything else the end is searched:
Ollama, OpenAI and Anthropic all put the counts there, and inside a JSON string a quote is
escaped, so text that a model writes can never be taken for one of these fields.
"""

import re
from typing import Annotated

import msgspec

_SMALL_BYTES = 64 * 1024
_TAIL_BYTES = 2048
_COUNT = re.compile(
    rb'"(prompt_eval_count|eval_count|load_duration|eval_duration|prompt_tokens|completion_tokens'
    rb'|input_tokens|output_tokens)":\s*([0-9]{1,18})\b'
)
_PROMPT = (b"prompt_eval_count", b"prompt_tokens", b"input_tokens")
_COMPLETION = (b"eval_count", b"completion_tokens", b"output_tokens")


class Usage(msgspec.Struct, frozen=True):
    """What a final record told; None for what it did not. Durations in seconds."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    load_s: float | None = None
    eval_s: float | None = None


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
    usage: _Tokens | None = None


_decode = msgspec.json.Decoder(_Record).decode


def read(records: bytes) -> Usage:
    """Look at the last of these whole records; where it tells nothing, at those before it."""
    if records[:1] == b"{":
        last = records[records.rfind(b"\n", 0, -1) + 1 :]
        if len(last) <= _SMALL_BYTES:
            try:
                return _of(_decode(last))
            except (msgspec.MsgspecError, RecursionError, UnicodeError):
                pass
    return _searched(records)


def _of(record: _Record) -> Usage:
    tokens = record.usage
    if tokens is None:
        return Usage(
            record.prompt_eval_count,
            record.eval_count,
            None if record.load_duration is None else record.load_duration / 1e9,
            None if record.eval_duration is None else record.eval_duration / 1e9,
        )
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
    )


def _first(found: dict[bytes, int], keys: tuple[bytes, ...]) -> int | None:
    return next((found[key] for key in keys if key in found), None)


def _seconds(found: dict[bytes, int], key: bytes) -> float | None:
    return found[key] / 1e9 if key in found else None
