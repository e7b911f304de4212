"""The contract's traps 40 to 42, 49 and 52: headers, encodings, identities, and error dialects."""

import gzip
import json
import sys

import pytest

from router.core.dialect import Family
from router.sim import Fault, FaultKind
from tests.rig import MODEL, Peer, parsed, rig, scripted, spec, talk
from tests.traps.asking import ASKING, FOREIGN, NATIVE, answer, ask, bodies, family, posts, send

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

K = FaultKind
PACKED = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses",
          "/v1/messages")  # fmt: skip
KEYS = {"Authorization": "Bearer secret", "x-api-key": "secret", "api-key": "secret",
        "X-Goog-Api-Key": "secret", "Cookie": "k=secret", "X-Token": "secret"}  # fmt: skip


async def test_trap_40_a_node_sees_its_own_host_and_no_origin() -> None:
    async with rig(spec(check_host=True)) as r, talk(r.url) as client:
        node = r.nodes[0]
        body = json.dumps({"model": MODEL, "stream": False, **ASKING["/api/chat"]}).encode()
        line = f"POST /api/chat HTTP/1.1\r\nHost: router.internal\r\nContent-Length: {len(body)}"
        await client.send(f"{line}\r\nOrigin: http://localhost:3000\r\n\r\n".encode() + body)
        told = await client.answer()
        assert told.status == 200
        assert told.header("Access-Control-Allow-Origin") == "http://localhost:3000"
        seen = node.calls("/api/chat")[0]
        assert (seen.header("Host"), seen.header("Origin")) == (node.url[len("http://") :], None)


async def test_trap_40_nobody_learns_what_serves_and_hop_headers_stay_behind() -> None:
    async def script(peer: Peer) -> None:
        odd = (
            b"Server: uvicorn\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: max=5\r\n"
        )
        kept = b"Cache-Control: no-cache\r\nContent-Type: text/event-stream\r\n"
        await peer.say(
            b"HTTP/1.1 200 OK\r\n" + odd + kept + b"Content-Length: 12\r\n\r\ndata: {}\n\n\n\n"
        )

    async with scripted(script) as url, rig(entries=[{"url": url}]) as r, talk(r.url) as client:
        await client.post("/v1/messages", json.dumps({"model": MODEL, "stream": True}).encode())
        told = await client.answer()
        for name in ("Server", "Connection", "X-Hop", "Keep-Alive"):
            assert told.header(name) is None
        assert told.header("Cache-Control") == "no-cache"
        for path in ("/", "/api/tags", "/nope", "/api/ps"):
            assert "Server" not in (await send(r, path, method="GET")).headers
        assert "Server" not in (await ask(r, "/api/chat", "nope")).headers


async def test_trap_40_a_name_that_was_rebound_to_loopback_is_refused() -> None:
    async with rig() as r, talk(r.url) as client:
        await client.send(b"GET /api/tags HTTP/1.1\r\nHost: evil.example.org\r\n\r\n")
        told = await client.answer()
        assert (told.status, told.body) == (403, b"")


@pytest.mark.parametrize("path", PACKED)
async def test_trap_41_zstd_goes_on_as_it_came_where_nothing_is_edited(path: str) -> None:
    packed = zstd.compress(json.dumps({"model": MODEL, **ASKING[path]}).encode())
    async with rig(spec(), spec()) as r:
        told = await send(r, path, packed, Content_Encoding="zstd")
        assert told.status == 200
        (seen,) = [one for node in r.nodes for one in node.calls(path)]
        assert (seen.body, seen.header("Content-Encoding")) == (packed, "zstd")
        assert seen.header("Content-Length") == str(len(packed))


@pytest.mark.parametrize("path", PACKED)
async def test_trap_41_an_edited_body_says_what_it_is(path: str) -> None:
    body = json.dumps({"model": f"{MODEL}@n2", **ASKING[path]}).encode()
    async with rig(spec(), spec()) as r:
        told = await send(r, path, zstd.compress(body), Content_Encoding="zstd")
        assert (told.status, told.node) == (200, "n2")
        (seen,) = r.nodes[1].calls(path)
        assert seen.header("Content-Encoding") is None
        assert seen.body == body.replace(b"@n2", b"")
        assert seen.header("Content-Length") == str(len(seen.body))


@pytest.mark.parametrize("path", [*PACKED, *NATIVE])
async def test_trap_41_gzip_is_refused_as_a_node_refuses_it(path: str) -> None:
    packed = gzip.compress(json.dumps({"model": MODEL, **ASKING[path]}).encode())
    async with rig() as r:
        told = await send(r, path, packed, Content_Encoding="gzip")
        alone = await send(r, r.nodes[0].url + path, packed, Content_Encoding="gzip")
        assert (told.status, alone.status) == (400, 400)
        assert told.error == alone.error


@pytest.mark.parametrize("path", NATIVE)
async def test_trap_41_zstd_under_api_is_refused_as_a_node_refuses_it(path: str) -> None:
    packed = zstd.compress(json.dumps({"model": MODEL, **ASKING[path]}).encode())
    async with rig() as r:
        told = await send(r, path, packed, Content_Encoding="zstd")
        alone = await send(r, r.nodes[0].url + path, packed, Content_Encoding="zstd")
        assert (told.status, told.body) == (alone.status, alone.body)
        assert told.status == 400


@pytest.mark.parametrize("path", PACKED)
async def test_trap_41_zstd_that_is_none_is_a_400_before_the_dialect(path: str) -> None:
    async with rig() as r:
        for rubbish in (b"rubbish", zstd.compress(b"x" * (21 << 20))):
            told = await send(r, path, rubbish, Content_Encoding="zstd")
            assert told.status == 400
            assert isinstance(told.value["error"], str)


TYPES = {
    Family.OPENAI: {400: "invalid_request_error", 404: "not_found_error"},
    Family.ANTHROPIC: {
        400: "invalid_request_error", 404: "not_found_error", 503: "overloaded_error",
    },
}  # fmt: skip


@pytest.mark.parametrize("path", ASKING)
async def test_trap_42_the_routers_errors_speak_the_dialect_of_the_path(path: str) -> None:
    async with rig(timeouts={"first_byte_s": 0.3}) as r:
        node = r.nodes[0]
        told = {
            400: await ask(r, path, f"{MODEL}@10.1.2.3"),
            404: await ask(r, path, "nope"),
        }
        node.fault = Fault(K.DIE, path=path)
        told[502] = await ask(r, path, stream=False)
        node.fault = Fault(K.HANG, path=path)
        told[504] = await ask(r, path, stream=False)
        node.fault = None
        await node.refuse()
        told[503] = await ask(r, path)
        kind = family(path)
        for status, one in told.items():
            assert one.status == status
            expected = "application/json" + ("; charset=utf-8" if kind is Family.NATIVE else "")
            assert one.headers["Content-Type"] == expected
            error = one.value["error"]
            if kind is Family.NATIVE:
                assert (list(one.value), type(error)) == (["error"], str)
                continue
            assert error["type"] == TYPES[kind].get(status, "api_error")
            assert error["message"]
            if kind is Family.OPENAI:
                assert (error["param"], error["code"]) == (None, None)
            else:
                assert (one.value["type"], one.value["request_id"][:4]) == ("error", "req_")


async def test_trap_42_what_is_no_endpoint_gets_plain_text_in_every_dialect() -> None:
    async with rig() as r:
        for path in ("/api/nope", "/v1/nope", "/v1/messages/count_tokens", "/nope"):
            told = await send(r, path, b"{}")
            assert (told.status, told.body) == (404, b"404 page not found")
            assert told.headers["Content-Type"] == "text/plain"
        wrong = await send(r, "/v1/messages", method="GET")
        assert (wrong.status, wrong.body) == (405, b"405 method not allowed")


SEARCHES = ("/api/experimental/web_search", "/api/experimental/web_fetch")


@pytest.mark.parametrize("path", SEARCHES)
async def test_trap_49_a_search_goes_to_a_node_that_has_the_identity(path: str) -> None:
    entries = [{}, {"cloud": True}]
    async with rig(spec(cloud_disabled=True), spec(), entries=entries) as r:
        for _ in range(3):
            told = await send(r, path, {"query": "x", "url": "http://x"})
            assert (told.status, told.node) == (200, "n2")
        assert posts(r) == 3


def test_trap_49_a_silence_of_five_minutes_inside_an_answer_is_allowed() -> None:
    assert parsed({"nodes": ["http://n:1"]}).timeouts.between_records_s > 300


async def test_trap_49_the_hidden_calls_of_a_node_do_not_come_back_here() -> None:
    async def script(peer: Peer) -> None:
        heads.append(peer.head)
        await answer(peer, b"{}")

    heads: list[bytes] = []
    async with scripted(script) as url, rig(entries=[{"url": url}]) as r:
        for path in FOREIGN:
            await ask(r, path, tools=[{"type": "web_search_20250305", "name": "web_search"}])
        # A node calls the address that it was called by: it is told its own.
        authority = url.removeprefix("http://").encode()
        assert all(b"\r\nHost: " + authority + b"\r\n" in head for head in heads)
        assert len(heads) == len(FOREIGN)


@pytest.mark.parametrize("name", [MODEL, "gpt-oss:cloud", "gpt-oss:20b-cloud"])
@pytest.mark.parametrize("path", ASKING)
async def test_trap_52_no_key_of_a_client_reaches_a_node(path: str, name: str) -> None:
    async with rig() as r:
        body = json.dumps({"model": name, **ASKING[path]}).encode()
        async with r.session.post(r.url + path, data=body, headers=KEYS) as told:
            await told.read()
        (seen,) = r.nodes[0].calls(path)
        assert not any("secret" in value for _, value in seen.headers)
        assert bodies(r.nodes[0]) == [body]


async def test_trap_52_a_node_gets_the_key_that_is_configured_for_it() -> None:
    entries = [{"headers": {"Authorization": "Bearer of-the-node"}}]
    async with rig(entries=entries) as r:
        async with r.session.post(
            f"{r.url}/api/chat", data=b'{"model":"llama3:8b"}', headers=KEYS
        ) as told:
            assert told.status == 200
        (seen,) = r.nodes[0].calls("/api/chat")
        values = [value for name, value in seen.headers if name.lower() == "authorization"]
        assert values == ["Bearer of-the-node"]
