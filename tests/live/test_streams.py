"""When an answer streams, in which framing, and how a stream begins and ends."""

import json
from typing import Any

import pytest

from tests.live.target import ASKED, SHORT, Target
from tests.rig import talk

JSON = "application/json; charset=utf-8"
NDJSON = "application/x-ndjson"
SSE = "text/event-stream"
# By their path, what each endpoint is asked.
NATIVE: dict[str, dict[str, Any]] = {
    "/api/chat": {"messages": ASKED, "options": SHORT},
    "/api/generate": {"prompt": "Say hello.", "options": SHORT},
}
OPENAI: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": ASKED, "max_tokens": 4, "temperature": 0},
    "/v1/completions": {"prompt": "Say hello.", "max_tokens": 4, "temperature": 0},
}
RESPONSES = {"input": "Say hello.", "max_output_tokens": 4, "temperature": 0}
MESSAGES = {"messages": ASKED, "max_tokens": 4, "temperature": 0}
FOREIGN = [
    *(pytest.param(path, body) for path, body in OPENAI.items()),
    pytest.param("/v1/responses", RESPONSES, marks=pytest.mark.since(0, 13, 3)),
    pytest.param("/v1/messages", MESSAGES, marks=pytest.mark.since(0, 14, 0)),
]
_NS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")
_COUNTS = ("prompt_eval_count", "eval_count")


def _said(record: dict[str, Any]) -> str:
    text: str = record["response"] if "response" in record else record["message"]["content"]
    return text


def _is_final(record: dict[str, Any]) -> None:
    """The record tells how the answer ended and what it cost; what is zero is left out."""
    assert record["done"] is True
    assert record["done_reason"] in ("stop", "length")
    assert all(type(record.get(name, 1)) is int for name in (*_NS, *_COUNTS))
    assert all(record.get(name, 1) > 0 for name in (*_NS, *_COUNTS))
    assert 1 <= record["eval_count"] <= SHORT["num_predict"]
    assert record["total_duration"] >= record.get("eval_duration", 0)


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("stream", [{}, {"stream": None}, {"stream": True}])
async def test_the_native_api_streams_unless_told_otherwise(
    target: Target, path: str, stream: dict[str, Any]
) -> None:
    answer = await target.post(path, {"model": target.model, **NATIVE[path], **stream})
    assert (answer.status, answer.type) == (200, NDJSON)
    assert answer.header("Transfer-Encoding") == "chunked"
    *pieces, last = answer.records
    assert pieces
    assert all(piece["done"] is False and "done_reason" not in piece for piece in pieces)
    assert all(one["model"] == target.model and one["created_at"] for one in answer.records)
    _is_final(last)


@pytest.mark.parametrize("path", NATIVE)
async def test_the_native_api_answers_in_one_piece_when_told(target: Target, path: str) -> None:
    body = {"model": target.model, **NATIVE[path], "stream": False}
    answer = await target.post(path, body)
    assert (answer.status, answer.type) == (200, JSON)
    assert answer.json["model"] == target.model
    _is_final(answer.json)
    assert answer.header("Content-Length") in (str(len(answer.body)), None)


async def test_a_chat_is_told_as_the_assistants(target: Target) -> None:
    answer = await target.post("/api/chat", {"model": target.model, **NATIVE["/api/chat"]})
    assert {one["message"]["role"] for one in answer.records} == {"assistant"}


@pytest.mark.parametrize("raw", [False, True])
async def test_generate_tells_its_context_unless_raw(target: Target, raw: bool) -> None:
    body = {"model": target.model, **NATIVE["/api/generate"], "raw": raw}
    *pieces, last = (await target.post("/api/generate", body)).records
    assert not [piece for piece in pieces if "context" in piece]
    if raw:
        assert "context" not in last
    else:
        assert all(type(token) is int for token in last["context"])
        assert last["context"]


@pytest.mark.parametrize("path", NATIVE)
async def test_a_limit_of_tokens_ends_an_answer(target: Target, path: str) -> None:
    body = {"model": target.model, **NATIVE[path], "options": {**SHORT, "num_predict": 1}}
    last = (await target.post(path, body)).records[-1]
    assert (last["done_reason"], last["eval_count"]) == ("length", 1)


@pytest.mark.parametrize("path", NATIVE)
async def test_a_chunk_holds_whole_records(target: Target, path: str) -> None:
    body = {"model": target.model, **NATIVE[path]}
    async with talk(target.url) as connection:
        await connection.send(target.request("POST", path, body))
        await connection.head()
        while chunk := await connection.chunk():
            assert chunk.endswith(b"\n")
            assert all(json.loads(line) for line in chunk[:-1].split(b"\n"))


@pytest.mark.parametrize("path", NATIVE)
async def test_a_stream_over_http_1_0_ends_with_its_connection(target: Target, path: str) -> None:
    body = {"model": target.model, **NATIVE[path]}
    answer = await target.ask("POST", path, body, version="1.0")
    assert (answer.status, answer.header("Transfer-Encoding")) == (200, None)
    _is_final(answer.records[-1])


@pytest.mark.parametrize(("path", "fields"), FOREIGN)
@pytest.mark.parametrize("stream", [{}, {"stream": None}, {"stream": False}])
async def test_the_other_apis_stream_only_when_told(
    target: Target, path: str, fields: dict[str, Any], stream: dict[str, Any]
) -> None:
    answer = await target.post(path, {"model": target.model, **fields, **stream})
    assert (answer.status, answer.type) == (200, "application/json")
    assert answer.json["model"] == target.model
    assert answer.json["usage"]


@pytest.mark.parametrize(("path", "fields"), FOREIGN)
async def test_the_other_apis_stream_events(
    target: Target, path: str, fields: dict[str, Any]
) -> None:
    answer = await target.post(path, {"model": target.model, **fields, "stream": True})
    assert (answer.status, answer.type) == (200, SSE)
    assert answer.header("Transfer-Encoding") == "chunked"
    ended = path in OPENAI
    assert [value for _, value in answer.events if value == "[DONE]"] == ["[DONE]"] * ended
    assert (answer.events[-1][1] == "[DONE]") is ended
    assert all((name != "") is not ended for name, _ in answer.events)
    if not ended:
        assert answer.header("Cache-Control") == "no-cache"
        assert all(name == value["type"] for name, value in answer.events)


def _chunks(answer: Any) -> list[dict[str, Any]]:
    return [value for _, value in answer.events if value != "[DONE]"]


@pytest.mark.parametrize(("path", "kind"), [
    ("/v1/chat/completions", "chat.completion"), ("/v1/completions", "text_completion"),
])  # fmt: skip
async def test_openais_whole_answer_tells_its_usage(target: Target, path: str, kind: str) -> None:
    told = (await target.post(path, {"model": target.model, **OPENAI[path]})).json
    assert told["object"] == kind
    assert told["choices"][0]["finish_reason"] in ("stop", "length")
    usage = told["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] > 0
    assert 1 <= usage["completion_tokens"] <= 4


async def test_openais_chat_stream_tells_its_usage_only_when_asked(target: Target) -> None:
    body = {"model": target.model, **OPENAI["/v1/chat/completions"], "stream": True}
    plain = _chunks(await target.post("/v1/chat/completions", body))
    assert not [chunk for chunk in plain if chunk.get("usage")]
    assert all(len(chunk["choices"]) == 1 for chunk in plain)
    asked = {**body, "stream_options": {"include_usage": True}}
    *chunks, last = _chunks(await target.post("/v1/chat/completions", asked))
    assert last["choices"] == []
    assert 1 <= last["usage"]["completion_tokens"] <= 4
    assert last["usage"]["prompt_tokens"] > 0
    assert not [chunk for chunk in chunks if chunk.get("usage")]


async def test_openais_chat_stream_ends_with_a_reason(target: Target) -> None:
    body = {"model": target.model, **OPENAI["/v1/chat/completions"], "stream": True}
    chunks = _chunks(await target.post("/v1/chat/completions", body))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[-1] in ("stop", "length")
    assert {*reasons[:-1]} <= {None}
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"


async def test_openais_completions_count_in_their_last_chunk(target: Target) -> None:
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    body = {"model": target.model, **OPENAI["/v1/completions"], **asked}
    *chunks, last = _chunks(await target.post("/v1/completions", body))
    assert {chunk["usage"]["total_tokens"] for chunk in chunks} <= {0}
    assert last["usage"]["completion_tokens"] >= 1


@pytest.mark.since(0, 14, 0)
async def test_anthropics_stream_counts_just_before_its_end(target: Target) -> None:
    body = {"model": target.model, **MESSAGES, "stream": True}
    events = (await target.post("/v1/messages?beta=true", body)).events
    names = [name for name, _ in events]
    assert (names[0], names[-2:]) == ("message_start", ["message_delta", "message_stop"])
    assert events[0][1]["message"]["usage"]["output_tokens"] == 0
    final = events[-2][1]
    assert 1 <= final["usage"]["output_tokens"] <= 4
    assert final["usage"]["input_tokens"] > 0
    assert final["delta"]["stop_reason"] in ("end_turn", "max_tokens")
    assert names.count("content_block_start") == names.count("content_block_stop") >= 1


@pytest.mark.since(0, 14, 0)
async def test_anthropics_whole_answer_is_a_message(target: Target) -> None:
    answer = (await target.post("/v1/messages", {"model": target.model, **MESSAGES})).json
    assert (answer["type"], answer["role"]) == ("message", "assistant")
    assert answer["stop_reason"] in ("end_turn", "max_tokens")
    assert 1 <= answer["usage"]["output_tokens"] <= 4


@pytest.mark.since(0, 13, 3)
async def test_a_stream_of_responses_counts_in_its_last_event(target: Target) -> None:
    body = {"model": target.model, **RESPONSES, "stream": True}
    events = (await target.post("/v1/responses", body)).events
    names = [name for name, _ in events]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] == "response.completed"
    assert all(value["response"]["usage"] is None for _, value in events[:2])
    usage = events[-1][1]["response"]["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["output_tokens"] >= 1
    assert [value["sequence_number"] for _, value in events] == [*range(len(events))]
