"""One relayed request: what reaches the node, which node, and what the client is told."""

import asyncio
import contextlib
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from router.core import dialect
from router.core.dialect import VIA, Kind
from router.core.types import Model, Observation, Sign
from router.sim import Fault, FaultKind, SimNode
from tests.rig import LEAST, MODEL, Peer, Rig, model, parsed, rig, scripted, spec, talk

HELLO: Mapping[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
ROUTED = [
    route
    for route in dialect.ROUTES
    if route.kind is Kind.ROUTED and route.methods == ("POST",) and not route.form
]
FAMILIES = ("/api/chat", "/v1/chat/completions", "/v1/messages")


def fields(path: str) -> dict[str, Any]:
    """What an endpoint wants besides the model."""
    match path:
        case "/api/generate" | "/v1/completions":
            return {"prompt": "hello"}
        case "/api/embed" | "/v1/embeddings" | "/v1/responses":
            return {"input": "hello"}
        case "/api/embeddings":
            return {"prompt": "hello"}
        case "/api/show":
            return {}
        case _:
            return {**HELLO, "max_tokens": 64}


async def post(r: Rig, path: str, body: bytes | Mapping[str, Any], **headers: str) -> Any:
    """(status, headers, body) of one POST."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with r.session.post(r.url + path, data=data, headers=headers) as answer:
        return answer.status, answer.headers, await answer.read()


async def ask(r: Rig, name: str, path: str = "/api/chat", field: str = "model") -> Any:
    return await post(r, path, {field: name, **fields(path), "stream": False})


def text(body: bytes) -> str:
    """The message of an error in any dialect."""
    error = json.loads(body)["error"]
    return str(error if isinstance(error, str) else error["message"])


GOOD = Observation(Sign.GOOD, "0.33.0", {MODEL: Model(MODEL, "", {})}, {}, "answers")


def got(node: SimNode) -> list[bytes]:
    """Bodies of the POSTs that reached a node."""
    return [seen.body for seen in node.seen if seen.method == "POST"]


# What reaches the node


@pytest.mark.parametrize("route", ROUTED, ids=lambda route: route.path)
async def test_every_endpoint_is_relayed_as_it_came(route: dialect.Route) -> None:
    async with rig() as r:
        body = json.dumps({"model": MODEL, **fields(route.path)}).encode()
        status, headers, _ = await post(r, f"{route.path}?beta=true&ts=%20x", body)
        assert status == 200
        assert headers["X-Ollamux-Node"] == "n1"
        seen = r.nodes[0].seen[-1]
        assert (seen.method, seen.raw_path) == ("POST", f"{route.path}?beta=true&ts=%20x")
        assert seen.body == body


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"llama3:8b","messages":[]}',
        b' \n{ "messages" : [ ] ,\t"model" : "llama3:8b" }  ',
        b'{"MODEL":"llama3:8b"}',
        b'{"model":"other","model":"llama3:8b"}',
        b'{"model":"llama3:8b","options":{"seed":12345678901234567890,"temperature":0.10}}',
        b'{"model":"llama3:8b","messages":[{"role":"user","content":"x\xe2\x80\xa8y"}]}',
        b'{"model":"llama3:8b","messages":[{"role":"user","content":"\xff\xfe"}]}',
        b'{"model":"llama3:8b","messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"model":"llama3:8b"} trailing bytes {"model":"other"}',
        b'{"model":"\\u006clama3:8b"}',
        b'{"model":" llama3:8b "}',
        b'{"model":"LLAMA3:8B"}',
        b'{"model":"registry.ollama.ai/library/llama3:8b"}',
        b'{"model":"llama3:8b:local"}',
    ],
)
async def test_a_body_reaches_the_node_byte_for_byte(body: bytes) -> None:
    async with rig() as r:
        _, headers, _ = await post(r, "/api/chat", body)
        assert headers["X-Ollamux-Node"] == "n1"
        assert got(r.nodes[0]) == [body]


async def test_a_large_body_reaches_the_node_byte_for_byte() -> None:
    async with rig() as r:
        image = "QUJD" * 1_500_000
        message = {"role": "user", "content": "what is this?", "images": [image]}
        body = json.dumps({"model": MODEL, "messages": [message], "stream": False}).encode()
        async with r.session.post(f"{r.url}/api/chat", data=io.BytesIO(body)) as answer:
            assert answer.status == 200
        assert got(r.nodes[0]) == [body]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('"llama3:8b@n1"', '"llama3:8b"'),
        ('"ollama/llama3:8b"', '"llama3:8b"'),
        ('"chat"', '"llama3:8b"'),
        ('" Chat:latest "', '"llama3:8b"'),
        ('"llama3\\u003a8b\\u0040n1"', '"llama3:8b"'),
        ('"LLama3:8b @ n1"', '"LLama3:8b"'),
    ],
)
async def test_only_the_name_is_replaced(written: str, expected: str) -> None:
    around = '{ "x":1.50, "model" : %s ,"messages":[{"content":"\\u00e9 %s"}]} tail'
    note = "llama3:8b@n1"
    async with rig(aliases={"chat": "llama3:8b@n1"}) as r:
        await post(r, "/api/chat", (around % (written, note)).encode())
        assert got(r.nodes[0]) == [(around % (expected, note)).encode()]


# Headers

KEPT = {"User-Agent": "GitHubCopilotChat/1", "X-Custom": "kept", "Accept": "text/event-stream",
        "Content-Type": "text/plain", "anthropic-version": "2023-06-01"}  # fmt: skip
DROPPED = {"Authorization": "Bearer k", "x-api-key": "k", "api-key": "k", "Cookie": "a=b",
           "Origin": "http://localhost", "Accept-Encoding": "gzip", "Keep-Alive": "timeout=5",
           "Proxy-Authorization": "Basic k", "Proxy-Connection": "x", "TE": "trailers",
           "Trailer": "X-T", "Upgrade": "h2c", "X-Nominated": "x",
           "Connection": "keep-alive, X-Nominated"}  # fmt: skip


async def test_headers_that_are_the_clients_own_stay_here() -> None:
    async with rig() as r, talk(r.url) as client:
        lines = [f"{name}: {value}" for name, value in {**KEPT, **DROPPED}.items()]
        await client.post("/api/chat", b'{"model":"llama3:8b"}', *lines)
        assert (await client.answer()).status == 200
        (seen,) = r.nodes[0].calls("/api/chat")
        arrived = {name.lower(): value for name, value in seen.headers}
        assert len(arrived) == len(seen.headers)
        assert arrived == {
            "host": r.nodes[0].url.removeprefix("http://"),
            "content-length": "21",
            VIA.lower(): r.app._gate.proxy.instance,
            **{name.lower(): value for name, value in KEPT.items()},
        }


async def test_a_nodes_own_headers_win_over_the_clients() -> None:
    own = {"Authorization": "Bearer node", "X-Custom": "node"}
    async with rig(entries=[{"headers": own}]) as r:
        await post(
            r, "/api/chat", {"model": MODEL}, **{"x-custom": "client", "Authorization": "client"}
        )
        (seen,) = r.nodes[0].calls("/api/chat")
        for name, value in own.items():
            assert [v for k, v in seen.headers if k.lower() == name.lower()] == [value]
        (probe, *_) = r.nodes[0].calls("/api/version")
        assert probe.header("Authorization") == "Bearer node", "probes carry them too"


async def test_a_path_prefix_of_a_node_stands_before_the_path() -> None:
    seen: list[bytes] = []

    async def script(peer: Peer) -> None:
        seen.append(peer.head.split(b" ")[1])
        await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    tags: Mapping[bytes, Any] = {
        b"/lab/ollama/api/version": {"version": "1.0"},
        b"/lab/ollama/api/tags": {"models": [{"name": MODEL}]},
        b"/lab/ollama/api/ps": {"models": []},
    }
    async with scripted(script, tags) as url, rig(entries=[{"url": f"{url}/lab/ollama"}]) as r:
        status, _, _ = await post(r, "/api/chat?a=b", {"model": MODEL})
        assert (status, seen) == (200, [b"/lab/ollama/api/chat?a=b"])


@pytest.mark.parametrize(
    ("path", "stream", "content_type"),
    [
        ("/api/chat", "absent", "application/x-ndjson"),
        ("/api/chat", None, "application/x-ndjson"),
        ("/api/chat", False, "application/json; charset=utf-8"),
        ("/api/generate", "absent", "application/x-ndjson"),
        ("/v1/chat/completions", "absent", "application/json"),
        ("/v1/chat/completions", None, "application/json"),
        ("/v1/chat/completions", True, "text/event-stream"),
        ("/v1/messages", "absent", "application/json"),
        ("/v1/messages", True, "text/event-stream"),
        ("/v1/responses", "absent", "application/json"),
        ("/v1/responses", True, "text/event-stream"),
    ],
)
async def test_a_stream_is_what_the_api_says_it_is(
    path: str, stream: object, content_type: str
) -> None:
    body = {"model": MODEL, **fields(path)}
    if stream != "absent":
        body["stream"] = stream
    async with rig() as r:
        status, headers, _ = await post(r, path, body)
        assert (status, headers["Content-Type"]) == (200, content_type)


# Names, pins, aliases


PINS = ["n1", "N1", "127.0.0.1:{port}", "http://127.0.0.1:{port}"]


@pytest.mark.parametrize("pin", PINS)
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
async def test_a_pin_decides_the_node(pin: str, path: str) -> None:
    async with rig(spec(), spec()) as r:
        for index in (0, 1):
            name = pin.format(port=r.nodes[index].port).replace("1", str(index + 1), 1) \
                if pin.lower() == "n1" else pin.format(port=r.nodes[index].port)  # fmt: skip
            for _ in range(2):
                status, headers, body = await ask(r, f"{MODEL}@{name}", path)
                assert status == 200, body
                assert headers["X-Ollamux-Node"] == f"n{index + 1}"
                assert headers["X-Ollamux-Model"] == MODEL
                assert headers["X-Ollamux-Reason"] == "pinned"
                assert json.loads(body)["model"] == MODEL, "the answer is the node's own"


@pytest.mark.parametrize("field", ["model", "name"])
@pytest.mark.parametrize("pin", PINS)
async def test_a_pin_decides_for_show_too(field: str, pin: str) -> None:
    async with rig(spec(), spec()) as r:
        status, headers, _ = await ask(r, f"{MODEL}@{pin.format(port=r.nodes[0].port)}",
                                       "/api/show", field)  # fmt: skip
        assert (status, headers["X-Ollamux-Node"]) == (200, "n1")
        assert json.loads(got(r.nodes[0])[0])[field] == MODEL


async def test_a_pin_to_an_ipv6_address() -> None:
    async with contextlib.AsyncExitStack() as stack:
        try:
            node = await stack.enter_async_context(SimNode(spec(), host="::1"))
        except OSError:
            pytest.skip("there is no IPv6 here")
        r = await stack.enter_async_context(rig(entries=[{"url": node.url}]))
        for pin in (f"[::1]:{node.port}", f"http://[0:0::1]:{node.port}"):
            status, _, _ = await ask(r, f"{MODEL}@{pin}")
            assert status == 200
        (seen, _) = node.calls("/api/chat")
        assert seen.header("Host") == f"[::1]:{node.port}"


NODES = r"n1 \(http://127\.0\.0\.1:\d+\), n2 \(http://127\.0\.0\.1:\d+\)"


@pytest.mark.parametrize("path", FAMILIES)
@pytest.mark.parametrize(
    ("name", "status", "told"),
    [
        ("llama3:8b@n9:1", 400, f"no such node; the nodes are: {NODES}"),
        ("llama3:8b@127.0.0.1", 400, f"no such node; the nodes are: {NODES}"),
        ("llama3:8b@https://127.0.0.1:1", 400, f"no such node; the nodes are: {NODES}"),
        ("llama3:8b@10.1.2.3:11434", 400, f"no such node; the nodes are: {NODES}"),
        ("llama3:8b@", 400, "invalid model name"),
        ("@n1", 400, "invalid model name"),
        ("llama3:8b@n1@n2", 400, "invalid model name"),
        ("llama3:8b@http://u:p@n1", 400, "invalid model name"),
        ("llama3:8b@http://n1/path", 400, "invalid model name"),
        ("llama3:8b@sha256:0123abcd", 400, "invalid model name"),
        ("llama3:8b@n1:0", 400, "invalid model name"),
        ("a b", 400, "invalid model name"),
        ("a/b/c/d", 400, "invalid model name"),
        ("x:8b-cloud:local", 400, "invalid model name"),
        ("llama3", 404, "model 'llama3' not found"),
        ("llama3:70b", 404, "model 'llama3:70b' not found"),
        ("Nope", 404, "model 'Nope' not found"),
        ("nope@n1", 404, r"model 'nope' not found on http://127\.0\.0\.1:\d+"),
        ("only2@n1", 404, r"model 'only2' not found on http://127\.0\.0\.1:\d+"),
        ("llama3:8b@n3", 503, r"cannot connect to Ollama server at http://127\.0\.0\.1:\d+"),
        ("only3", 503, "no node is up for model 'only3': n3"),
        ("alias-down", 503, "no node is up for model 'only3': n3"),
    ],
)
async def test_a_request_without_a_node_is_told_why(
    path: str, name: str, status: int, told: str
) -> None:
    specs = spec(), spec(model(), model("only2")), spec(model(), model("only3"))
    async with rig(*specs, aliases={"alias-down": "only3"}) as r:
        if status == 400 and told.startswith("no such"):
            told += r", n3 \(http://127\.0\.0\.1:\d+\)"
        await r.nodes[2].stop()
        await r.look()
        answered, headers, body = await ask(r, name, path)
        assert answered == status
        assert re.fullmatch(told, text(body)), text(body)
        assert "X-Ollamux-Node" not in headers
        assert "X-Ollamux-Attempts" not in headers, "nobody was asked"
        assert headers["X-Ollamux-Reason"] in [line["reason"] for line in r.requests]
        assert not any(map(got, r.nodes))


@pytest.mark.parametrize(
    ("path", "status", "told"),
    [
        ("/api/generate", 404, "model 'Nope' not found"),
        ("/api/embed", 404, 'model "Nope" not found, try pulling it first'),
        ("/api/embeddings", 404, 'model "Nope" not found, try pulling it first'),
        ("/api/show", 404, "model 'Nope:latest' not found"),
        ("/v1/completions", 404, "model 'Nope' not found"),
        ("/v1/responses", 404, "model 'Nope' not found"),
    ],
)
async def test_a_model_that_nobody_has_is_told_in_ollamas_words(
    path: str, status: int, told: str
) -> None:
    async with rig() as r:
        answered, _, body = await ask(r, "Nope", path)
        assert (answered, text(body)) == (status, told)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/api/chat", {"error": "model 'x' not found"}),
        (
            "/v1/chat/completions",
            {"error": {"message": "model 'x' not found", "type": "not_found_error",
                       "param": None, "code": None}},
        ),
        (
            "/v1/messages",
            {"type": "error", "error": {"type": "not_found_error",
                                        "message": "model 'x' not found"}},
        ),
    ],
)  # fmt: skip
async def test_an_error_has_the_shape_of_its_dialect(path: str, error: Mapping[str, Any]) -> None:
    async with rig() as r:
        _, headers, body = await ask(r, "x", path)
        found = json.loads(body)
        if path == "/v1/messages":
            assert re.fullmatch("req_[0-9a-f]{24}", found.pop("request_id"))
        assert found == error
        charset = "; charset=utf-8" if path == "/api/chat" else ""
        assert headers["Content-Type"] == "application/json" + charset


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ("chat", "llama3:8b"),
        ("CHAT:latest", "llama3:8b"),
        ("ollama/chat", "llama3:8b"),
        ("code", "codellama:34b"),
        ("code@n1", "codellama:34b"),
        ("ollama/llama3:8b", "llama3:8b"),
        ("Ollama/LLAMA3:8B", "LLAMA3:8B"),
        ("ollama/own", "ollama/own"),
        ("ollama/hf.co/org/m:q4", "hf.co/org/m:q4"),
        ("HF.co/Org/M:Q4", "HF.co/Org/M:Q4"),
        ("llama3:8b:local", "llama3:8b:local"),
        ("llama3:8b:local@n1", "llama3:8b:local"),
    ],
)
async def test_a_name_is_read_as_ollama_reads_it(asked: str, sent: str) -> None:
    models = [model(name) for name in (MODEL, "codellama:34b", "ollama/own", "hf.co/org/m:q4")]
    async with rig(spec(*models), aliases={"chat": MODEL, "code": "codellama:34b@n1"}) as r:
        status, headers, body = await ask(r, asked)
        assert status == 200, body
        assert headers["X-Ollamux-Model"] == sent
        assert json.loads(got(r.nodes[0])[0])["model"] == sent
        assert json.loads(body)["model"] == sent


async def test_the_exact_name_with_a_prefix_wins_even_if_its_node_is_down() -> None:
    async with rig(spec(), spec(model("ollama/llama3:8b"))) as r:
        await r.nodes[1].stop()
        await r.look()
        status, _, body = await ask(r, "ollama/llama3:8b")
        assert (status, text(body)) == (
            503,
            "no node is up for model 'ollama/llama3:8b': n2",
        )


@pytest.mark.parametrize("name", ["gpt-oss:120b-cloud", "gpt-oss:cloud", "llama3:8b:cloud"])
async def test_a_cloud_model_goes_to_any_node_that_is_up(name: str) -> None:
    async with rig() as r:
        await ask(r, name)
        (body,) = got(r.nodes[0])
        assert json.loads(body)["model"] == name


async def test_models_that_a_node_may_not_be_used_for_are_not_there() -> None:
    entries = [{"models": ["llama3*", "!*:70b"]}, {}]
    many = spec(model(), model("llama3:70b"), model("phi"))
    async with rig(many, many, entries=entries, routing=LEAST) as r:
        for name, nodes in ((MODEL, {"n1", "n2"}), ("llama3:70b", {"n2"}), ("phi", {"n2"})):
            found = {(await ask(r, name))[1]["X-Ollamux-Node"] for _ in range(4)}
            assert found == nodes
        status, _, body = await ask(r, "phi@n1")
        assert (status, text(body)) == (404, f"model 'phi' not found on {r.nodes[0].url}")


async def test_a_pin_that_fits_two_nodes_is_refused() -> None:
    async with rig() as r:
        url = r.nodes[0].url
        nodes = [{"name": "a", "url": f"{url}/a"}, {"name": "b", "url": f"{url}/b"}]
        r.app.reconfigure(parsed({**r.settings, "nodes": nodes}))
        status, _, body = await ask(r, f"{MODEL}@127.0.0.1:{r.nodes[0].port}")
        told = "several nodes have that address, pin one by its name: a, b"
        assert (status, text(body)) == (400, told)


# Bodies that cannot be read


UNREADABLE = [b"", b"{", b"nothing", b"[1]", b"\xef\xbb\xbf{}", b"\x1f\x8b\x08gzip", b'{"model":7}',
              b'{"model":""}', b'{"messages":[]}', b'{"model":null}', b'{"model":{"a":1}}',
              b'{"a":' + b"[" * 20_000]  # fmt: skip


@pytest.mark.parametrize("path", FAMILIES)
@pytest.mark.parametrize("body", UNREADABLE, ids=lambda body: repr(body[:12]))
async def test_a_body_without_a_readable_model_is_for_a_node_to_judge(
    path: str, body: bytes
) -> None:
    async with rig() as r:
        status, headers, told = await post(r, path, body)
        assert got(r.nodes[0]) == [body]
        async with r.session.post(r.nodes[0].url + path, data=body) as direct:
            assert direct.status == status
            assert 400 <= status < 500
            expected = await direct.read()
        identity = re.compile(rb"req_[0-9a-f]+")
        assert identity.sub(b"", told) == identity.sub(b"", expected)
        assert "X-Ollamux-Model" not in headers


@pytest.mark.parametrize("path", FAMILIES)
@pytest.mark.parametrize("body", UNREADABLE, ids=lambda body: repr(body[:12]))
async def test_without_a_node_such_a_body_is_a_400(path: str, body: bytes) -> None:
    async with rig() as r:
        await r.nodes[0].stop()
        await r.look()
        status, _, told = await post(r, path, body)
        assert status == 400
        assert text(told)


# Attempts


async def test_a_node_that_refuses_connections_is_passed_over_and_marked_down() -> None:
    async with rig(spec(), spec(), spec()) as r:
        await r.nodes[0].stop()
        await r.nodes[1].stop()
        status, headers, _ = await ask(r, MODEL)
        assert status == 200
        assert headers["X-Ollamux-Node"] == "n3"
        assert headers["X-Ollamux-Attempts"] == "3"
        assert [node.up for node in r.app.pool.registry.snapshot()] == [False, False, True]
        status, headers, _ = await ask(r, MODEL)
        assert (headers["X-Ollamux-Attempts"], headers["X-Ollamux-Reason"]) == ("1", "warm")
        flips = [(line["event"], line["node"]) for line in r.lines if line["event"] != "request"]
        assert flips[3:] == [("node down", "n1"), ("node down", "n2")], "once each"
        assert 'ollamux_retries_total{endpoint="/api/chat"} 2.0' in await r.metrics()


@pytest.mark.parametrize("path", FAMILIES)
async def test_all_nodes_refusing_is_a_503_that_names_them(path: str) -> None:
    async with rig(spec(), spec()) as r:
        for node in r.nodes:
            await node.stop()
        status, headers, body = await ask(r, MODEL, path)
        assert status == 503
        assert text(body) == f"no node is up for model '{MODEL}': n1, n2"
        assert headers["X-Ollamux-Attempts"] == "2"
        assert r.app.pool.in_flight == 0
        await r.until(lambda: r.requests != [])
        assert (r.requests[0]["attempts"], r.requests[0]["outcome"]) == (2, "rejected")


async def test_a_pinned_node_that_refuses_is_not_replaced() -> None:
    async with rig(spec(), spec()) as r:
        await r.nodes[0].stop()
        status, headers, body = await ask(r, f"{MODEL}@n1")
        told = f"cannot connect to Ollama server at {r.nodes[0].url}"
        assert (status, text(body)) == (503, told)
        assert headers["X-Ollamux-Attempts"] == "1"
        assert not got(r.nodes[1])


async def test_connections_that_cannot_be_made_are_all_named() -> None:
    """Neither is down for it: what went wrong may be on our side."""
    entries = [{"url": "http://n1.invalid:1"}, {"url": "http://n2.invalid:1"}]
    async with rig(spec(), spec(), entries=entries) as r:
        for node in r.app.pool.registry.specs():
            r.app.pool.observe(node.url, GOOD, 0.0)
            r.app.pool.observe(node.url, GOOD, 0.0)
        status, headers, body = await ask(r, MODEL)
        assert status == 503
        assert text(body) == f"cannot connect to any node that has model '{MODEL}': n1, n2"
        assert headers["X-Ollamux-Attempts"] == "2"
        assert r.app.pool.in_flight == 0


async def test_a_connection_that_was_kept_and_went_stale_is_made_anew() -> None:
    """The node takes the second request of a connection and hangs up without a word."""
    asked: list[bytes] = []

    async def script(peer: Peer) -> None:
        asked.append(peer.body)
        if len(asked) == 2:
            peer.close()
            return
        await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    async with scripted(script) as url, rig(entries=[{"url": url}]) as r:
        for _ in range(2):
            status, headers, _ = await ask(r, MODEL)
            assert (status, headers["X-Ollamux-Attempts"]) == (200, "1")
        assert len(asked) == 3


async def test_a_node_that_hangs_up_twice_is_not_asked_a_third_time() -> None:
    asked: list[bytes] = []

    async def script(peer: Peer) -> None:
        asked.append(peer.body)
        if len(asked) > 1:
            peer.close()
            return
        await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    async with scripted(script) as url, rig(spec(), entries=[{"url": url}]) as r:
        await ask(r, MODEL)
        status, _, body = await ask(r, MODEL)
        assert status == 502
        assert (
            text(body) == "node n1: connection reset before the response"
            or text(body) == "node n1: connection closed before the response"
        )
        assert len(asked) == 3


async def test_no_first_byte_in_time_is_a_504() -> None:
    async with rig(timeouts={"first_byte_s": 0.02}) as r:
        r.nodes[0].fault = Fault(FaultKind.HANG)
        status, _, body = await ask(r, MODEL)
        assert (status, text(body)) == (504, "node n1: no first byte within 0.02 s")
        await r.nodes[0].until(lambda: r.nodes[0].in_flight == 0)
        assert r.nodes[0].seen[-1].outcome == "cancelled"
        assert r.app.pool.in_flight == 0


# Clients that leave


async def _leave(r: Rig, body: Mapping[str, Any], when: str) -> None:
    """Start a request, leave it when the node has come so far; the node and the pool see it."""
    node = r.nodes[0]
    async with talk(r.url) as client:
        await client.post("/api/chat", json.dumps(body).encode())
        await node.until(lambda: len(node.calls("/api/chat")) > 0)
        seen = node.calls("/api/chat")[-1]
        if when == "mid-stream":
            await client.head()
            assert await client.chunk()
        else:
            await node.until(lambda: seen.body != b"")
        assert r.app.pool.in_flight >= 1
        client.leave()
        await node.until(lambda: seen.outcome is not None)
        assert seen.outcome == "cancelled"


@pytest.mark.parametrize(
    ("when", "settings", "fault", "stream"),
    [
        ("before headers", {}, Fault(FaultKind.HANG), True),
        ("before headers", {}, Fault(FaultKind.HANG), False),
        ("during the load", {"load_s": 1e6}, None, True),
        ("during the load", {"load_s": 1e6}, None, False),
        ("before the first token", {"prefill_tps": 1e-6}, None, True),
        ("mid-stream", {}, Fault(FaultKind.STALL, after=3), True),
        ("mid-answer", {"decode_tps": 1e-6}, None, False),
    ],
)
async def test_a_client_that_leaves_cancels_upstream_at_once(
    when: str, settings: Mapping[str, Any], fault: Fault | None, *, stream: bool
) -> None:
    async with rig(spec(model(**settings))) as r:
        r.nodes[0].fault = fault
        await _leave(r, {"model": MODEL, **HELLO, "stream": stream}, when)
        await r.until(lambda: r.app.pool.in_flight == 0)
        await r.until(lambda: r.requests != [])
        (line,) = r.requests
        assert (line["outcome"], line["node"]) == ("cancelled", "n1")
        assert r.nodes[0].scheduler.in_flight == 0


async def test_a_client_that_leaves_the_queue_of_a_node_frees_its_place() -> None:
    async with rig(spec(model(decode_tps=1e-6)), routing=LEAST) as r:
        node = r.nodes[0]
        body = json.dumps({"model": MODEL, **HELLO}).encode()
        async with talk(r.url) as running, talk(r.url) as queued:
            await running.post("/api/chat", body)
            await node.until(lambda: node.scheduler.in_flight == 1)
            await queued.post("/api/chat", body)
            await node.until(lambda: node.scheduler.in_flight == 2)
            assert r.app.pool.in_flight == 2
            queued.leave()
            await node.until(lambda: node.scheduler.in_flight == 1)
            await r.until(lambda: r.app.pool.in_flight == 1)
            assert [seen.outcome for seen in node.calls("/api/chat")] == [None, "cancelled"]
        await r.until(lambda: r.app.pool.in_flight == 0)


async def test_many_clients_that_leave_at_once_leave_nothing_behind() -> None:
    before = asyncio.all_tasks()
    nodes = [spec(num_parallel=30, warm=(MODEL,)) for _ in range(2)]
    async with rig(*nodes) as r:
        for node in r.nodes:
            node.fault = Fault(FaultKind.STALL, after=2)
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(talk(r.url)) for _ in range(60)]
            body = json.dumps({"model": MODEL, **HELLO}).encode()
            for client in clients:
                await client.post("/api/chat", body)
            await r.until(lambda: r.app.pool.in_flight == 60)
            for client in clients:
                client.leave()
        await r.until(lambda: r.app.pool.in_flight == 0)
        for node in r.nodes:
            await node.until(lambda node=node: node.in_flight == 0)  # type: ignore[misc]
            assert {seen.outcome for seen in node.calls("/api/chat")} == {"cancelled"}
        await r.until(lambda: len(r.requests) == 60)
    assert asyncio.all_tasks() == before


# Choice


def in_flight(r: Rig) -> list[int]:
    return [node.in_flight for node in r.app.pool.registry.snapshot()]


async def release(r: Rig, tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Let go of what the nodes hold until all is done: some of it is still on its way there."""
    while not all(task.done() for task in tasks):
        for node in r.nodes:
            node.release()
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def held(r: Rig, count: int) -> Any:
    """So many requests that every node keeps to itself."""
    for node in r.nodes:
        node.fault = Fault(FaultKind.HANG)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(r, MODEL)) for _ in range(count)]
        await r.until(lambda: r.app.pool.in_flight == count)
        yield
        await release(r, tasks)
    assert {task.result()[0] for task in tasks} == {200}


@pytest.mark.parametrize(
    ("entries", "count", "expected"),
    [
        ([{"slots": 1}, {"slots": 1}, {"slots": 1}], 12, [4, 4, 4]),
        ([{"slots": 4}, {"slots": 1}], 20, [16, 4]),
        ([{"slots": 2, "weight": 2}, {"slots": 4}, {"slots": 2}], 20, [8, 8, 4]),
        ([{"weight": 0.5}, {"weight": 1.5}], 16, [4, 12]),
    ],
)
async def test_load_is_shared_by_slots_and_weight(
    entries: Sequence[Mapping[str, Any]], count: int, expected: list[int]
) -> None:
    nodes = [spec() for _ in entries]
    async with rig(*nodes, entries=entries, routing=LEAST) as r, held(r, count):
        assert in_flight(r) == expected


async def test_ties_rotate() -> None:
    async with rig(spec(), spec(), spec(), routing=LEAST) as r:
        nodes = [(await ask(r, MODEL))[1]["X-Ollamux-Node"] for _ in range(9)]
        assert nodes == ["n1", "n2", "n3"] * 3


async def test_pools_are_tried_in_order() -> None:
    async with rig(spec(), spec(model(), model("big")), routing=LEAST) as r:
        entries = [{"name": f"n{n + 1}", "url": node.url} for n, node in enumerate(r.nodes)]
        pools = [{"name": f"p{n + 1}", "nodes": [entry]} for n, entry in enumerate(entries)]
        settings = {key: value for key, value in r.settings.items() if key != "nodes"}
        r.app.reconfigure(parsed({**settings, "pools": pools}))
        for _ in range(3):
            _, headers, _ = await ask(r, MODEL)
            assert (headers["X-Ollamux-Node"], headers["X-Ollamux-Reason"]) == ("n1", "only-node")
        _, headers, _ = await ask(r, "big")
        assert (headers["X-Ollamux-Node"], headers["X-Ollamux-Reason"]) == ("n2", "later-pool")
        await r.nodes[0].stop()
        _, headers, _ = await ask(r, MODEL)
        assert headers["X-Ollamux-Attempts"] == "2", "a connection that failed is a reason as well"
        assert (headers["X-Ollamux-Node"], headers["X-Ollamux-Reason"]) == ("n2", "later-pool")


def prompt(number: int) -> bytes:
    messages = [{"role": "user", "content": f"question {number}"}]
    return json.dumps({"model": MODEL, "messages": messages}).encode()


_VARYING = re.compile(rb'"(created_at":"[^"]*"|[a-z_]+_duration":[0-9]+)')


async def test_a_burst_is_spread_evenly_and_every_byte_is_the_nodes() -> None:
    async with rig(*(spec(num_parallel=64) for _ in range(4)), routing=LEAST) as r:
        spread: Counter[int] = Counter()

        async def watch() -> None:
            while r.app.pool.in_flight < 200:
                spread[max(in_flight(r)) - min(in_flight(r))] += 1
                await asyncio.sleep(0)

        for node in r.nodes:
            node.fault = Fault(FaultKind.STALL, after=4)
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(watch())
            posts = [group.create_task(post(r, "/api/chat", prompt(n))) for n in range(200)]
            await watching
            assert in_flight(r) == [50, 50, 50, 50]
            assert max(spread) <= 1
            await r.until(lambda: sum(len(n.calls("/api/chat")) for n in r.nodes) == 200)
            await r.until(lambda: all(
                seen.records == 4 for n in r.nodes for seen in n.calls("/api/chat")
            ))  # fmt: skip
            for node in r.nodes:
                node.fault = None
            await release(r, posts)
        assert r.app.pool.in_flight == 0
        for number, done in enumerate(posts):
            status, headers, body = done.result()
            assert (status, headers["X-Ollamux-Attempts"]) == (200, "1")
            async with r.session.post(f"{r.nodes[0].url}/api/chat", data=prompt(number)) as direct:
                expected = await direct.read()
            assert _VARYING.sub(b"", body) == _VARYING.sub(b"", expected)
            assert body.endswith(b"}\n")
