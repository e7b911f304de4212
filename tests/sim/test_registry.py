"""Pull and push of the simulated node: progress, errors, speed, clients that leave."""

import asyncio
import hashlib
from collections.abc import AsyncIterator

import ollama
import pytest
from aiohttp import ClientSession

from router.sim import Fault, FaultKind, SimNode, SimSpec
from tests.sim.nodes import CHAT, USER, quick, records

PHI = quick("phi", size_bytes=1000)
SPEC = SimSpec(models=(CHAT,), library=(PHI,))
NOT_THERE = "pull model manifest: file does not exist"


@pytest.fixture
async def node() -> AsyncIterator[SimNode]:
    async with SimNode(SPEC) as node:
        yield node


async def listed(web: ClientSession) -> list[str]:
    async with web.get("/api/tags") as response:
        return [one["name"] for one in (await response.json())["models"]]


async def stream(web: ClientSession, path: str, **body: object) -> list[dict[str, object]]:
    """The lines of a job that is answered with 200."""
    async with web.post(path, json=body) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "application/x-ndjson"
        assert response.headers["Transfer-Encoding"] == "chunked"
        return await records(response)


async def test_pull_tells_its_steps_and_brings_the_model(web: ClientSession) -> None:
    lines = await stream(web, "/api/pull", model="phi")
    weights = hashlib.sha256(b"phi:latest").hexdigest()
    moved = [one for one in lines if one.get("digest") == f"sha256:{weights}"]
    assert {one["status"] for one in moved} == {f"pulling {weights[:12]}"}
    assert {one["total"] for one in moved} == {1000}
    assert [one.get("completed") for one in moved] == [None, 250, 500, 750, 1000]
    said = [one["status"] for one in lines if "digest" not in one]
    assert said == ["pulling manifest", "verifying sha256 digest", "writing manifest", "success"]
    assert await listed(web) == ["phi:latest", "llama3:8b"]
    async with web.post("/api/chat", json={"model": "Phi", "messages": USER}) as response:
        assert (await records(response))[-1]["done"] is True


async def test_pull_without_stream_is_one_object(web: ClientSession) -> None:
    async with web.post("/api/pull", json={"name": " phi ", "stream": False}) as response:
        assert await response.json() == {"status": "success"}
        assert response.headers["Content-Type"] == "application/json"
    assert "phi:latest" in await listed(web)


async def test_layers_that_are_there_are_not_pulled_again(web: ClientSession) -> None:
    await stream(web, "/api/pull", model="phi")
    lines = await stream(web, "/api/pull", model="phi")
    layers = [one for one in lines if "digest" in one]
    assert len(layers) == 2
    assert all(one["total"] == one["completed"] for one in layers)


async def test_pull_of_what_nobody_has_fails_in_a_line_or_with_a_status(web: ClientSession) -> None:
    lines = await stream(web, "/api/pull", model="nope")
    assert lines == [{"status": "pulling manifest"}, {"error": NOT_THERE}]
    async with web.post("/api/pull", json={"model": "nope", "stream": False}) as response:
        assert (response.status, await response.json()) == (500, {"error": NOT_THERE})
    assert await listed(web) == ["llama3:8b"]


@pytest.mark.parametrize("name", ["", "a/b/c/d", "m@node"])
async def test_pull_of_a_bad_name_is_refused(web: ClientSession, name: str) -> None:
    async with web.post("/api/pull", json={"model": name}) as response:
        assert (response.status, await response.json()) == (400, {"error": "invalid model name"})


async def test_presets_can_be_pulled(web: ClientSession) -> None:
    assert (await stream(web, "/api/pull", model="qwen2.5:0.5b"))[-1] == {"status": "success"}


async def test_client_that_leaves_cancels_its_pull(node: SimNode, web: ClientSession) -> None:
    node.fault = Fault(FaultKind.STALL, path="/api/pull", after=3)
    async with web.post("/api/pull", json={"model": "phi"}) as response:
        for _ in range(3):
            await response.content.readline()
        await node.until(lambda: node.held == 1)
        response.close()
    (call,) = node.calls("/api/pull")
    await node.until(lambda: call.outcome == "cancelled")
    assert await listed(web) == ["llama3:8b"]


@pytest.mark.parametrize("streamed", [True, False])
async def test_slow_pull_is_under_way_until_its_client_leaves(streamed: bool) -> None:
    spec = SimSpec(library=(PHI,), transfer_bps=0.01)
    async with SimNode(spec) as node, ClientSession(node.url) as web:
        body = {"model": "phi", "stream": streamed}
        async with asyncio.TaskGroup() as group:
            task = group.create_task(_post(web, "/api/pull", body))
            await node.until(lambda: bool(node.seen) and node.seen[0].received > 0)
            if streamed:
                await node.until(lambda: node.seen[0].records == 2)
            task.cancel()
        await node.until(lambda: node.seen[0].outcome == "cancelled")
        assert await listed(web) == []


async def _post(web: ClientSession, path: str, body: object) -> None:
    async with web.post(path, json=body) as response:
        await response.read()


async def test_slow_fault_sets_the_speed_of_a_pull() -> None:
    spec = SimSpec(library=(PHI,), transfer_bps=0.01)
    async with SimNode(spec) as node, ClientSession(node.url) as web:
        node.fault = Fault(FaultKind.SLOW, path="/api/pull", factor=0.0)
        assert (await stream(web, "/api/pull", model="phi"))[-1] == {"status": "success"}


async def test_cloud_model_is_pulled_as_a_stub(web: ClientSession) -> None:
    for asked in ("gpt-oss:20b:cloud", "kimi:cloud"):
        assert (await stream(web, "/api/pull", model=asked))[-1] == {"status": "success"}
    async with web.get("/api/tags") as response:
        found = {one["name"]: one for one in (await response.json())["models"]}
    assert found.keys() == {"gpt-oss:20b-cloud", "kimi:cloud", "llama3:8b"}
    assert found["gpt-oss:20b-cloud"]["remote_model"] == "gpt-oss:20b"
    assert "remote_host" not in found["llama3:8b"]
    async with web.post("/api/show", json={"model": "kimi:cloud"}) as response:
        assert (await response.json())["remote_model"] == "kimi"
    async with web.post("/api/signout") as response:
        assert response.status == 200
    for name, status in (("kimi:cloud:local", 400), ("kimi:cloud", 401)):
        async with web.post("/api/chat", json={"model": name}) as response:
            assert response.status == status


async def test_push_tells_its_steps(web: ClientSession) -> None:
    lines = await stream(web, "/api/push", model="llama3:8b")
    said = [one["status"] for one in lines if "digest" not in one]
    assert said == ["retrieving manifest", "pushing manifest", "success"]
    moved = [one for one in lines if one.get("digest") == f"sha256:{CHAT.digest}"]
    assert {one["status"] for one in moved} == {f"pushing {CHAT.digest[:12]}"}
    assert moved[-1]["completed"] == moved[-1]["total"] == CHAT.size_bytes


@pytest.mark.parametrize("name", ["nope", "a/b/c/d", " llama3:8b"])
async def test_push_of_what_is_not_here_fails_after_the_status(
    web: ClientSession, name: str
) -> None:
    lines = await stream(web, "/api/push", model=name)
    assert lines[0] == {"status": "retrieving manifest"}
    assert str(lines[-1]["error"]).endswith("no such file or directory")
    async with web.post("/api/push", json={"model": name, "stream": False}) as response:
        assert response.status == 500


async def test_push_needs_a_name_and_a_user(web: ClientSession) -> None:
    async with web.post("/api/push", json={}) as response:
        assert (response.status, await response.json()) == (400, {"error": "model is required"})
    async with web.post("/api/signout") as response:
        assert response.status == 200
    lines = await stream(web, "/api/push", model="llama3:8b")
    assert "not authorized" in str(lines[-1]["error"])


@pytest.mark.parametrize("path", ["/api/pull", "/api/push", "/api/create"])
async def test_faults_meet_long_jobs(node: SimNode, web: ClientSession, path: str) -> None:
    body = {"model": "llama3:8b" if path == "/api/push" else "phi", "from": "llama3:8b"}
    node.fault = Fault(FaultKind.ERROR, path=path, after=1)
    lines = await stream(web, path, **body)
    assert (len(lines), lines[-1]) == (2, {"error": "the runner was told to fail"})
    node.fault = Fault(FaultKind.STATUS, path=path, model=body["model"], status=503)
    async with web.post(path, json=body) as response:
        assert response.status == 503
    assert [one.outcome for one in node.calls(path)] == ["error"] * 2


async def test_official_client_pulls_and_pushes(node: SimNode) -> None:
    client = ollama.AsyncClient(host=node.url)
    lines = [one async for one in await client.pull("phi", stream=True)]
    assert (lines[0].status, lines[-1].status) == ("pulling manifest", "success")
    assert max(one.completed or 0 for one in lines) == 1000
    assert (await client.pull("phi")).status == "success"
    assert (await client.push("phi")).status == "success"
    pushed = [one async for one in await client.push("phi", stream=True)]
    assert pushed[-1].status == "success"
    with pytest.raises(ollama.ResponseError, match="file does not exist"):
        await client.pull("nope")
    with pytest.raises(ollama.ResponseError, match="file does not exist"):
        [one async for one in await client.pull("nope", stream=True)]
    await client.close()  # type: ignore[no-untyped-call]
