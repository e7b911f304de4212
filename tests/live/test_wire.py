"""Connections: what is kept, what a client that leaves ends, and which pages may call."""

from typing import Any

import pytest

from tests.live.target import ASKED, NOBODYS, SHORT, Reply, Target
from tests.rig import Talk, talk

# So long that no loaded machine takes a wait for something else for it.
_LONG_NS = 60_000_000_000
_NO_CORS = "the simulated node checks origins and tells pages nothing"
LOCAL = "Origin: http://localhost:3000"
FOREIGN = "Origin: http://example.com"


async def test_a_connection_is_kept_whatever_was_answered(target: Target) -> None:
    async with talk(target.url) as connection:
        for method, path, status in (
            ("GET", "/", 200), ("HEAD", "/api/tags", 200), ("GET", "/nope", 404),
            ("GET", "/api/chat", 405), ("GET", "/api/version", 200),
        ):  # fmt: skip
            await connection.send(target.request(method, path))
            assert (await connection.answer(bodiless=method == "HEAD")).status == status
        for _ in range(2):
            body = {"model": target.model, "messages": ASKED, "options": SHORT}
            await connection.send(target.request("POST", "/api/chat", body))
            assert Reply(await connection.answer()).records[-1]["done"] is True
        await connection.send(target.request("POST", "/api/chat", {"model": NOBODYS}))
        assert (await connection.answer()).status == 404


async def test_nothing_is_compressed(target: Target) -> None:
    asked = "Accept-Encoding: gzip, deflate, br, zstd"
    for path in ("/api/tags", "/v1/models", "/api/version"):
        answer = await target.get(path, asked)
        assert (answer.status, answer.header("Content-Encoding")) == (200, None)
        assert answer.json


async def test_a_client_that_waits_for_it_is_told_to_go_on(target: Target) -> None:
    head, _, body = target.request("POST", "/api/show", {"model": NOBODYS}).partition(b"\r\n\r\n")
    async with talk(target.url) as connection:
        await connection.send(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert (await connection.head())[1] == 100
        await connection.send(body)
        assert (await connection.answer()).status == 404


async def _leaves(connection: Talk, way: str) -> None:
    if way == "reset":
        connection.leave()
    else:
        connection.writer.write_eof()
        await connection.rest()


@pytest.mark.parametrize("way", ["reset", "half"])
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
async def test_a_client_that_leaves_ends_its_answer(target: Target, path: str, way: str) -> None:
    """The next one does not wait in the node's slot until the long answer would have ended."""
    model = target.pinned(target.slow or target.model)
    brief = {"model": model, "messages": ASKED, "options": SHORT, "stream": False}
    tokens = _tokens_of_long((await target.post("/api/chat", brief)).json)
    story = [{"role": "user", "content": "Count from 1 to 1000, one number per line."}]
    long = {"options": {**SHORT, "num_predict": tokens}, "max_tokens": tokens, "stream": True}
    async with talk(target.url) as connection:
        body = {"model": model, "messages": story, **long}
        await connection.send(target.request("POST", path, body))
        assert (await connection.head())[1] == 200
        assert await connection.chunk()
        await _leaves(connection, way)
    told = (await target.post("/api/chat", brief)).json
    spent = ("load_duration", "prompt_eval_duration", "eval_duration")
    assert told["total_duration"] - sum(told.get(name, 0) for name in spent) < _LONG_NS / 2


def _tokens_of_long(told: dict[str, Any]) -> int:
    """How many tokens take `_LONG_NS`, by what a short answer took."""
    return max(100, min(500_000, int(_LONG_NS / told["eval_duration"] * told["eval_count"])))


@pytest.mark.gap("simulated-node", _NO_CORS)
async def test_a_local_page_may_read_the_answer(target: Target) -> None:
    for path in ("/", "/api/tags", "/v1/models", "/nope"):
        answer = await target.get(path, LOCAL)
        assert answer.header("Access-Control-Allow-Origin") in ("http://localhost:3000", "*")


async def test_a_foreign_page_may_not_call(target: Target) -> None:
    if not target.own_rules:
        pytest.skip("which pages may call is for whoever runs these nodes")
    for path in ("/", "/api/tags", "/v1/models"):
        answer = await target.get(path, FOREIGN)
        assert (answer.status, answer.body) == (403, b"")


@pytest.mark.gap("simulated-node", _NO_CORS)
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/api/delete"])
async def test_a_preflight_is_told_what_is_allowed(target: Target, path: str) -> None:
    asked = ("Access-Control-Request-Method: POST", "Access-Control-Request-Headers: content-type")
    answer = await target.ask("OPTIONS", path, None, LOCAL, *asked)
    assert (answer.status, answer.body) == (204, b"")
    assert answer.header("Access-Control-Max-Age") == "43200"
    assert answer.header("Access-Control-Allow-Origin") in ("http://localhost:3000", "*")
    headers = (answer.header("Access-Control-Allow-Headers") or "").lower().split(",")
    assert {"authorization", "content-type", "openai-beta", "x-stainless-os"} <= {*headers}
    assert "x-api-key" not in headers
    assert "POST" in (answer.header("Access-Control-Allow-Methods") or "").split(",")


async def test_a_page_of_the_same_origin_is_none_of_another(target: Target) -> None:
    answer = await target.get("/api/tags", f"Origin: http://{target.host}")
    assert (answer.status, answer.header("Access-Control-Allow-Origin")) == (200, None)
