"""Which paths and methods are answered, and how all others are."""

import re

import pytest

from tests.live.target import Target

JSON = "application/json; charset=utf-8"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_root_says_that_ollama_is_running(target: Target, method: str) -> None:
    answer = await target.ask(method, "/")
    assert (answer.status, answer.type) == (200, "text/plain; charset=utf-8")
    assert answer.body == (b"Ollama is running" if method == "GET" else b"")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_version_is_told(target: Target, method: str) -> None:
    answer = await target.ask(method, "/api/version")
    assert (answer.status, answer.type) == (200, JSON)
    if method == "GET":
        assert answer.json.keys() == {"version"}
        assert re.match(r"\d+\.\d+", answer.json["version"])
    else:
        assert answer.body == b""


async def test_a_head_of_tags_has_no_body(target: Target) -> None:
    answer = await target.ask("HEAD", "/api/tags")
    assert (answer.status, answer.type, answer.body) == (200, JSON, b"")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nope"),
        ("POST", "/api/nope"),
        ("GET", "/v1"),
        ("POST", "/v1/messages/count_tokens"),
        ("GET", "/v1/models/a/b"),
        ("GET", "/v1/models/a%2Fb"),
    ],
)
async def test_an_unknown_path_is_a_plain_404(target: Target, method: str, path: str) -> None:
    answer = await target.ask(method, path, b"{}" if method == "POST" else None)
    assert (answer.status, answer.type) == (404, "text/plain")
    assert answer.text == "404 page not found"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/api/chat", {"POST"}),
        ("GET", "/v1/chat/completions", {"POST"}),
        ("POST", "/api/tags", {"GET", "HEAD"}),
        ("DELETE", "/api/version", {"GET", "HEAD"}),
        ("POST", "/api/ps", {"GET"}),
        ("POST", "/v1/models", {"GET"}),
        ("HEAD", "/api/ps", {"GET"}),
        ("HEAD", "/api/chat", {"POST"}),
    ],
)
async def test_a_wrong_method_is_a_405_that_says_which_are_allowed(
    target: Target, method: str, path: str, allowed: set[str]
) -> None:
    answer = await target.ask(method, path)
    assert (answer.status, answer.type) == (405, "text/plain")
    assert {*(answer.header("Allow") or "").split(", ")} == allowed
    assert answer.text == ("" if method == "HEAD" else "405 method not allowed")


@pytest.mark.parametrize(
    ("method", "path", "status", "location"),
    [
        ("GET", "/api/tags/", 301, "/api/tags"),
        ("GET", "/api/tags/?a=1", 301, "/api/tags?a=1"),
        ("POST", "/api/chat/", 307, "/api/chat"),
        ("POST", "/v1/messages/", 307, "/v1/messages"),
        ("POST", "/api//chat", 307, "/api/chat"),
    ],
)
async def test_a_path_with_too_many_slashes_is_redirected(
    target: Target, method: str, path: str, status: int, location: str
) -> None:
    answer = await target.ask(method, path, b"{}" if method == "POST" else None)
    assert (answer.status, answer.header("Location")) == (status, location)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/"), ("GET", "/api/tags"), ("GET", "/nope"), ("GET", "/api/chat")],
)
async def test_no_server_is_named(target: Target, method: str, path: str) -> None:
    assert (await target.ask(method, path)).header("Server") is None


@pytest.mark.parametrize("path", ["/api/tags?ts=1", "/api/version?beta=true", "/v1/models?x"])
async def test_a_query_changes_nothing(target: Target, path: str) -> None:
    asked, plain = await target.get(path), await target.get(path.partition("?")[0])
    assert asked.status == plain.status == 200
    assert asked.json.keys() == plain.json.keys()


@pytest.mark.since(0, 16, 2)
async def test_the_status_says_whether_there_is_a_cloud(target: Target) -> None:
    cloud = (await target.get("/api/status")).json["cloud"]
    assert isinstance(cloud["disabled"], bool)
    assert cloud["source"] in ("none", "env", "config", "both")


@pytest.mark.since(0, 22, 1)
async def test_recommendations_are_a_list(target: Target) -> None:
    answer = await target.get("/api/experimental/model-recommendations")
    assert answer.status == 200
    assert isinstance(answer.json["recommendations"], list)
