"""Models made on the simulated node: blobs, create, copy, delete."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import ollama
import pytest
from aiohttp import ClientSession

from router.sim import Fault, FaultKind, SimNode, SimSpec
from tests.sim.nodes import CHAT, EMBED, USER, quick, records

GGUF = b"GGUF" + bytes(range(256)) * 40
DIGEST = f"sha256:{hashlib.sha256(GGUF).hexdigest()}"
SPEC = SimSpec(models=(CHAT, EMBED), library=(quick("phi"),), answer_tokens=(6, 6))
NO_FILE = "no such file or directory"


@pytest.fixture
async def node() -> AsyncIterator[SimNode]:
    async with SimNode(SPEC) as node:
        yield node


async def names(web: ClientSession) -> set[str]:
    async with web.get("/api/tags") as response:
        return {one["name"] for one in (await response.json())["models"]}


async def upload(web: ClientSession, body: bytes = GGUF, digest: str = DIGEST) -> int:
    async with web.post(f"/api/blobs/{digest}", data=body) as response:
        return response.status


async def head(web: ClientSession, digest: str) -> int:
    async with web.head(f"/api/blobs/{digest}") as response:
        assert await response.read() == b""
        return response.status


async def create(web: ClientSession, **body: object) -> list[dict[str, object]]:
    async with web.post("/api/create", json={"model": "mine", **body}) as response:
        assert response.status == 200
        return await records(response)


async def show(web: ClientSession, name: str = "mine") -> dict[str, object]:
    async with web.post("/api/show", json={"model": name}) as response:
        found: dict[str, object] = await response.json()
        return found


async def test_blob_is_here_once_it_was_sent(node: SimNode, web: ClientSession) -> None:
    dashed = DIGEST.replace(":", "-")
    assert await head(web, DIGEST) == 404
    assert await upload(web) == 201
    assert (await head(web, DIGEST), await head(web, dashed)) == (200, 200)
    assert await head(web, DIGEST.replace("sha256:", "sha256%3A")) == 200
    sent = node.calls(f"/api/blobs/{DIGEST}")[1]
    assert (sent.body, sent.received) == (b"", len(GGUF))


async def test_missing_blob_has_a_length_and_no_body(web: ClientSession) -> None:
    async with web.head(f"/api/blobs/{DIGEST}") as response:
        assert int(response.headers["Content-Length"]) > 0


@pytest.mark.parametrize("digest", ["x", "sha256:12", f"sha512:{'a' * 64}", f"sha256:{'g' * 64}"])
async def test_malformed_digest_is_refused(web: ClientSession, digest: str) -> None:
    assert (await head(web, digest), await upload(web, digest=digest)) == (400, 400)


async def test_blobs_of_a_model_are_here(web: ClientSession) -> None:
    assert await head(web, f"sha256:{CHAT.digest}") == 200


async def test_chunked_upload_needs_no_length(web: ClientSession) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(GGUF), 1000):
            yield GGUF[at : at + 1000]

    async with web.post(f"/api/blobs/{DIGEST}", data=pieces()) as response:
        assert (response.status, await response.read()) == (201, b"")


async def test_wrong_bytes_are_refused_and_kept_under_their_true_digest(web: ClientSession) -> None:
    claimed = f"sha256:{'0' * 64}"
    async with web.post(f"/api/blobs/{claimed}", data=GGUF) as response:
        told = f'digest mismatch, expected "{claimed}", got "{DIGEST}"'
        assert (response.status, await response.json()) == (400, {"error": told})
    assert (await head(web, claimed), await head(web, DIGEST)) == (404, 200)


async def speak(node: SimNode, *headers: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The head of an upload, sent by hand."""
    reader, writer = await asyncio.open_connection(node.host, node.port)
    lines = [f"POST /api/blobs/{DIGEST} HTTP/1.1", "Host: x", *headers, "", ""]
    writer.write("\r\n".join(lines).encode())
    return reader, writer


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()


async def test_leave_to_send_is_given_for_a_blob_that_is_missing(node: SimNode) -> None:
    reader, writer = await speak(node, f"Content-Length: {len(GGUF)}", "Expect: 100-continue")
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(GGUF)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 201 ")
    await close(writer)


@pytest.mark.parametrize("expect", [(), ("Expect: 100-continue",)])
async def test_blob_that_is_here_is_answered_before_it_is_read(
    node: SimNode, web: ClientSession, expect: tuple[str, ...]
) -> None:
    assert await upload(web) == 201
    reader, writer = await speak(node, "Content-Length: 5000000000", *expect)
    answer = (await reader.readuntil(b"\r\n\r\n")).decode()
    assert answer.startswith("HTTP/1.1 200 OK\r\n")
    assert "\r\nConnection: close\r\n" in answer
    assert await reader.read() == b""
    await close(writer)
    assert node.seen[-1].received == 0


async def test_leave_to_send_is_given_to_any_body(node: SimNode) -> None:
    reader, writer = await asyncio.open_connection(node.host, node.port)
    body = json.dumps({"model": "llama3:8b"}).encode()
    head = f"POST /api/show HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Expect: 100-continue\r\n\r\n")
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(body)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    await close(writer)


async def test_faults_meet_uploads_before_their_body_is_read(node: SimNode) -> None:
    node.fault = Fault(FaultKind.STATUS, path="/api/blobs/*", status=507)
    reader, writer = await speak(node, "Content-Length: 10")
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 507 ")
    await close(writer)
    assert (node.seen[-1].received, node.seen[-1].outcome) == (0, "error")


async def test_upload_that_is_broken_off_leaves_nothing(node: SimNode, web: ClientSession) -> None:
    _, writer = await speak(node, f"Content-Length: {len(GGUF)}")
    writer.write(GGUF[:100])
    await node.until(lambda: bool(node.seen) and node.seen[0].received == 100)
    await close(writer)
    await node.until(lambda: node.seen[0].outcome == "cancelled")
    assert await head(web, DIGEST) == 404


async def test_create_from_files(web: ClientSession) -> None:
    assert await upload(web) == 201
    lines = await create(web, files={"m.gguf": DIGEST})
    said = [str(one["status"]) for one in lines]
    assert said[:2] == ["parsing GGUF", f"using existing layer {DIGEST}"]
    assert " layer sha256:" in said[2]
    assert said[-2:] == ["writing manifest", "success"]
    shown = await show(web)
    assert f"FROM /root/.ollama/models/blobs/{DIGEST.replace(':', '-')}" in str(shown["modelfile"])
    async with web.post("/api/chat", json={"model": "mine", "messages": USER}) as response:
        assert (await records(response))[-1]["done_reason"] == "stop"


@pytest.mark.parametrize("field", ["files", "adapters", "draft_files"])
async def test_missing_blob_is_told_in_a_line(web: ClientSession, field: str) -> None:
    base = {} if field == "files" else {"from": "llama3:8b"}
    async with web.post("/api/create", json={"model": "x", **base, field: {"f": DIGEST}}) as reply:
        (*_, last) = await records(reply)
    path = f"/root/.ollama/models/blobs/{DIGEST.replace(':', '-')}"
    assert last == {"error": f"open {path}: {NO_FILE}"}
    assert await names(web) == {CHAT.name, EMBED.name}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"model": " mine"}, "invalid model name"),
        ({"from": "a/b/c/d"}, "invalid model name"),
        ({}, "neither 'from' or 'files' was specified"),
        ({"from": "llama3:8b", "adapters": {"a": "sha256:1"}}, "invalid digest format"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_create_refuses(
    web: ClientSession, body: dict[str, object], message: str, stream: bool
) -> None:
    given = {"model": "mine", "stream": stream, **body}
    async with web.post("/api/create", json=given) as response:
        assert (response.status, await response.json()) == (400, {"error": message})


async def test_create_from_a_model_shows_what_was_added(web: ClientSession) -> None:
    added = {
        "system": "Be brief.",
        "template": "{{ .System }}{{ .Prompt }}",
        "license": ["MIT", "and more"],
        "parameters": {"num_ctx": 1024, "stop": ["a", "b"]},
        "messages": [{"role": "user", "content": "hi"}],
    }
    lines = await create(web, **{"from": "llama3:8b"}, **added)
    made = [one for one in lines if str(one["status"]).startswith("creating new layer")]
    assert len(made) == 5
    assert lines[0] == {"status": f"using existing layer sha256:{CHAT.digest}"}
    shown = await show(web)
    assert (shown["system"], shown["template"]) == (added["system"], added["template"])
    assert shown["license"] == "MIT\nand more"
    assert shown["messages"] == added["messages"]
    wanted = [["num_ctx", "1024"], ["stop", '"a"'], ["stop", '"b"']]
    assert [line.split() for line in str(shown["parameters"]).split("\n")] == wanted
    assert "SYSTEM Be brief." in str(shown["modelfile"])
    again = await create(web, **{"from": "mine", "system": "Be long."}, model="other")
    assert again[-1] == {"status": "success"}
    assert (await show(web, "other"))["license"] == "MIT\nand more"


async def test_context_of_a_modelfile_holds_on_every_api(web: ClientSession) -> None:
    await create(web, **{"from": "llama3:8b", "parameters": {"num_ctx": 1024}})
    body = {"model": "mine", "messages": USER}
    async with web.post("/v1/chat/completions", json=body) as response:
        assert response.status == 200
    async with web.get("/api/ps") as response:
        assert (await response.json())["models"][0]["context_length"] == 1024


async def test_adapter_is_part_of_the_model(web: ClientSession) -> None:
    assert await upload(web) == 201
    lines = await create(web, **{"from": "llama3:8b", "adapters": {"a.gguf": DIGEST}})
    assert {"status": f"using existing layer {DIGEST}"} in lines
    assert "ADAPTER /root/" in str((await show(web))["modelfile"])


async def test_same_recipe_has_the_same_digest_on_every_node(web: ClientSession) -> None:
    for name in ("one", "two"):
        await create(web, **{"from": "llama3:8b", "system": "s"}, model=name)
    await create(web, **{"from": "llama3:8b", "system": "t"}, model="three")
    async with web.get("/api/tags") as response:
        found = {one["name"]: one["digest"] for one in (await response.json())["models"]}
    assert found["one:latest"] == found["two:latest"] != found["three:latest"]
    assert CHAT.digest not in (found["one:latest"], found["three:latest"])


async def test_missing_base_is_pulled_first(web: ClientSession) -> None:
    lines = await create(web, **{"from": "phi"})
    assert lines[0] == {"status": "pulling manifest"}
    assert lines[-1] == {"status": "success"}
    assert await names(web) == {CHAT.name, EMBED.name, "phi:latest", "mine:latest"}
    lines = await create(web, **{"from": "nope"})
    assert lines[-1] == {"error": "pull model manifest: file does not exist"}


async def test_copy(web: ClientSession) -> None:
    body = {"source": "LLAMA3:8b", "destination": "me/copy"}
    async with web.post("/api/copy", json=body) as response:
        assert (response.status, await response.read()) == (200, b"")
    async with web.get("/api/tags") as response:
        first = (await response.json())["models"][0]
    assert (first["name"], first["digest"]) == ("me/copy:latest", CHAT.digest)


@pytest.mark.parametrize(
    ("source", "destination", "status", "message"),
    [
        ("nope", "x", 404, 'model "nope" not found'),
        ("llama3:8b@n1", "x", 400, 'source "llama3:8b@n1" is invalid'),
        (" llama3:8b", "x", 400, 'source " llama3:8b" is invalid'),
        ("llama3:8b", "", 400, 'destination "" is invalid'),
    ],
)
async def test_copy_refuses(
    web: ClientSession, source: str, destination: str, status: int, message: str
) -> None:
    body = {"source": source, "destination": destination}
    async with web.post("/api/copy", json=body) as response:
        assert (response.status, await response.json()) == (status, {"error": message})


async def test_copy_over_a_model_keeps_the_spelling_of_its_name(web: ClientSession) -> None:
    body = {"source": EMBED.name, "destination": "LLAMA3:8B"}
    async with web.post("/api/copy", json=body) as response:
        assert response.status == 200
    assert await names(web) == {CHAT.name, EMBED.name}


@pytest.mark.parametrize("key", ["model", "name"])
async def test_delete(web: ClientSession, key: str) -> None:
    async with web.delete("/api/delete", json={key: "Llama3:8b"}) as response:
        assert (response.status, await response.read()) == (200, b"")
    assert await names(web) == {EMBED.name}
    async with web.delete("/api/delete", json={key: "Llama3:8b"}) as response:
        told = {"error": "model 'Llama3:8b' not found"}
        assert (response.status, await response.json()) == (404, told)


@pytest.mark.parametrize(
    ("body", "message"),
    [(b"", "missing request body"), (b'{"model":"a@b"}', 'name "a@b" is invalid')],
)
async def test_delete_refuses(web: ClientSession, body: bytes, message: str) -> None:
    async with web.delete("/api/delete", data=body) as response:
        assert (response.status, await response.json()) == (400, {"error": message})


async def test_delete_takes_the_blobs_that_nothing_else_needs(web: ClientSession) -> None:
    assert await upload(web) == 201
    await create(web, files={"m.gguf": DIGEST})
    await create(web, **{"from": "mine"}, model="twin")
    for name, there in (("mine", 200), ("twin", 404)):
        async with web.delete("/api/delete", json={"model": name}) as response:
            assert response.status == 200
        assert await head(web, DIGEST) == there


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/api/copy", {"source": "llama3:8b", "destination": "b"}),
        ("DELETE", "/api/delete", {"model": "llama3:8b"}),
    ],
)
async def test_faults_meet_copy_and_delete(
    node: SimNode, web: ClientSession, method: str, path: str, body: dict[str, str]
) -> None:
    node.fault = Fault(FaultKind.ERROR, path=path, model="llama3:8b")
    async with web.request(method, path, json=body) as response:
        assert response.status == 500
    assert node.calls(path)[0].outcome == "error"


async def test_what_was_made_outlives_a_restart(node: SimNode, web: ClientSession) -> None:
    await create(web, **{"from": "llama3:8b"})
    await node.stop()
    await node.start()
    async with ClientSession(node.url) as fresh:
        assert "mine:latest" in await names(fresh)


async def test_official_client_makes_copies_and_deletes(node: SimNode, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(GGUF)
    client = ollama.AsyncClient(host=node.url)
    digest = await client.create_blob(path)
    assert digest == DIGEST
    assert await client.create_blob(path) == DIGEST
    made = await client.create("mine", files={"m.gguf": digest}, system="Be brief.")
    assert made.status == "success"
    lines = [one async for one in await client.create("two", from_="mine", stream=True)]
    assert lines[-1].status == "success"
    assert (await client.chat("mine", messages=USER)).message.content
    assert (await client.copy("mine", "copy")).status == "success"
    assert (await client.show("copy")).modelinfo
    assert (await client.delete("mine")).status == "success"
    assert {one.model for one in (await client.list()).models} == {
        CHAT.name,
        EMBED.name,
        "two:latest",
        "copy:latest",
    }
    with pytest.raises(ollama.ResponseError) as caught:
        await client.create("bad", files={"m.gguf": f"sha256:{'0' * 64}"})
    assert caught.value.status_code == 500
    await client.close()  # type: ignore[no-untyped-call]
