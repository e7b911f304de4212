"""Pins by path, marks and versions of nodes, aliases in the lists, and digests that differ."""

import json
from datetime import UTC, datetime
from typing import Any

import ollama
import pytest

from tests.rig import LEAST, MODEL, Rig, model, parsed, rig, scripted, spec, talk


async def ask(r: Rig, method: str, path: str, **body: Any) -> tuple[int, str, Any]:
    """(status, node, body) of an answer; the body parsed where it is JSON."""
    json_body = body or None
    async with r.session.request(method, r.url + path, json=json_body) as answer:
        text = await answer.read()
        node = answer.headers.get("X-Ollamux-Node", "")
        is_json = answer.content_type == "application/json" and text
        return answer.status, node, json.loads(text) if is_json else text


async def tags(r: Rig, pin: str = "") -> dict[str, Any]:
    _, _, body = await ask(r, "GET", f"{pin}/api/tags")
    return {entry["name"]: entry for entry in body["models"]}


async def down(r: Rig, *numbers: int) -> None:
    """Stop these nodes, and let the router know."""
    for number in numbers:
        await r.nodes[number].stop()
    for _ in range(3):
        await r.look()


HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "stream": False}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/api/chat", HELLO),
        ("POST", "/api/chat?x=1", HELLO),
        ("POST", "/api/show", {}),
        ("POST", "/v1/chat/completions", HELLO),
        ("POST", "/v1/messages", {**HELLO, "max_tokens": 5}),
    ],
)
@pytest.mark.parametrize(
    "pin", ["/@n2", "/@N2", "/%40n2", "/@127.0.0.1:{port}", "/@http:%2F%2Fhost"]
)
async def test_a_path_pins_every_request_under_it(
    pin: str, method: str, path: str, body: dict[str, Any]
) -> None:
    async with rig(spec(), spec()) as r:
        port = r.nodes[1].url.rpartition(":")[2]
        status, node, _ = await ask(r, method, pin.format(port=port) + path, model=MODEL, **body)
        if "host" in pin:
            assert status == 404, "a slash in a pin is a slash of the path"
        else:
            assert (status, node) == (200, "n2")
            assert not r.nodes[0].calls(path.partition("?")[0])


async def test_the_lists_under_a_pin_are_those_of_the_node() -> None:
    second = spec(model("phi"), version="0.32.0", warm=("phi",))
    async with rig(spec(), second) as r:
        assert list(await tags(r, "/@n2")) == ["phi:latest"]
        assert set(await tags(r)) == {MODEL, "phi:latest"}
        for path, expected in (
            ("/api/version", {"version": "0.32.0"}),
            ("/v1/models/phi", {"id": "phi"}),
        ):
            status, _, body = await ask(r, "GET", f"/@n2{path}")
            assert status == 200
            assert body | expected == body
        _, _, listed = await ask(r, "GET", "/@n2/v1/models")
        assert [entry["id"] for entry in listed["data"]] == ["phi:latest"]
        _, _, resident = await ask(r, "GET", "/@n1/api/ps")
        assert resident == {"models": []}
        status, _, _ = await ask(r, "GET", f"/@n2/v1/models/{MODEL}")
        assert status == 404


async def test_a_pool_is_pinned_by_its_name() -> None:
    async with rig(spec(), spec(), spec(), routing=LEAST) as r:
        urls = [node.url for node in r.nodes]
        pools = [{"name": "front", "nodes": urls[:1]}, {"name": "back", "nodes": urls[1:]}]
        settings = {key: value for key, value in r.settings.items() if key != "nodes"}
        r.app.reconfigure(parsed({**settings, "pools": pools}))
        nodes = set()
        for _ in range(2):
            status, node, _ = await ask(r, "POST", "/@back/api/chat", model=MODEL, **HELLO)
            assert status == 200
            nodes.add(f"http://{node}")
        assert nodes == set(urls[1:])


async def test_a_client_may_have_the_pin_in_its_address() -> None:
    async with rig(spec(), spec(model("phi"))) as r, ollama.AsyncClient(f"{r.url}/@n2") as client:
        assert [entry.model for entry in (await client.list()).models] == ["phi:latest"]
        answer = await client.generate("phi", "hi")
        assert answer.done
        with pytest.raises(ollama.ResponseError) as caught:
            await client.generate(MODEL, "hi")
        assert caught.value.status_code == 404


@pytest.mark.parametrize("path", ["", "/"])
async def test_the_root_under_a_pin_is_a_root(path: str) -> None:
    async with rig() as r, r.session.head(f"{r.url}/@n1{path}") as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize(
    ("path", "status", "location"),
    [
        ("/@n1/api/tags/", 301, "/@n1/api/tags"),
        ("/@[::1]:5//api/tags", 307, "/@%5B%3A%3A1%5D%3A5/api/tags"),
        ("/@n1/nope", 404, None),
        ("/@n1/@n1/api/tags", 404, None),
        ("/@n1/api/chat", 405, None),
    ],
)
async def test_what_is_no_endpoint_is_none_under_a_pin(
    path: str, status: int, location: str | None
) -> None:
    async with rig() as r, talk(r.url) as client:
        await client.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        answer = await client.answer()
        assert (answer.status, answer.header("Location")) == (status, location)


@pytest.mark.parametrize(
    ("method", "path", "native"),
    [
        ("POST", "/@n9/api/chat", True),
        ("GET", "/@n9/api/tags", True),
        ("GET", "/@n9/", True),
        ("GET", "/@/api/tags", True),
        ("POST", "/@n9/v1/chat/completions", False),
        ("GET", "/@n9/v1/models", False),
        ("POST", "/@n9/v1/messages", False),
    ],
)
async def test_an_unknown_pin_is_refused_in_the_words_of_what_follows(
    method: str, path: str, native: bool
) -> None:
    async with rig() as r:
        status, _, body = await ask(r, method, path, model=MODEL)
        assert status == 400
        text = body["error"] if native else body["error"]["message"]
        assert text == f"no such node; the nodes are: n1 ({r.nodes[0].url})"
        (line,) = r.requests
        assert (line["reason"], line["outcome"]) == ("unknown-pin", "client_error")


async def test_the_endpoint_is_counted_without_its_pin() -> None:
    async with rig() as r:
        await ask(r, "POST", "/@n1/api/chat", model=MODEL, **HELLO)
        await r.until(lambda: len(r.requests) == 1)
        (line,) = r.requests
        assert (line["endpoint"], line["reason"]) == ("/api/chat", "pinned")
        assert 'endpoint="/api/chat"' in await r.metrics()


async def test_a_pin_by_name_inside_a_pin_by_path_must_agree() -> None:
    async with rig(spec(), spec()) as r:
        status, node, _ = await ask(r, "POST", "/@default/api/chat", model=f"{MODEL}@n2", **HELLO)
        assert (status, node) == (200, "n2")
        status, _, body = await ask(r, "POST", "/@n1/api/chat", model=f"{MODEL}@n2", **HELLO)
        assert (status, body["error"]) == (
            400,
            "the path leaves out the node that the model's name pins: n2",
        )


async def test_a_pinned_node_that_is_down_is_told_as_such() -> None:
    async with rig(spec(), spec()) as r:
        await down(r, 1)
        status, _, body = await ask(r, "POST", "/@n2/api/chat", model=MODEL, **HELLO)
        assert status == 503
        assert body["error"] == f"cannot connect to Ollama server at {r.nodes[1].url}"


# Placement


async def test_a_model_is_neither_asked_for_nor_listed_where_it_may_not_live() -> None:
    place = [{"models": [MODEL], "nodes": ["n2"]}]
    async with rig(spec(), spec(), placement=place) as r:
        for _ in range(3):
            status, node, _ = await ask(r, "POST", "/api/chat", model=MODEL, **HELLO)
            assert (status, node) == (200, "n2")
        assert list(await tags(r)) == [MODEL]
        assert await tags(r, "/@n1") == {}
        status, _, _ = await ask(r, "POST", "/@n1/api/chat", model=MODEL, **HELLO)
        assert status == 404


# Aliases


async def test_an_alias_is_listed_as_the_model_that_it_stands_for_now() -> None:
    aliases = {"chat": ["big", "phi"], "gone": "nowhere", "llama3:8b": "phi"}
    async with rig(spec(), spec(model("phi")), aliases=aliases) as r:
        listed = await tags(r)
        assert set(listed) == {"chat:latest", "phi:latest", MODEL}
        entry = listed["chat:latest"]
        assert entry.pop("ollamux_alias_of") == "phi:latest"
        assert entry == {**listed["phi:latest"], "name": "chat:latest", "model": "chat:latest"}
        assert listed[MODEL]["ollamux_alias_of"] == "phi:latest", "it hides the real one"
        assert "ollamux_alias_of" not in listed["phi:latest"]
        _, _, models = await ask(r, "GET", "/v1/models")
        assert {entry["id"] for entry in models["data"]} == set(listed)
        async with r.session.post(f"{r.url}/api/chat", json={"model": "chat", **HELLO}) as answer:
            assert answer.headers["X-Ollamux-Model"] == "phi"
            assert json.loads(await answer.read())["model"] == "phi"
        await down(r, 1)
        assert await tags(r) == {}, "what an alias hides stays hidden"
        status, _, body = await ask(r, "POST", "/api/chat", model="chat", **HELLO)
        assert (status, body["error"]) == (404, "model 'big' not found")


# Marks


async def test_the_primary_node_is_asked_for_what_is_its_own() -> None:
    async with rig(spec(user="first"), spec(user="second"), entries=[{}, {"primary": True}]) as r:
        status, node, body = await ask(r, "POST", "/api/me")
        assert (status, node, body["name"]) == (200, "n2", "second")
        _, node, body = await ask(r, "POST", "/@n1/api/me")
        assert (node, body["name"]) == ("n1", "first")
        status, node, _ = await ask(r, "POST", "/api/push", model=MODEL, stream=False)
        assert (status, node) == (200, "n2")
        status, node, _ = await ask(r, "POST", "/api/push", model=f"{MODEL}@n1", stream=False)
        assert (status, node) == (200, "n1")
        status, node, _ = await ask(r, "POST", "/api/signout")
        assert (status, node) == (200, "n2")
        status, node, _ = await ask(r, "POST", "/api/me")
        assert (status, node) == (401, "n2")


async def test_without_a_primary_node_nobody_is_asked_unless_there_is_only_one() -> None:
    async with rig(spec(), spec()) as r:
        status, _, body = await ask(r, "POST", "/api/me")
        assert status == 400
        assert body["error"] == "no node is marked primary: set it on one of n1, n2"
    async with rig() as r:
        assert (await ask(r, "POST", "/api/me"))[:2] == (200, "n1")
        await down(r, 0)
        assert (await ask(r, "POST", "/api/me"))[0] == 503


async def test_a_key_is_forwarded_as_it_was_asked_for() -> None:
    heads: list[bytes] = []
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull"

    async def script(peer: Any) -> None:
        heads.append(peer.head.partition(b"\r\n")[0])
        await peer.say(answer)

    async with scripted(script) as url, rig(entries=[{"url": url}]) as r:
        async with r.session.delete(f"{r.url}/api/user/keys/AAAA%2BB%20c?x=%2B") as got:
            assert (got.status, await got.read()) == (200, b"null")
        (line,) = [line for line in heads if line.startswith(b"DELETE")]
        assert line == b"DELETE /api/user/keys/AAAA%2BB%20c?x=%2B HTTP/1.1"


async def test_the_cloud_is_asked_through_the_nodes_that_are_marked_for_it() -> None:
    async with rig(spec(), spec(), entries=[{}, {"cloud": True}]) as r:
        for path, body in (
            ("/api/chat", {"model": "gpt-oss:20b-cloud", **HELLO}),
            ("/api/experimental/web_search", {"query": "x"}),
            ("/api/experimental/web_fetch", {"url": "http://x"}),
        ):
            for _ in range(2):
                status, node, _ = await ask(r, "POST", path, **body)
                assert (status, node) == (200, "n2"), path
        status, _, told = await ask(r, "POST", "/@n1/api/experimental/web_search", query="x")
        assert (status, told["error"]) == (
            400,
            "no node may be asked for the cloud: it is not set on n1",
        )


STATUS = {"cloud": {"disabled": False, "source": "none"}}


async def test_status_and_recommendations_are_answered_with_every_node_down() -> None:
    path = "/api/experimental/model-recommendations"
    async with rig(spec(cloud_disabled=True)) as r:
        status, node, body = await ask(r, "GET", "/api/status")
        assert (status, node, body["cloud"]["disabled"]) == (200, "n1", True)
        status, node, body = await ask(r, "GET", path)
        assert (status, node) == (200, "n1")
        assert body["recommendations"]
        await down(r, 0)
        assert await ask(r, "GET", "/api/status") == (200, "", STATUS)
        assert await ask(r, "GET", path) == (200, "", {"recommendations": []})
        await r.until(lambda: len(r.requests) == 4)
        assert {line["outcome"] for line in r.requests} == {"ok"}
        assert (await ask(r, "GET", "/@n1/api/status"))[0] == 503, "a pin means that node"


@pytest.mark.parametrize("path", ["/api/tags", "/api/ps", "/v1/models"])
async def test_the_lists_of_a_pinned_node_that_is_down_are_no_empty_lists(path: str) -> None:
    async with rig(spec(), spec()) as r:
        await down(r, 1)
        status, _, told = await ask(r, "GET", f"/@n2{path}")
        assert status == 503
        assert f"cannot connect to Ollama server at {r.nodes[1].url}" in json.dumps(told)
        assert (await ask(r, "GET", path))[0] == 200
        await down(r, 0)
        assert (await ask(r, "GET", f"/@default{path}"))[0] == 503


# Versions


async def test_a_node_that_is_too_old_is_not_asked() -> None:
    body: dict[str, Any] = {"model": MODEL, **HELLO, "max_tokens": 5}
    async with rig(spec(version="0.13.5"), spec(version="0.14.0")) as r:
        for _ in range(3):
            status, node, _ = await ask(r, "POST", "/v1/messages", **body)
            assert (status, node) == (200, "n2")
        status, _, told = await ask(r, "POST", "/@n1/v1/messages", **body)
        assert status == 501
        text = "/v1/messages needs Ollama 0.14.0: n1 has 0.13.5"
        assert told["error"] == {"type": "api_error", "message": text}
        status, node, _ = await ask(r, "POST", "/@n1/api/chat", **body)
        assert (status, node) == (200, "n1")


# Digests


def differing(**settings: Any) -> Any:
    """Two nodes with an older digest of the model, and one with a newer."""
    old = model(digest="a" * 64, modified_at=datetime(2026, 1, 1, tzinfo=UTC))
    new = model(digest="b" * 64, modified_at=datetime(2026, 1, 2, tzinfo=UTC))
    return rig(spec(old), spec(old), spec(new), **settings)


async def test_a_digest_conflict_is_logged_once_and_shown_while_it_lasts() -> None:
    async with differing() as r:
        expected = {"a" * 64: ["n1", "n2"], "b" * 64: ["n3"]}
        await r.look()
        async with r.session.get(f"{r.admin}/status") as answer:
            conflicts = json.loads(await answer.read())["digest_conflicts"]
        assert conflicts == [{"model": MODEL, "digests": expected}]
        gauge = f'ollamux_model_digest_conflict{{model="{MODEL}"}} 1.0'
        assert gauge in await r.metrics()
        told = [line for line in r.lines if line["event"] == "model digest conflict"]
        assert [(line["level"], line["model"]) for line in told] == [("warning", MODEL)]
        await down(r, 2)
        assert gauge not in await r.metrics()


@pytest.mark.parametrize(
    ("rule", "nodes", "shown"),
    [
        ("any", {"n1", "n2", "n3"}, "b"),
        ("majority", {"n1", "n2"}, "a"),
        ("newest", {"n3"}, "b"),
    ],
)
async def test_a_digest_rule_says_who_is_asked_and_what_is_listed(
    rule: str, nodes: set[str], shown: str
) -> None:
    async with differing(routing={**LEAST, "digest": rule}) as r:
        asked = set()
        for _ in range(3):
            _, node, _ = await ask(r, "POST", "/api/chat", model=MODEL, **HELLO)
            asked.add(node)
        assert asked == nodes
        assert (await tags(r))[MODEL]["digest"] == shown * 64
