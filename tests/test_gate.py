"""Every request from arrival to its line in the log: what the router answers by itself."""

import asyncio
import json
from typing import Any

import pytest

from router.core.dialect import VIA, Family
from router.sim import Fault, FaultKind
from tests.rig import MODEL, Rig, model, parsed, rig, spec, talk

PROMPT = "planted prompt 5f2c"
KEY = "sk-planted-9d41"


def errors(r: Rig) -> list[dict[str, Any]]:
    return [line for line in r.lines if line["level"] == "error"]


def message(family: Family, body: bytes) -> str:
    """The text of an error in a dialect, whose other fields are checked."""
    error = json.loads(body)
    if family is Family.NATIVE:
        assert error.keys() == {"error"}
        return str(error["error"])
    if family is Family.OPENAI:
        assert error["error"].keys() == {"message", "type", "param", "code"}
        assert (error["error"]["param"], error["error"]["code"]) == (None, None)
    else:
        assert error["type"] == "error"
        assert error["request_id"].startswith("req_")
    return str(error["error"]["message"])


# What is no endpoint


@pytest.mark.parametrize(
    ("method", "path", "status", "location"),
    [
        ("GET", "/nope", 404, None),
        ("POST", "/api", 404, None),
        ("POST", "/v1/messages/count_tokens", 404, None),
        ("POST", "/v1/images/generations", 404, None),
        ("GET", "/v1/models/some/name", 404, None),
        ("GET", "/v1/models/some%2Fname", 404, None),
        ("GET", "/api/tags/", 301, "/api/tags"),
        ("HEAD", "/api/tags/", 307, "/api/tags"),
        ("POST", "/api/chat/?x=1", 307, "/api/chat?x=1"),
        ("DELETE", "/api/delete/", 307, "/api/delete"),
        ("GET", "//api//tags", 307, "/api/tags"),
        ("POST", "/api//chat", 307, "/api/chat"),
        ("GET", "//nope//", 404, None),
        ("GET", "/v1/models/a%0d%0aX-Evil:1/", 301, "/v1/models/a%0D%0AX-Evil:1"),
    ],
)
async def test_a_path_that_is_no_endpoint(
    method: str, path: str, status: int, location: str | None
) -> None:
    async with rig() as r, talk(r.url) as client:
        await client.send(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        answer = await client.answer(bodiless=method == "HEAD")
        assert answer.status == status
        assert answer.header("Location") == location
        if location is None:
            assert answer.body == b"404 page not found"
            assert answer.header("Content-Type") == "text/plain"
        assert answer.header("X-Evil") is None
        assert not errors(r)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/api/chat", "POST"),
        ("PUT", "/v1/chat/completions", "POST"),
        ("HEAD", "/api/ps", "GET"),
        ("POST", "/api/tags", "GET, HEAD"),
        ("DELETE", "/", "GET, HEAD"),
        ("POST", "/v1/models", "GET"),
        ("GET", "/api/delete", "DELETE"),
        ("GET", "/api/blobs/sha256:ab", "HEAD, POST"),
        ("OPTIONS", "/api/chat", "POST"),
    ],
)
async def test_a_wrong_method_is_told_the_right_ones(method: str, path: str, allow: str) -> None:
    async with rig() as r, r.session.request(method, r.url + path) as answer:
        assert answer.status == 405
        assert answer.headers["Allow"] == allow
        assert answer.headers["Content-Type"] == "text/plain"
        assert await answer.read() == (b"" if method == "HEAD" else b"405 method not allowed")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/", "/api/version", "/api/tags"])
async def test_head_is_answered_as_get_without_a_body(method: str, path: str) -> None:
    async with rig() as r, r.session.request(method, r.url + path) as answer:
        assert answer.status == 200
        assert bool(await answer.read()) is (method == "GET")


async def test_the_root_answers_without_any_node() -> None:
    async with rig() as r:
        await r.nodes[0].stop()
        await r.look()
        async with r.session.get(r.url) as answer:
            assert await answer.read() == b"Ollama is running"
            assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /v1/models/bad%20name HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /api/chat HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 7\r\n\r\n{broken",
        b'POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 14\r\n\r\n{"model":"a b"}',
        b"POST /api/pull HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello",
        b"GET /nope HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.org\r\n\r\n",
    ],
)
async def test_a_clients_mistake_costs_neither_its_connection_nor_an_error_in_the_log(
    sent: bytes,
) -> None:
    sent = sent.replace(b"Content-Length: 14", b"Content-Length: 15")
    async with rig() as r, talk(r.url) as client:
        for _ in range(2):
            await client.send(sent)
            answer = await client.answer()
            assert answer.status in (400, 403, 404, 405, 501)
            assert answer.header("Connection") is None
        assert not errors(r)


# Loops


async def test_a_request_that_comes_back_to_the_router_is_refused() -> None:
    async with rig() as r:
        async with r.chat() as answer:
            await answer.read()
        via = r.nodes[0].calls("/api/chat")[0].header(VIA)
        assert via
        body = json.dumps({"model": MODEL}).encode()
        for sent in ([via], ["other", via], [f"other, {via}"], [via, "other"]):
            async with talk(r.url) as client:
                await client.post("/api/chat", body, *(f"{VIA}: {one}" for one in sent))
                loop = await client.answer()
            assert loop.status == 508, sent
            assert "leads back to it" in message(Family.NATIVE, loop.body)
        async with r.session.get(f"{r.url}/api/tags", headers={VIA: "another router"}) as answer:
            assert answer.status == 200


async def test_every_router_that_a_request_passes_is_told_of() -> None:
    async with rig() as r:
        body = json.dumps({"model": MODEL}).encode()
        async with talk(r.url) as client:
            await client.post("/api/chat", body, f"{VIA}: first")
            await client.answer()
        seen = r.nodes[0].calls("/api/chat")[0]
        assert [value for name, value in seen.headers if name == VIA] == [
            "first",
            r.app._gate.proxy.instance,
        ]


async def test_two_routers_that_lead_to_each_other_notice_it() -> None:
    """The second one's only node is the first, whose only node becomes the second."""
    async with rig() as first, rig(entries=[{"url": first.url}]) as second:
        settings = {**first.settings, "nodes": [{"url": second.url, "name": "n1"}]}
        first.app.reconfigure(parsed(settings))
        await first.look()
        async with first.chat() as answer:
            assert answer.status == 508
            assert "leads back to it" in message(Family.NATIVE, await answer.read())


# Browsers


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/api/tags", None, 200),
        ("GET", "/nope", None, 404),
        ("GET", "/api/chat", None, 405),
        ("GET", "/api/tags/", None, 301),
        ("POST", "/api/pull", b"{}", 400),
        ("POST", "/api/chat", b'{"model":"nope"}', 404),
        ("POST", "/api/chat", b'{"model":"a b"}', 400),
        ("POST", "/api/chat", b'{"model":"llama3:8b","messages":[]}', 200),
        ("POST", "/api/chat", b'{"model":"llama3:8b","messages":[{"role":"user"}]}', 200),
        ("POST", "/api/chat", b'{"model":"llama3:8b","messages":{}}', 400),
    ],
)
async def test_a_page_that_may_call_can_read_every_answer(
    method: str, path: str, body: bytes | None, status: int
) -> None:
    headers = {"Origin": "http://localhost:3000"}
    async with (
        rig() as r,
        r.session.request(
            method, r.url + path, data=body, headers=headers, allow_redirects=False
        ) as answer,
    ):
        assert answer.status == status
        assert answer.headers.getall("Access-Control-Allow-Origin") == ["http://localhost:3000"]
        assert answer.headers["Vary"] == "Origin"
        assert all(seen.header("Origin") is None for seen in r.nodes[0].seen)


async def test_a_page_that_may_not_call_gets_an_empty_403() -> None:
    async with rig() as r:
        for method, path in (("GET", "/api/tags"), ("POST", "/api/chat"), ("OPTIONS", "/x")):
            headers = {"Origin": "http://evil.org"}
            async with r.session.request(method, r.url + path, headers=headers) as answer:
                assert (answer.status, await answer.read()) == (403, b"")
                assert "Access-Control-Allow-Origin" not in answer.headers
        assert not r.nodes[0].calls("/api/chat")


async def test_a_page_served_by_the_router_itself_needs_no_permission() -> None:
    async with rig() as r, r.session.get(f"{r.url}/", headers={"Origin": r.url}) as answer:
        assert answer.status == 200
        assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize("path", ["/api/chat", "/nope"])
async def test_a_preflight_is_answered_here(path: str) -> None:
    async with rig(cors={"origins": ["https://*.lab"]}) as r:
        headers = {"Origin": "https://chat.lab", "Access-Control-Request-Method": "POST"}
        async with r.session.options(r.url + path, headers=headers) as answer:
            assert (answer.status, await answer.read()) == (204, b"")
            assert answer.headers["Access-Control-Allow-Origin"] == "https://chat.lab"
            assert answer.headers["Access-Control-Max-Age"] == "43200"


# One line per request


async def test_each_request_has_one_line_with_every_field() -> None:
    async with rig() as r:
        async with r.chat() as answer:
            await answer.read()
            identity = answer.headers["X-Ollamux-Request-Id"]
        await r.until(lambda: r.requests != [])
        (line,) = r.requests
        assert line.pop("timestamp")
        assert 0 < line.pop("ttft_ms") <= line.pop("duration_ms")
        tokens = line.pop("completion_tokens")
        assert 16 <= tokens <= 48
        assert line == {
            "event": "request", "level": "info", "id": identity, "client": "127.0.0.1",
            "method": "POST", "endpoint": "/api/chat", "model": MODEL, "node": "n1",
            "reason": "load", "attempts": 1, "prompt_tokens": 7, "status": 200,
            "outcome": "ok",
        }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        ("GET", "/", None, ("/", "", 200, "ok", 0)),
        ("GET", "/nope", None, ("other", "", 404, "client_error", 0)),
        ("GET", "/v1/models/llama3:8b", None, ("/v1/models/:model", "", 200, "ok", 0)),
        ("GET", "/api/chat", None, ("/api/chat", "", 405, "client_error", 0)),
        ("POST", "/api/pull", b"{}", ("/api/pull", "", 400, "client_error", 0)),
        ("POST", "/api/chat", b'{"model":"nope"}', ("/api/chat", "nope:latest", 404,
         "client_error", 0)),
        ("POST", "/api/chat", b'{"model":"cold"}', ("/api/chat", "cold:latest", 503,
         "rejected", 0)),
        ("POST", "/api/chat", b"{}", ("/api/chat", "", 400, "client_error", 1)),
    ],
)  # fmt: skip
async def test_a_line_tells_how_a_request_ended(
    method: str, path: str, body: bytes | None, expected: tuple[str, str, int, str, int]
) -> None:
    async with rig(spec(), spec(model("cold"))) as r:
        await r.nodes[1].stop()
        await r.look()
        async with r.session.request(method, r.url + path, data=body) as answer:
            await answer.read()
        (line,) = r.requests
        fields = ("endpoint", "model", "status", "outcome", "attempts")
        assert tuple(line[field] for field in fields) == expected
        assert line["method"] == method


@pytest.mark.parametrize(("given", "taken"), [("client-7", True), ("no good", False)])
async def test_the_clients_own_id_is_used(given: str, *, taken: bool) -> None:
    async with rig() as r:
        headers = {"X-Request-Id": given}
        for path in ("/", "/nope"):
            async with r.session.get(r.url + path, headers=headers) as answer:
                assert (answer.headers["X-Ollamux-Request-Id"] == given) is taken
        body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
        async with r.session.post(f"{r.url}/api/chat", json=body, headers=headers) as answer:
            assert (answer.headers["X-Ollamux-Request-Id"] == given) is taken
        await r.until(lambda: len(r.requests) == 3)
        assert {line["id"] == given for line in r.requests} == {taken}


@pytest.mark.parametrize(("trusted", "told"), [([], "127.0.0.1"), (["127.0.0.0/8"], "192.0.2.7")])
async def test_a_forwarded_address_is_believed_from_trusted_only(
    trusted: list[str], told: str
) -> None:
    async with rig(trusted=trusted) as r:
        headers = {"X-Forwarded-For": "198.51.100.1, 192.0.2.7"}
        async with r.session.get(r.url, headers=headers):
            pass
        assert [line["client"] for line in r.requests] == [told]


async def test_lines_can_be_switched_off() -> None:
    async with rig(log={"requests": False}) as r:
        async with r.session.get(r.url):
            pass
        assert not r.requests


async def test_neither_prompts_nor_keys_are_ever_told() -> None:
    """In an answer, a refusal, a broken stream, a lost node, bad JSON and bad HTTP."""
    headers = {"Authorization": f"Bearer {KEY}", "x-api-key": KEY, "Cookie": KEY}
    secret = {"X-Node-Key": f"{KEY}-node"}
    async with rig(entries=[{"headers": secret}]) as r:
        good = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}]}
        bodies = [good, {**good, "model": "nope"}, {**good, "model": "a b"}, {**good, "stream": 1}]
        sent = [json.dumps(body).encode() for body in bodies] + [b"{" + PROMPT.encode()]
        faults = [None, Fault(FaultKind.DIE, after=2, partial=True), Fault(FaultKind.GARBAGE)]
        for fault in faults:
            for body in sent:
                r.nodes[0].fault = fault
                async with r.session.post(
                    f"{r.url}/api/chat?key={KEY}", data=body, headers=headers
                ) as answer:
                    told = str(answer.headers) + (await answer.read()).decode()
                    assert KEY not in told
        async with talk(r.url) as client:
            await client.send(f"GET /{KEY} HTTP/1.1\r\n{PROMPT}\r\n\r\n".encode())
            await client.rest()
        await r.nodes[0].stop()
        async with r.session.post(f"{r.url}/api/chat", json=good, headers=headers) as answer:
            assert answer.status == 503
        told = r.output.getvalue() + await r.metrics()
        assert PROMPT not in told
        assert KEY not in told
        assert "Bearer" not in told


async def test_idle_waits_for_the_last_request() -> None:
    async with rig(spec(num_parallel=2, warm=(MODEL,))) as r:
        gate = r.app._gate
        await gate.idle()
        r.nodes[0].fault = Fault(FaultKind.HANG)
        async with asyncio.TaskGroup() as group:
            chats = [group.create_task(r.chat().__aenter__()) for _ in range(2)]
            await r.nodes[0].until(lambda: r.nodes[0].in_flight == 2)
            idle = group.create_task(gate.idle())
            await asyncio.sleep(0)
            assert not idle.done()
            chats[0].cancel()
            await r.until(lambda: gate.active == 1)
            assert not idle.done()
            r.nodes[0].release()
            (await chats[1]).close()
        assert gate.active == 0
