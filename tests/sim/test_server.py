"""The simulated node on a real socket: endpoints, framings, error texts, cancellation."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import cast

import aiohttp
import ollama
import openai
import pytest
from aiohttp import ClientSession
from yarl import URL

from router.sim import Scheduler, SimNode, SimSpec
from tests.sim.nodes import CHAT, EMBED, SPEC, USER, chat_body, events, quick, records, slow

JSON = "application/json; charset=utf-8"
INT_FIELDS = ("total_duration", "load_duration", "prompt_eval_count", "eval_count")


async def exchange(node: SimNode, head: str, body: bytes = b"") -> tuple[str, str]:
    """Status line and headers, and body, of a request written by hand."""
    reader, writer = await asyncio.open_connection(node.host, node.port)
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    writer.write(f"{head}\r\nHost: x\r\nConnection: close\r\n{length}\r\n".encode() + body)
    answer = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    first, _, rest = answer.partition("\r\n\r\n")
    return first, rest


async def test_root_answers_both_methods(node: SimNode, web: ClientSession) -> None:
    async with web.get("/") as response:
        assert await response.text() == "Ollama is running"
        assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert "Server" not in response.headers
    async with web.head("/") as response:
        assert (response.status, await response.read()) == (200, b"")


async def test_version_and_status(web: ClientSession) -> None:
    async with web.get("/api/version") as response:
        assert await response.json() == {"version": "0.33.0"}
    async with web.get("/api/status") as response:
        assert (await response.json())["cloud"]["disabled"] is False


async def test_tags_lists_the_newest_first() -> None:
    new = quick("new", modified_at=datetime(2026, 5, 1, tzinfo=UTC))
    async with (
        SimNode(SimSpec(models=(CHAT, EMBED, new))) as node,
        ClientSession(node.url) as web,
    ):
        async with web.get("/api/tags") as response:
            listed = (await response.json())["models"]
        assert [one["name"] for one in listed] == [
            "new:latest",
            "llama3:8b",
            "nomic-embed-text:latest",
        ]
        assert len(listed[0]["digest"]) == 64
        assert listed[2]["capabilities"] == ["embedding"]
        async with web.head("/api/tags") as response:
            assert (response.status, response.content_length) == (200, None)


async def test_ps_lists_what_is_loaded(web: ClientSession) -> None:
    async with web.get("/api/ps") as response:
        assert await response.json() == {"models": []}
    body = {"model": "llama3:8b", "keep_alive": -1, "options": {"num_ctx": 1000}}
    async with web.post("/api/generate", json=body) as response:
        assert (await response.json())["done_reason"] == "load"
    async with web.get("/api/ps") as response:
        (one,) = (await response.json())["models"]
    assert (one["name"], one["context_length"]) == ("llama3:8b", 1000)
    assert one["size"] == one["size_vram"] > CHAT.size_bytes
    assert one["expires_at"] > "2300"


async def test_show(web: ClientSession) -> None:
    for key in ("model", "name"):
        async with web.post("/api/show", json={key: "LLAMA3:8B", "system": "s"}) as response:
            shown = await response.json()
        assert shown["model_info"]["llama.context_length"] == 8192
        assert shown["system"] == "s"
        assert CHAT.weights in shown["modelfile"]


async def test_chat_streams_by_default(node: SimNode, web: ClientSession) -> None:
    for stream in ({}, {"stream": None}, {"stream": True}):
        async with web.post("/api/chat", json=chat_body(**stream)) as response:
            found = await records(response)
            assert response.headers["Content-Type"] == "application/x-ndjson"
            assert response.headers["Transfer-Encoding"] == "chunked"
        assert [one["done"] for one in found] == [False] * 6 + [True]
        assert found[-1]["done_reason"] == "stop"
        assert found[-1]["eval_count"] == 6
    assert [one.outcome for one in node.calls("/api/chat")] == ["done"] * 3
    assert node.seen[0].records == 7


async def test_one_chunk_is_one_record(node: SimNode) -> None:
    body = json.dumps(chat_body()).encode()
    _, chunks = await exchange(node, "POST /api/chat HTTP/1.1", body)
    parts = chunks.split("\r\n")
    lines = parts[1:-3:2]
    assert len(lines) == 7
    assert all(json.loads(line) and line.endswith("\n") for line in lines)


async def test_stream_and_whole_answer_say_the_same(web: ClientSession) -> None:
    async with web.post("/api/chat", json=chat_body()) as response:
        streamed = await records(response)
    async with web.post("/api/chat", json=chat_body(stream=False)) as response:
        whole = await response.json()
        assert response.headers["Content-Type"] == JSON
    parts = [cast("dict[str, str]", one["message"])["content"] for one in streamed]
    assert whole["message"]["content"] == "".join(parts)
    assert whole["eval_count"] == 6


async def test_durations_add_up() -> None:
    steady = quick("m", load_s=0.001, prefill_tps=1e5, decode_tps=1e5)
    async with SimNode(SimSpec(models=(steady,))) as node, ClientSession(node.url) as web:
        body = {"model": "m", "messages": USER, "stream": False}
        async with web.post("/api/chat", json=body) as response:
            final = await response.json()
    parts = ("load_duration", "prompt_eval_duration", "eval_duration")
    assert final["total_duration"] == sum(final[part] for part in parts)
    assert final["load_duration"] == 3_000_000
    assert final["eval_duration"] == final["eval_count"] * 10_000


async def test_generate_and_its_context(web: ClientSession) -> None:
    body = {"model": "llama3", "prompt": "hi"}
    async with web.post("/api/generate", json={**body, "model": "llama3:8b"}) as response:
        final = (await records(response))[-1]
    context = cast("list[int]", final["context"])
    assert len(context) > 6
    for extra in ({"raw": True}, {"system": "be brief", "context": context}):
        asked = {"model": "llama3:8b", "prompt": "hi", "stream": False, **extra}
        async with web.post("/api/generate", json=asked) as response:
            final = await response.json()
        assert ("context" in final) is ("raw" not in extra)
        assert final["response"]


async def test_generate_continues_a_raw_prompt(web: ClientSession) -> None:
    async def say(prompt: str) -> str:
        body = {"model": "llama3:8b", "prompt": prompt, "raw": True, "stream": False}
        async with web.post("/api/generate", json=body) as response:
            return str((await response.json())["response"])

    full = await say("[INST] hi [/INST]")
    assert await say("[INST] hi [/INST]" + full[:7]) == full[7:]


async def test_num_predict_cuts(web: ClientSession) -> None:
    body = chat_body(stream=False, options={"num_predict": 2})
    async with web.post("/api/chat", json=body) as response:
        final = await response.json()
    assert (final["done_reason"], final["eval_count"]) == ("length", 2)


async def test_thinking_json_and_tools(web: ClientSession) -> None:
    async with web.post("/api/chat", json=chat_body(think=True, format="json")) as response:
        found = await records(response)
    messages = [cast("dict[str, str]", one["message"]) for one in found]
    assert "".join(one.get("thinking", "") for one in messages)
    assert "answer" in json.loads("".join(one["content"] for one in messages))

    tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
    asked = [{"role": "user", "content": "use the tool clock"}]
    for stream in (True, False):
        body = chat_body(messages=asked, tools=[tool], stream=stream, think=True)
        async with web.post("/api/chat", json=body) as response:
            found = await records(response)
        calls = [one["message"] for one in found if "tool_calls" in str(one)]
        (message,) = cast("list[dict[str, list[dict[str, dict[str, object]]]]]", calls)
        assert message["tool_calls"][0]["function"]["name"] == "clock"


async def test_generate_can_think(web: ClientSession) -> None:
    body = {"model": "llama3:8b", "prompt": "hi", "think": True, "stream": False}
    async with web.post("/api/generate", json=body) as response:
        assert (await response.json())["thinking"]


async def test_go_escapes_in_json(web: ClientSession) -> None:
    asked = [{"role": "user", "content": f"{at}"} for at in range(50)]
    texts = []
    for one in asked:
        async with web.post("/api/chat", json=chat_body(messages=[one])) as response:
            texts.append(await response.text())
    everything = "".join(texts)
    assert not set("<>&\u2028") & set(everything)
    for wanted in ("\\u003cb\\u003e", "\\u2028", "\\u0026", "é", "漢", "🦙"):
        assert wanted in everything


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/generate", {"model": "llama3:8b"}),
        ("/api/generate", {"model": "llama3:8b", "prompt": ""}),
        ("/api/chat", {"model": "llama3:8b", "messages": []}),
    ],
)
async def test_load_and_unload(
    node: SimNode, web: ClientSession, path: str, body: dict[str, object]
) -> None:
    for keep_alive, reason, loaded in ((60, "load", 1), (0, "unload", 0), ("0s", "unload", 0)):
        async with web.post(path, json={**body, "keep_alive": keep_alive}) as response:
            answer = await response.json()
            assert response.headers["Content-Type"] == JSON
        assert (answer["done"], answer["done_reason"]) == (True, reason)
        async with web.get("/api/ps") as response:
            assert len((await response.json())["models"]) == loaded


@pytest.mark.parametrize(
    ("keep_alive", "left"),
    [("5m", "5m"), ("1h30m", "90m"), (300, "5m"), (0.5, "0.5s"), ("500ms", "0.5s"), (None, "5m")],
)
async def test_keep_alive_grammar(
    node: SimNode, web: ClientSession, keep_alive: object, left: str
) -> None:
    body = {"model": "llama3:8b", "keep_alive": keep_alive}
    async with web.post("/api/generate", json=body) as response:
        assert response.status == 200
    ((one),) = node.scheduler.resident(0.0)
    seconds = {"5m": 300, "90m": 5400, "0.5s": 0.5}[left]
    assert one.expires_at == pytest.approx(cast("float", node.seen[0].finished) + seconds, abs=0.2)


@pytest.mark.parametrize("keep_alive", ["10", "-1", "5 m", "", True, [1]])
async def test_bad_keep_alive_is_refused(web: ClientSession, keep_alive: object) -> None:
    async with web.post("/api/chat", json=chat_body(keep_alive=keep_alive)) as response:
        assert response.status == 400


async def test_negative_durations_are_for_ever(web: ClientSession) -> None:
    async with web.post("/api/chat", json=chat_body(keep_alive="-1m")) as response:
        await response.read()
    async with web.get("/api/ps") as response:
        assert (await response.json())["models"][0]["expires_at"] > "2300"


async def test_embed(web: ClientSession) -> None:
    for given, count in (("hi", 1), (["hi", "there"], 2), ([], 0)):
        body = {"model": "nomic-embed-text", "input": given}
        async with web.post("/api/embed", json=body) as response:
            answer = await response.json()
        assert len(answer["embeddings"]) == count
        assert all(len(one) == 8 for one in answer["embeddings"])
        assert ("prompt_eval_count" in answer) is bool(count)


async def test_embed_refuses_what_is_no_text_and_models_that_cannot() -> None:
    mute = quick("mute", can_embed=False)
    async with SimNode(SimSpec(models=(mute, EMBED))) as node, ClientSession(node.url) as web:
        async with web.post("/api/embed", json={"model": "mute", "input": "x"}) as response:
            assert response.status == 501
        body = {"model": "nomic-embed-text", "input": [1, 2]}
        async with web.post("/api/embed", json=body) as response:
            assert response.status == 400


async def test_old_embeddings_know_the_case_of_names(web: ClientSession) -> None:
    for name, status in (("nomic-embed-text", 200), ("Nomic-Embed-Text", 404)):
        body = {"model": name, "prompt": "hi"}
        async with web.post("/api/embeddings", json=body) as response:
            assert response.status == status
    async with web.post("/api/embeddings", json={"model": "nomic-embed-text"}) as response:
        assert await response.json() == {"embedding": []}


@pytest.mark.parametrize(
    ("path", "model", "status", "message"),
    [
        ("/api/chat", "nope", 404, "model 'nope' not found"),
        ("/api/chat", "", 400, "model is required"),
        ("/api/chat", "llama3", 404, "model 'llama3' not found"),
        ("/api/chat", "llama3:8b@node1", 400, "invalid model name"),
        ("/api/chat", "a/b/c/d", 400, "invalid model name"),
        ("/api/chat", "x:20b-cloud:local", 400, "invalid model name"),
        ("/api/chat", "nomic-embed-text", 400, '"nomic-embed-text" does not support chat'),
        ("/api/generate", "", 404, "model '' not found"),
        ("/api/generate", "nope", 404, "model 'nope' not found"),
        ("/api/embed", "nope", 404, 'model "nope" not found, try pulling it first'),
        ("/api/show", "Nope", 404, "model 'Nope:latest' not found"),
        ("/api/show", "", 400, "model is required"),
    ],
)
async def test_native_errors(
    web: ClientSession, path: str, model: str, status: int, message: str
) -> None:
    body = {"model": model, "messages": USER, "prompt": "hi", "input": "hi"}
    async with web.post(path, json=body) as response:
        answer = await response.json()
        assert response.headers["Content-Type"] == JSON
    assert (response.status, answer["error"]) == (status, message)


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_an_embedding_model_is_loaded_by_embed_alone_and_unloaded_by_all(
    web: ClientSession, path: str
) -> None:
    for body, status in (({}, 400), ({"keep_alive": 0}, 200)):
        async with web.post(path, json={"model": "nomic-embed-text", **body}) as response:
            assert response.status == status
    async with web.post("/api/embed", json={"model": "nomic-embed-text"}) as response:
        assert (await response.json())["embeddings"] == []


@pytest.mark.parametrize(
    "name",
    ["LLAMA3:8B", " llama3:8b ", "llama3:8b:local", "library/llama3:8b", "https://llama3:8b"],
)
async def test_model_is_found_by_all_its_spellings_and_echoed(
    web: ClientSession, name: str
) -> None:
    async with web.post("/api/chat", json=chat_body(model=name, stream=False)) as response:
        assert (await response.json())["model"] == name


async def test_cloud_model_that_the_node_lists_is_served() -> None:
    stub = quick("gpt-oss:20b-cloud")
    async with SimNode(SimSpec(models=(stub,))) as node, ClientSession(node.url) as web:
        assert await send(web, model="gpt-oss:20b-cloud") == 200


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "missing request body"),
        (b"\xef\xbb\xbf{}", 400, "invalid character '\ufeff' looking for beginning of value"),
        (b"   ", 400, "unexpected EOF"),
        (b'{"model": "a', 400, "invalid character"),
        (b'{"model":', 400, "unexpected EOF"),
        (b"[1]", 400, "json: cannot unmarshal array"),
        (b'{"model": NaN}', 400, "invalid character 'N'"),
        (b'{"model": "a\nb"}', 400, "in string literal"),
        (b"[" * 100_000, 400, "exceeded max depth"),
        (b"null", 400, "model is required"),
        (b'{"model": 5}', 400, "json: cannot unmarshal number"),
        (b'{"model": "llama3:8b", "messages": [5]}', 400, "cannot unmarshal number"),
        (b'{"model": "llama3:8b", "stream": "yes"}', 400, "of type bool"),
        (b'{"model": "llama3:8b", "options": {"num_ctx": "x"}}', 500, "cannot unmarshal string"),
        (b'{"model": "llama3:8b", "options": {"num_ctx": true}}', 500, "cannot unmarshal bool"),
    ],
)
async def test_bodies_that_go_refuses(
    web: ClientSession, body: bytes, status: int, message: str
) -> None:
    async with web.post("/api/chat", data=body) as response:
        assert response.status == status
        assert message in (await response.json())["error"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"llama3:8b"} and more',
        b'{"MODEL":"llama3:8b"}',
        b'{"model":"nope","Model":"llama3:8b"}',
        b'{"Model":"a","model":"nope","Model":"llama3:8b"}',
        b' \r\n{"model":"llama3:8b","unknown":{"a":[1]},"options":{"unknown":1}}',
        b'{"model":"llama3:8b","system":"\xff\xfe"}',
        b'{"model":"llama3:8b","system":"\\ud800"}',
    ],
)
async def test_bodies_that_go_accepts(web: ClientSession, body: bytes) -> None:
    headers = {"Content-Type": "image/png"}
    async with web.post("/api/chat", data=body, headers=headers) as response:
        assert (response.status, (await response.json())["done_reason"]) == (200, "load")


async def test_compressed_body_is_no_json(web: ClientSession) -> None:
    headers = {"Content-Encoding": "gzip"}
    async with web.post("/api/chat", data=b"\x1f\x8b\x08", headers=headers) as response:
        assert response.status == 400


async def test_large_body_is_taken(web: ClientSession) -> None:
    image = "a" * 20_000_000
    messages = [{"role": "user", "content": "hi", "images": [image]}]
    body = io.BytesIO(json.dumps(chat_body(messages=messages)).encode())
    async with web.post("/api/chat", data=body) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "header", "value"),
    [
        ("GET", "/nope", 404, "Content-Type", "text/plain"),
        ("POST", "/v1/messages/count_tokens", 404, "Content-Type", "text/plain"),
        ("GET", "/v1/models/a%2Fb", 404, "Content-Type", "text/plain"),
        ("GET", "/v1/models/a/b", 404, "Content-Type", "text/plain"),
        ("HEAD", "/api/ps", 405, "Allow", "GET"),
        ("GET", "/api/chat", 405, "Allow", "POST"),
        ("DELETE", "/api/tags", 405, "Allow", "HEAD, GET"),
        ("GET", "/api/tags/?a=1", 301, "Location", "/api/tags?a=1"),
        ("POST", "/api/chat/", 307, "Location", "/api/chat"),
        ("GET", "/api//tags", 307, "Location", "/api/tags"),
        ("GET", "http://x/api/version", 200, "Content-Type", JSON),
    ],
)
async def test_paths_and_methods(
    node: SimNode, method: str, path: str, status: int, header: str, value: str
) -> None:
    head, body = await exchange(node, f"{method} {path} HTTP/1.1")
    assert head.startswith(f"HTTP/1.1 {status} ")
    assert f"\r\n{header}: {value}\r\n" in head + "\r\n"
    texts = {404: "404 page not found", 405: "405 method not allowed"}
    if status in texts and method != "HEAD":
        assert body == texts[status]


async def test_http_1_0_stream_ends_with_its_connection(node: SimNode) -> None:
    head, body = await exchange(node, "POST /api/chat HTTP/1.0", json.dumps(chat_body()).encode())
    assert "chunked" not in head
    assert len(body.strip().split("\n")) == 7


async def openai_chat(web: ClientSession, **changes: object) -> list[dict[str, object]]:
    async with web.post("/v1/chat/completions", json=chat_body(stream=True, **changes)) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        found = await events(response)
    assert found[-1] == ("[DONE]", {})
    return [value for _, value in found[:-1]]


async def test_openai_stream_tells_usage_only_when_asked(web: ClientSession) -> None:
    chunks = await openai_chat(web)
    assert not any("usage" in chunk for chunk in chunks)
    deltas = [cast("list[dict[str, object]]", one["choices"])[0] for one in chunks]
    assert ["role" in str(one["delta"]) for one in deltas] == [True] + [False] * 6
    assert (deltas[-1]["delta"], deltas[-1]["finish_reason"]) == ({}, "stop")
    chunks = await openai_chat(web, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert cast("dict[str, int]", chunks[-1]["usage"])["completion_tokens"] == 6


async def test_openai_chat_of_parts_tools_thinking_and_schema(web: ClientSession) -> None:
    parts = [
        {"type": "text", "text": "use the tool clock"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}},
    ]
    tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
    asked = {"messages": [{"role": "user", "content": parts}], "tools": [tool]}
    chunks = await openai_chat(web, reasoning_effort="low", **asked)
    text = json.dumps(chunks)
    assert '"reasoning": ' in text
    assert '"finish_reason": "tool_calls"' in text
    async with web.post(
        "/v1/chat/completions", json=chat_body(reasoning_effort="high", **asked)
    ) as response:
        message = (await response.json())["choices"][0]["message"]
    assert message["reasoning"]
    assert message["tool_calls"][0]["function"] == {"name": "clock", "arguments": "{}"}
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    for wanted, keys in (
        ({"type": "json_object"}, {"answer"}),
        ({"type": "json_schema", "json_schema": {"schema": schema}}, {"n"}),
    ):
        body = chat_body(response_format=wanted)
        async with web.post("/v1/chat/completions", json=body) as response:
            content = (await response.json())["choices"][0]["message"]["content"]
        assert json.loads(content).keys() == keys


async def test_openai_completions(web: ClientSession) -> None:
    body = {"model": "llama3:8b", "prompt": "hi"}
    async with web.post("/v1/completions", json=body) as response:
        whole = await response.json()
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with web.post("/v1/completions", json=asked) as response:
        found = [value for _, value in (await events(response))[:-1]]
    usages = [cast("dict[str, int]", one["usage"])["total_tokens"] for one in found]
    assert usages == [0] * 6 + [whole["usage"]["total_tokens"]]
    async with web.post("/v1/completions", json={**body, "stream": True}) as response:
        assert "usage" not in await response.text()
    async with web.post("/v1/completions", json={**body, "prompt": ""}) as response:
        assert (await response.json())["choices"][0]["finish_reason"] == "load"
    async with web.post("/v1/completions", json={**body, "prompt": ["a"]}) as response:
        assert response.status == 400


async def test_openai_embeddings(web: ClientSession) -> None:
    body = {"model": "nomic-embed-text", "input": ["a", "b"]}
    async with web.post("/v1/embeddings", json=body) as response:
        answer = await response.json()
    assert [one["index"] for one in answer["data"]] == [0, 1]
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == 2
    async with web.post("/v1/embeddings", json={**body, "input": ""}) as response:
        assert response.status == 400
    async with web.post("/v1/embeddings", json={**body, "encoding_format": "hex"}) as response:
        assert response.status == 400


async def test_openai_models(web: ClientSession) -> None:
    async with web.get("/v1/models") as response:
        ids = [one["id"] for one in (await response.json())["data"]]
    assert ids == ["llama3:8b", "nomic-embed-text:latest"]
    async with web.get("/v1/models/Nomic-embed-text") as response:
        answer = await response.json()
    assert (answer["id"], answer["owned_by"]) == ("Nomic-embed-text", "library")


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"model": "nope"}, 404, "not_found_error"),
        ({"model": ""}, 400, "invalid_request_error"),
        ({"messages": []}, 400, "invalid_request_error"),
        ({"model": "a@b"}, 400, "invalid_request_error"),
    ],
)
async def test_openai_errors(
    web: ClientSession, body: dict[str, object], status: int, kind: str
) -> None:
    async with web.post("/v1/chat/completions", json=chat_body(**body)) as response:
        answer = await response.json()
        assert response.headers["Content-Type"] == "application/json"
    assert (response.status, answer["error"]["type"]) == (status, kind)
    assert answer["error"]["param"] is answer["error"]["code"] is None


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
async def test_unsigned_cloud_has_the_native_error_everywhere(path: str) -> None:
    body = chat_body(model="big:cloud")
    async with (
        SimNode(SimSpec(user="")) as node,
        ClientSession(node.url) as web,
        web.post(path, json=body) as response,
    ):
        answer = await response.json()
    assert (response.status, answer["error"]) == (401, "unauthorized")
    assert "signin_url" in answer


async def test_anthropic_stream(web: ClientSession) -> None:
    body = chat_body(stream=True, max_tokens=100, thinking={"type": "enabled"}, system="be kind")
    async with web.post("/v1/messages?beta=true", json=body) as response:
        assert response.headers["Cache-Control"] == "no-cache"
        assert response.headers["Connection"] == "keep-alive"
        found = await events(response)
    names = [name for name, _ in found]
    block = ["content_block_start", *["content_block_delta"] * 6, "content_block_stop"]
    assert names == ["message_start", *block, *block, "message_delta", "message_stop"]
    assert all(value["type"] == name for name, value in found)
    final = cast("dict[str, int]", found[-2][1]["usage"])
    assert final["output_tokens"] == 12
    start = cast("dict[str, dict[str, int]]", found[0][1]["message"])
    assert start["usage"]["output_tokens"] == 0


async def test_anthropic_blocks_and_tools(web: ClientSession) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "name": "x", "input": {}}]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "content": "use the "},
                {"type": "image", "source": {"data": "aGk="}},
                {"type": "text", "text": "tool clock"},
                {"type": "other"},
            ],
        },
    ]
    tool = {"name": "clock", "input_schema": {"type": "object"}}
    body = chat_body(messages=messages, max_tokens=100, tools=[tool])
    async with web.post("/v1/messages", json={**body, "stream": True}) as response:
        text = await response.text()
    assert '"input_json_delta"' in text
    assert '"stop_reason":"tool_use"' in text
    thinking = {"type": "enabled"}
    async with web.post("/v1/messages", json={**body, "thinking": thinking}) as response:
        answer = await response.json()
    assert [one["type"] for one in answer["content"]] == ["thinking", "tool_use"]
    async with web.post("/v1/messages", json=chat_body(max_tokens=2)) as response:
        answer = await response.json()
    assert (answer["stop_reason"], answer["usage"]["output_tokens"]) == ("max_tokens", 2)
    assert answer["content"][0]["type"] == "text"


@pytest.mark.parametrize(
    ("changes", "status", "kind"),
    [
        ({"model": ""}, 400, "invalid_request_error"),
        ({"model": "nope"}, 404, "not_found_error"),
        ({"max_tokens": 0}, 400, "invalid_request_error"),
        ({"messages": []}, 400, "invalid_request_error"),
    ],
)
async def test_anthropic_errors(
    web: ClientSession, changes: dict[str, object], status: int, kind: str
) -> None:
    body = chat_body(**{"max_tokens": 10, **changes})
    async with web.post("/v1/messages", json=body) as response:
        answer = await response.json()
    assert (response.status, answer["type"], answer["error"]["type"]) == (status, "error", kind)
    assert len(answer["request_id"]) == 28


async def test_responses_stream(web: ClientSession) -> None:
    body = {"model": "llama3:8b", "input": "hi", "stream": True, "reasoning": {"effort": "low"}}
    async with web.post("/v1/responses", json=body) as response:
        found = await events(response)
    names = [name for name, _ in found]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] == "response.completed"
    assert names.count("response.output_text.delta") == 6
    assert names.count("response.reasoning_summary_text.delta") == 6
    assert [value["sequence_number"] for _, value in found] == list(range(len(found)))
    first = cast("dict[str, object]", found[0][1]["response"])
    last = cast("dict[str, dict[str, int]]", found[-1][1]["response"])
    assert first["usage"] is None
    assert last["usage"]["output_tokens"] == 12
    assert len(last["output"]) == 2


async def test_responses_items_and_tools(web: ClientSession) -> None:
    items = [
        {"role": "user", "content": "hi"},
        {"type": "function_call", "name": "clock", "arguments": "{}"},
        {"type": "function_call_output", "output": "noon"},
        {"role": "user", "content": [{"type": "input_text", "text": "use the tool clock"}]},
    ]
    tool = {"type": "function", "name": "clock", "parameters": {"type": "object"}}
    body = {"model": "llama3:8b", "input": items, "instructions": "short", "tools": [tool]}
    async with web.post("/v1/responses", json={**body, "stream": True}) as response:
        names = [name for name, _ in await events(response)]
    assert "response.function_call_arguments.done" in names
    async with web.post("/v1/responses", json=body) as response:
        answer = await response.json()
    assert [one["type"] for one in answer["output"]] == ["function_call"]
    asked = {**body, "tools": [], "max_output_tokens": 8, "reasoning": {"effort": "low"}}
    async with web.post("/v1/responses", json=asked) as response:
        answer = await response.json()
    assert [one["type"] for one in answer["output"]] == ["reasoning", "message"]
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    async with web.post("/v1/responses", json={"model": ""}) as response:
        assert response.status == 400


async def test_slots_and_queue_of_a_busy_node() -> None:
    spec = slow(warm=("llama3:8b",), num_parallel=2)
    async with SimNode(spec) as node, ClientSession(node.url) as web, asyncio.TaskGroup() as group:
        tasks = [group.create_task(send(web)) for _ in range(3)]
        await node.until(lambda: node.scheduler.in_flight == 3)
        assert (node.in_flight, node.peak_in_flight) == (3, 3)
        for task in tasks:
            task.cancel()
        await node.until(lambda: node.in_flight == 0)
        assert node.scheduler.in_flight == 0
        assert [one.outcome for one in node.seen] == ["cancelled"] * 3


async def send(web: ClientSession, **changes: object) -> int:
    async with web.post("/api/chat", json=chat_body(**changes)) as response:
        await response.read()
        return response.status


async def test_client_that_leaves_aborts_the_load_it_started() -> None:
    async with (
        SimNode(slow()) as node,
        ClientSession(node.url) as web,
        asyncio.TaskGroup() as group,
    ):
        task = group.create_task(send(web))
        await node.until(lambda: node.scheduler.in_flight == 1)
        task.cancel()
        await node.until(lambda: node.in_flight == 0)
        assert (node.scheduler.loads, node.scheduler.aborted_loads) == (1, 1)


async def test_client_that_leaves_in_mid_stream_cancels() -> None:
    async with SimNode(slow(warm=("llama3:8b",))) as node, ClientSession(node.url) as web:
        response = await web.post("/api/chat", json=chat_body())
        assert json.loads(await response.content.readline())["done"] is False
        response.close()
        await node.until(lambda: node.in_flight == 0)
        assert node.seen[0].outcome == "cancelled"


async def test_client_that_leaves_within_its_body_is_noticed(node: SimNode) -> None:
    _, writer = await asyncio.open_connection(node.host, node.port)
    writer.write(b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
    await node.until(lambda: node.in_flight == 1)
    writer.close()
    await writer.wait_closed()
    await node.until(lambda: node.in_flight == 0)
    assert node.seen[0].outcome == "cancelled"


async def test_full_load_queue_answers_busy_in_every_dialect() -> None:
    async with (
        SimNode(slow(max_queue=0)) as node,
        ClientSession(node.url) as web,
        asyncio.TaskGroup() as group,
    ):
        task = group.create_task(send(web))
        await node.until(lambda: node.scheduler.in_flight == 1)
        text = "server busy, please try again.  maximum pending requests exceeded"
        body = chat_body(input="x", prompt="x", max_tokens=5)
        answers = {}
        for path in ("/api/chat", "/api/embed", "/v1/chat/completions", "/v1/messages"):
            async with web.post(path, json=body) as response:
                answers[path] = await response.json()
                assert response.status == 503
                assert "Retry-After" not in response.headers
        assert answers["/api/chat"] == answers["/api/embed"] == {"error": text}
        assert answers["/v1/chat/completions"]["error"]["type"] == "api_error"
        assert answers["/v1/messages"]["error"]["type"] == "overloaded_error"
        task.cancel()


async def test_nothing_is_sent_before_the_first_token() -> None:
    async with (
        SimNode(slow()) as node,
        ClientSession(node.url) as web,
        asyncio.TaskGroup() as group,
    ):
        task = group.create_task(send(web))
        await node.until(lambda: node.scheduler.in_flight == 1)
        assert node.seen[0].status is None
        task.cancel()


async def test_reloading_options_reach_the_scheduler(node: SimNode, web: ClientSession) -> None:
    for options, shift, loads in (
        ({}, None, 1),
        ({"temperature": 0.5}, None, 1),
        ({"num_ctx": 2048}, None, 2),
        ({"num_batch": 64}, None, 3),
        ({}, False, 4),
        ({}, None, 5),
    ):
        assert await send(web, options=options, shift=shift) == 200
        assert node.scheduler.loads == loads


async def test_too_long_chat_is_refused_when_told_so() -> None:
    spec = SimSpec(models=(CHAT,), refuse_overflow=True, default_num_ctx=100)
    long = [{"role": "user", "content": "x" * 1000}]
    async with SimNode(spec) as node, ClientSession(node.url) as web:
        assert await send(web, messages=long) == 400
        body = {"model": "llama3:8b", "prompt": "x" * 1000, "stream": False}
        async with web.post("/api/generate", json=body) as response:
            assert (await response.json())["prompt_eval_count"] == 100


async def test_missing_capability_is_refused() -> None:
    plain = quick("plain", capabilities=("completion",))
    async with SimNode(SimSpec(models=(plain,))) as node, ClientSession(node.url) as web:
        assert await send(web, model="plain", think=True) == 400
        assert await send(web, model="plain", tools=[{"function": {"name": "x"}}]) == 400
        assert await send(web, model="plain", think=False, tools=[]) == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "box.internal"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "8.8.8.8"}, 403),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Origin": "app://x"}, 200),
        ({"Origin": "https://known.example"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://box.local", "Host": "box.local"}, 200),
    ],
)
async def test_host_and_origin_are_checked_when_told_so(
    headers: dict[str, str], status: int
) -> None:
    spec = SimSpec(check_host=True, origins=("https://known.example",))
    async with (
        SimNode(spec) as node,
        ClientSession(node.url) as web,
        web.get("/api/tags", headers=headers) as response,
    ):
        assert response.status == status


async def test_answer_above_two_kilobytes_is_chunked() -> None:
    many = SimSpec(models=tuple(quick(f"model{at}") for at in range(10)))
    async with SimNode(many) as node, ClientSession(node.url) as web:
        for path, length in (("/api/tags", None), ("/api/version", "20")):
            async with web.get(path) as response:
                await response.read()
                assert response.headers.get("Content-Length") == length
        head, _ = await exchange(node, "GET /api/tags HTTP/1.0")
        assert "Content-Length" in head


async def test_what_was_seen_is_recorded(node: SimNode, web: ClientSession) -> None:
    async with web.post("/api/show?x=1", data=b'{"model":"nope"}', headers={"X-A": "1"}) as one:
        await one.read()
    seen = node.seen[0]
    assert (seen.method, seen.raw_path, seen.body) == ("POST", "/api/show?x=1", b'{"model":"nope"}')
    assert (seen.header("x-a"), seen.status, seen.outcome) == ("1", 404, "error")
    assert seen.finished is not None
    assert seen.finished >= seen.started
    assert node.calls("/api/show") == node.calls() == [seen]


async def test_node_restarts_cold_on_its_port() -> None:
    node = SimNode(SPEC)
    with pytest.raises(RuntimeError):
        node.release()
    await node.start()
    port = node.port
    assert " up " in repr(node)
    async with ClientSession(node.url) as web:
        assert await send(web) == 200
        await node.stop()
        await node.stop()
        assert " stopped " in repr(node)
        await node.start()
        assert node.port == port
        assert node.scheduler.resident(0.0) == []
        assert await send(web) == 200
    await node.stop()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_stop_breaks_what_is_in_flight() -> None:
    async with ClientSession() as web, asyncio.TaskGroup() as group:
        async with SimNode(slow()) as node:
            url = f"{node.url}/api/chat"
            task = group.create_task(refused(web, url))
            await node.until(lambda: node.scheduler.in_flight == 1)
        assert node.in_flight == 0
        assert await task


async def refused(web: ClientSession, url: str) -> bool:
    try:
        async with web.post(url, json=chat_body()) as response:
            await response.read()
    except aiohttp.ClientConnectionError:
        return True
    return False


def test_two_models_of_one_name_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="second time"):
        SimNode(SimSpec(models=(quick("a"), quick("A:latest"))))


async def test_ipv6_address_is_bracketed() -> None:
    assert SimNode(SPEC, host="::1", port=80).url == "http://[::1]:80"


@pytest.fixture
async def client(node: SimNode) -> AsyncIterator[ollama.AsyncClient]:
    client = ollama.AsyncClient(host=node.url)
    yield client
    await client.close()  # type: ignore[no-untyped-call]


async def test_official_ollama_client(client: ollama.AsyncClient) -> None:
    whole = await client.chat("llama3:8b", messages=USER)
    parts = [
        part.message.content or ""
        async for part in await client.chat("llama3:8b", messages=USER, stream=True)
    ]
    assert "".join(parts) == whole.message.content
    vectors = (await client.embed("nomic-embed-text", input=["a", "b"])).embeddings
    assert [len(one) for one in vectors] == [8, 8]
    listed = [one.model for one in (await client.list()).models]
    assert listed == ["llama3:8b", "nomic-embed-text:latest"]
    assert "llama.context_length" in ((await client.show("llama3:8b")).modelinfo or {})
    running = [one.model for one in (await client.ps()).models]
    assert set(running) == set(listed)
    generated = await client.generate("llama3:8b", prompt="hi")
    assert generated.context
    with pytest.raises(ollama.ResponseError) as caught:
        await client.chat("nope", messages=USER)
    assert caught.value.status_code == 404


async def test_official_openai_client(node: SimNode) -> None:
    async with openai.AsyncOpenAI(base_url=f"{node.url}/v1", api_key="x") as client:
        message: openai.types.chat.ChatCompletionUserMessageParam = {"role": "user", "content": "h"}
        whole = await client.chat.completions.create(model="llama3:8b", messages=[message])
        stream = await client.chat.completions.create(
            model="llama3:8b",
            messages=[message],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        said = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
        assert said == whole.choices[0].message.content
        assert chunks[-1].usage == whole.usage
        found = await client.embeddings.create(model="nomic-embed-text", input="a")
        assert len(found.data[0].embedding) == 8
        assert len((await client.models.list()).data) == 2
        answer = await client.responses.create(model="llama3:8b", input="h")
        assert answer.output_text == said
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="nope", messages=[message])


async def test_url_of_a_node_is_one(node: SimNode) -> None:
    assert URL(node.url).port == node.port
    assert isinstance(node.scheduler, Scheduler)
