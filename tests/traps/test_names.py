"""The contract's traps 19, 22 to 27 and 44: model names, pins, and what stands in an answer."""

import json
from datetime import UTC, datetime

import pytest
from yarl import URL

from tests.rig import LEAST, MODEL, Peer, model, rig, scripted, spec
from tests.traps.asking import ASKING, GENERATING, answer, ask, bodies, posts, send

SINGLE = tuple(path for path in ASKING if path != "/api/embeddings")
OLD, NEW = "a" * 64, "b" * 64


async def test_trap_19_digests_that_differ_are_told_of() -> None:
    async with rig(spec(model(digest=OLD)), spec(model(digest=NEW))) as r:
        status = (await send(r, f"{r.admin}/status", method="GET")).value
        assert OLD in json.dumps(status)
        assert NEW in json.dumps(status)
        assert any("digest" in line["event"] for line in r.lines)


@pytest.mark.parametrize("digest", ["newest", "majority"])
async def test_trap_19_where_digests_differ_all_requests_may_go_to_one(digest: str) -> None:
    newer = model(digest=NEW, modified_at=datetime(2026, 2, 1, tzinfo=UTC))
    specs = spec(model(digest=OLD)), spec(newer), spec(newer)
    async with rig(*specs, routing={**LEAST, "digest": digest}) as r:
        for _ in range(4):
            await ask(r, "/api/generate")
        assert [len(bodies(node)) for node in r.nodes] == [0, 2, 2]
        # A pin is obeyed: tokens of a context are continued where they were made.
        assert (await ask(r, "/api/generate", f"{MODEL}@n1", context=[1, 2])).node == "n1"


@pytest.mark.parametrize("name", ["LLAMA3:8B", "Llama3:8b", "Library/LLama3:8b"])
@pytest.mark.parametrize("path", SINGLE)
async def test_trap_22_case_does_not_matter_and_stays_as_written(path: str, name: str) -> None:
    async with rig() as r:
        told = await ask(r, path, name)
        assert (told.status, told.node) == (200, "n1")
        assert json.loads(bodies(r.nodes[0])[-1])["model"] == name


@pytest.mark.parametrize(("name", "status"), [("llama3:8b", 200), ("LLAMA3:8b", 404)])
@pytest.mark.parametrize("pin", ["", "@n1"])
async def test_trap_22_the_old_embeddings_keep_their_own_rule(
    name: str, pin: str, status: int
) -> None:
    async with rig() as r:
        told = await ask(r, "/api/embeddings", name + pin)
        assert (told.status, told.node) == (status, "n1")
        assert json.loads(bodies(r.nodes[0])[0])["model"] == name


@pytest.mark.parametrize("path", ASKING)
async def test_trap_23_no_tag_means_latest_and_nothing_else(path: str) -> None:
    async with rig(spec(model("x:8b")), spec(model("x:latest"))) as r:
        assert (await ask(r, path, "x")).node == "n2"
        assert (await ask(r, path, "x:latest")).node == "n2"
        assert (await ask(r, path, "x:8b")).node == "n1"


@pytest.mark.parametrize("path", ASKING)
async def test_trap_23_another_tag_is_another_model(path: str) -> None:
    async with rig(spec(model("x:8b"))) as r:
        told = await ask(r, path, "x")
        assert (told.status, told.node) == (404, "")
        assert posts(r) == 0


@pytest.mark.parametrize("name", ["gpt-oss:20b-cloud", "gpt-oss:cloud", "ns/m:cloud", "m:CLOUD"])
@pytest.mark.parametrize("path", GENERATING)
async def test_trap_24_a_cloud_name_needs_no_node_that_lists_it(path: str, name: str) -> None:
    async with rig() as r:
        assert (await ask(r, path, name)).node == "n1"
        assert json.loads(bodies(r.nodes[0])[0])["model"] == name


async def test_trap_24_local_is_no_tag_and_reaches_the_node_as_written() -> None:
    async with rig(spec(model("other")), spec()) as r:
        told = await ask(r, "/api/chat", f"{MODEL}:local")
        assert (told.status, told.node) == (200, "n2")
        assert json.loads(bodies(r.nodes[1])[0])["model"] == f"{MODEL}:local"


@pytest.mark.parametrize("name", ["my-cloud", "cloud", "my-local:8b"])
async def test_trap_24_a_model_may_be_called_cloud(name: str) -> None:
    async with rig(spec(), spec(model(name))) as r:
        assert (await ask(r, "/api/chat", name)).node == "n2"
        assert (await ask(r, "/api/chat", f"{name}x")).status == 404
        assert posts(r) == 1


LONG = ("hf.co/a/b:Q4_K_M", "localhost:5000/ns/m:latest", "10.0.0.1:5000/a/b:latest", "a/b:Q4_K_M")


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("pin", ["", "@n2", "@127.0.0.1:{port}", "@http://127.0.0.1:{port}"])
async def test_trap_25_each_part_of_a_long_name_is_read_as_what_it_is(name: str, pin: str) -> None:
    decoys = [
        "b:Q4_K_M",
        "m:5000",
        "ns/m",
        "5000/ns/m",
        "localhost/ns/m",
        "b",
        "huggingface.co/a/b:Q4_K_M",
    ]
    others = [model(other) for other in (*decoys, *LONG) if other != name]
    async with rig(spec(*others), spec(model(name))) as r:
        told = await ask(r, "/api/chat", name + pin.format(port=r.nodes[1].port))
        assert (told.status, told.node) == (200, "n2")
        assert json.loads(bodies(r.nodes[1])[0])["model"] == name
        tagless = name.removesuffix(":latest")
        assert (await ask(r, "/api/chat", tagless)).node == "n2"


@pytest.mark.parametrize("name", ["hf.co/model", "localhost:5000/model", "a/b/c/d", "-x", "x:"])
async def test_trap_25_what_is_no_name_is_refused_as_ollama_does(name: str) -> None:
    async with rig() as r:
        told = await ask(r, "/api/generate", name)
        assert (told.status, told.error) == (400, "invalid model name")


@pytest.mark.parametrize("path", ASKING)
async def test_trap_26_a_pin_to_a_host_that_is_not_configured_calls_nobody(path: str) -> None:
    called = 0

    async def script(peer: Peer) -> None:
        nonlocal called
        called += 1

    async with scripted(script) as outside, rig() as r:
        host = outside.removeprefix("http://")
        for pin in (host, outside, host.replace("127.0.0.1", "localhost"), "[::1]:1", "10.0.0.1"):
            told = await ask(r, path, f"{MODEL}@{pin}")
            assert (told.status, told.node) == (400, "")
            assert "n1" in told.error
        for pin in (f"{outside}/api", f"u:p@{host}", f"n1@{host}", f"{host}#n1", f"{host}?n1", ""):
            told = await ask(r, path, f"{MODEL}@{pin}")
            assert (told.status, told.error) == (400, "invalid model name")
        assert (called, posts(r)) == (0, 0)


async def test_trap_26_a_pin_is_split_at_the_at_sign() -> None:
    async with rig(spec(), spec()) as r:
        port = r.nodes[1].port
        for pin in (
            "n2",
            f"127.0.0.1:{port}",
            f"http://127.0.0.1:{port}",
            f" http://127.0.0.1:{port} ",
        ):
            told = await ask(r, "/api/chat", f"{MODEL}@{pin}")
            assert (told.status, told.node) == (200, "n2")
        told = await ask(r, "/api/chat", f"https://registry.ollama.ai/library/{MODEL}@n2")
        assert (told.status, told.node) == (200, "n2")
        # What a node would take for a scheme is none of its letters: an at sign is a pin's.
        assert (await ask(r, "/api/chat", f"a@b://registry.ollama.ai/{MODEL}")).status == 400
        assert bodies(r.nodes[0]) == []


async def test_trap_26_the_brackets_of_ipv6_belong_to_the_host() -> None:
    # The entry takes no connection: what counts is which node a pin is understood to name.
    v6 = {"name": "six", "url": "http://[::1]:9"}
    async with rig(entries=[v6]) as r:
        for pin in ("[::1]:9", "http://[::1]:9", "[0:0:0:0:0:0:0:1]:9", "six"):
            told = await ask(r, "/api/chat", f"{MODEL}@{pin}")
            assert (told.status, told.error) == (
                503,
                "cannot connect to Ollama server at http://[::1]:9",
            )
        for pin in ("::1:9", "[::1:9", "[::1]9"):
            assert (await ask(r, "/api/chat", f"{MODEL}@{pin}")).status == 400


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("stream", [False, True])
async def test_trap_27_an_answer_is_never_rewritten(path: str, *, stream: bool) -> None:
    said = b'{"model":"as the node says","done":true,"choices":[]}\n'
    told_as: list[str] = []

    async def script(peer: Peer) -> None:
        told_as.append(json.loads(peer.body)["model"])
        await answer(peer, said, "application/x-ndjson" if stream else "application/json")

    async with scripted(script) as url, rig(entries=[{"url": url}], aliases={"chat": MODEL}) as r:
        for name in (MODEL, f"{MODEL}@n1", "chat", f"ollama/{MODEL}", "LLama3:8b @ n1"):
            assert (await ask(r, path, name, stream=stream)).body == said
        assert told_as == [MODEL, MODEL, MODEL, MODEL, "LLama3:8b"]


async def test_trap_27_a_client_reads_its_own_string_where_it_wrote_a_plain_name() -> None:
    async with rig() as r:
        for name in (
            "llama3:8b",
            "LLAMA3:8b",
            " llama3:8b ",
            "registry.ollama.ai/library/llama3:8b",
        ):
            assert (await ask(r, "/api/chat", name, stream=False)).value["model"] == name
        # A pin is taken off for the node, which answers in the name that it was told.
        assert (await ask(r, "/api/chat", f"{MODEL}@n1", stream=False)).value["model"] == MODEL


@pytest.mark.parametrize("name", ["ns/m", "ns%2Fm", "hf.co/a/b:Q4", "hf.co%2Fa%2Fb:Q4"])
async def test_trap_44_a_name_with_a_slash_is_no_model_of_v1_models(name: str) -> None:
    async with rig(spec(model("ns/m"), model("hf.co/a/b:Q4"))) as r:
        for base in (r.url, r.nodes[0].url):
            url = URL(f"{base}/v1/models/{name}", encoded=True)
            async with r.session.get(url) as told:
                assert (told.status, await told.read()) == (404, b"404 page not found")
                assert told.headers["Content-Type"] == "text/plain"


async def test_trap_44_the_id_of_a_model_is_echoed_as_asked() -> None:
    async with rig() as r:
        for name in (MODEL, "LLAMA3:8b"):
            told = await send(r, f"/v1/models/{name}", method="GET")
            assert (told.status, told.value["id"]) == (200, name)
        missing = await send(r, "/v1/models/nope", method="GET")
        assert missing.status == 404
        assert missing.value["error"]["type"] == "not_found_error"
