"""The judge itself: what is right passes, and each broken promise is seen."""

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.chaos.orders import Catalog, Kind, Order
from tests.chaos.verdicts import Outcome, Violation, verdict
from tests.rig import Answer

ERROR = {"error": "node n1: connection reset"}
OPENAI_ERROR = {"error": {"message": "node n1: connection reset"}}


def order(kind: Kind) -> Order:
    return Catalog((4, 4), capped=0).order("1", kind, random.Random(1))


def answer(body: bytes, status: int = 200, *, whole: bool = True, retry_after: str = "") -> Answer:
    headers = [("Retry-After", retry_after)] if retry_after else []
    return Answer("HTTP/1.1", status, headers, body, whole)


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def events(*chunks: Any) -> bytes:
    data = [chunk if isinstance(chunk, str) else json.dumps(chunk) for chunk in chunks]
    return "".join(f"data: {one}\n\n" for one in data).encode()


def native(asked: Order) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = [
        {"message": {"role": "assistant", "content": token}, "done": False}
        for token in asked.tokens
    ]
    end = {"message": {"content": ""}, "done": True, "done_reason": "stop", "eval_count": 4}
    return [*said, end]


def openai(asked: Order) -> list[Any]:
    deltas: list[tuple[dict[str, str], str | None]] = [
        ({"content": token} | ({"role": "assistant"} if at == 0 else {}), None)
        for at, token in enumerate(asked.tokens)
    ]
    ends: list[tuple[dict[str, str], str | None]] = [({}, "stop")]
    chunks = [
        {"id": "a", "choices": [{"delta": delta, "finish_reason": end}]}
        for delta, end in [*deltas, *ends]
    ]
    counts = {"id": "a", "choices": [], "usage": {"completion_tokens": len(asked.tokens)}}
    return [*chunks, *([counts] if asked.usage else []), "[DONE]"]


def _renamed(chunks: list[Any]) -> list[Any]:
    return [*chunks[:2], {**chunks[2], "id": "b"}, *chunks[3:]]


def _with_role(chunks: list[Any]) -> list[Any]:
    again = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    return [*chunks[:2], {"id": "a", "choices": [again]}, *chunks[2:]]


Change = Callable[[list[Any]], Sequence[Any]]
NATIVE: Sequence[tuple[str, Change]] = [
    ("a record is missing", lambda records: records[1:]),
    ("a record comes twice", lambda records: [records[0], *records]),
    ("two records change places", lambda records: [records[1], records[0], *records[2:]]),
    ("no final record", lambda records: records[:-1]),
    ("two final records", lambda records: [*records, records[-1]]),
    ("an error inside", lambda records: [records[0], ERROR, *records[1:]]),
    ("an error at first", lambda _: [ERROR]),
    ("nothing", lambda _: []),
    ("another text before an error", lambda records: [records[1], ERROR]),
    ("a wrong count", lambda records: [*records[:-1], {**records[-1], "eval_count": 3}]),
    ("a wrong reason", lambda records: [*records[:-1], {**records[-1], "done_reason": "length"}]),
]
OPENAI: Sequence[tuple[str, Change]] = [
    ("a chunk is missing", lambda chunks: chunks[1:]),
    ("no end", lambda chunks: chunks[:-1]),
    ("no reason for the end", lambda chunks: [c for c in chunks if "stop" not in json.dumps(c)]),
    ("two ids", _renamed),
    ("two roles", _with_role),
    ("an error at first", lambda _: [OPENAI_ERROR]),
    ("an error inside", lambda chunks: [chunks[0], OPENAI_ERROR, *chunks[1:]]),
]


def test_what_is_right_passes() -> None:
    chat, chunked = order(Kind.CHAT), order(Kind.OPENAI)
    assert verdict(chat, answer(lines(*native(chat)))) is Outcome.RIGHT
    assert verdict(chunked, answer(events(*openai(chunked)))) is Outcome.RIGHT


def test_an_error_behind_a_beginning_is_honest() -> None:
    chat, chunked = order(Kind.CHAT), order(Kind.OPENAI)
    assert verdict(chat, answer(lines(*native(chat)[:2], ERROR))) is Outcome.TOLD
    body = events(*openai(chunked)[:2], OPENAI_ERROR)
    assert verdict(chunked, answer(body)) is Outcome.TOLD


@pytest.mark.parametrize(("why", "change"), NATIVE, ids=[why for why, _ in NATIVE])
def test_a_broken_promise_of_a_native_stream_is_seen(why: str, change: Change) -> None:
    chat = order(Kind.CHAT)
    with pytest.raises(Violation):
        verdict(chat, answer(lines(*change(native(chat)))))


@pytest.mark.parametrize(("why", "change"), OPENAI, ids=[why for why, _ in OPENAI])
def test_a_broken_promise_of_an_openai_stream_is_seen(why: str, change: Change) -> None:
    chunked = order(Kind.OPENAI)
    with pytest.raises(Violation):
        verdict(chunked, answer(events(*change(openai(chunked)))))


@pytest.mark.parametrize(
    "given",
    [
        answer(b"{}", whole=False),
        answer(b"<html>"),
        answer(b'{"error": "late"}'),
        answer(b'{"message": {"content": "another text"}, "done": true}'),
        answer(b"", 502),
        answer(b"<html>", 502),
        answer(b'{"error": "no node is up"}', 503),
        answer(b'{"error": "internal"}', 500),
        answer(b'{"error": "no such thing"}', 404),
        answer(b'{"error": "teapot"}', 418),
    ],
    ids=lambda one: f"{one.status} {one.body.decode()[:20]}",
)
def test_a_broken_promise_of_a_whole_answer_is_seen(given: Answer) -> None:
    with pytest.raises(Violation):
        verdict(order(Kind.WHOLE), given)


@pytest.mark.parametrize(
    "given",
    [
        answer(b'{"error": "no node is up"}', 503, retry_after="1"),
        answer(b'{"error": "the runner was told to fail"}', 500),
        answer(b'{"error": "node n1: connection reset"}', 502),
    ],
    ids=lambda one: str(one.status),
)
def test_a_true_status_is_a_refusal(given: Answer) -> None:
    assert verdict(order(Kind.WHOLE), given) is Outcome.REFUSED
