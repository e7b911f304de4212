"""The contract's traps 28, 29, 32 to 35 and 51: changing what the nodes have, and as whom."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator

import pytest

from router.sim import Fault, FaultKind
from tests.rig import MODEL, Peer, Rig, model, rig, scripted, spec, talk
from tests.traps.asking import ask, send

K = FaultKind
DATA = b"GGUF" + bytes(range(256)) * 4000
DIGEST = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
BLOB = f"/api/blobs/{DIGEST}"
PHI = model("phi:latest", size_bytes=1000)
VERBS = {
    "/api/pull": {"model": "phi"},
    "/api/create": {"model": "made", "from": MODEL},
    "/api/copy": {"source": MODEL, "destination": "copied"},
    "/api/push": {"model": MODEL},
}


async def resident(r: Rig, name: str) -> list[int]:
    """How many nodes hold a model in memory, as they say themselves: one entry per node."""
    found = []
    for node in r.nodes:
        loaded = (await send(r, f"{node.url}/api/ps", method="GET")).value["models"]
        found.append(sum(one["name"] == name for one in loaded))
    return found


async def pieces(count: int, size: int) -> AsyncIterator[bytes]:
    """A body that is made while it is sent."""
    for _ in range(count):
        yield b"x" * size


@pytest.mark.parametrize("fields", [{"prompt": ""}, {}, {"messages": []}])
async def test_trap_28_an_unload_frees_every_node_that_holds_the_model(
    fields: dict[str, object],
) -> None:
    path = "/api/chat" if "messages" in fields else "/api/generate"
    async with rig(spec(warm=(MODEL,)), spec(warm=(MODEL,)), spec()) as r:
        told = await send(r, path, {"model": MODEL, "keep_alive": 0, **fields})
        assert (told.status, told.value["done_reason"]) == (200, "unload")
        assert await resident(r, MODEL) == [0, 0, 0]


async def test_trap_28_ollama_rm_leaves_the_model_nowhere() -> None:
    async with rig(spec(), spec(model(), PHI), spec(PHI)) as r:
        await ask(r, "/api/chat", f"{MODEL}@n2")
        assert (await send(r, "/api/show", {"model": MODEL})).status == 200
        unload = await send(r, "/api/generate", {"model": MODEL, "keep_alive": 0})
        assert unload.status == 200
        gone = await send(r, "/api/delete", {"model": MODEL}, method="DELETE")
        assert (gone.status, gone.body) == (200, b"")
        listed = (await send(r, "/api/tags", method="GET")).value["models"]
        assert [one["name"] for one in listed] == ["phi:latest"]


@pytest.mark.parametrize("key", ["model", "name", "Name"])
async def test_trap_29_the_body_of_a_delete_reaches_every_holder(key: str) -> None:
    async with rig(spec(), spec(model(), PHI), spec(PHI)) as r:
        body = json.dumps({key: "LLAMA3:8b"}).encode()
        assert (await send(r, "/api/delete", body, method="DELETE")).status == 200
        got = [[seen.body for seen in node.calls("/api/delete")] for node in r.nodes]
        assert got == [[body], [body], []]


async def test_trap_29_a_delete_without_a_body_deletes_nothing() -> None:
    async with rig() as r:
        told = await send(r, "/api/delete", method="DELETE")
        assert (told.status, told.error) == (400, "missing request body")
        assert r.nodes[0].calls("/api/delete") == []


async def test_trap_32_a_blob_is_there_only_where_a_create_would_find_it() -> None:
    async with rig(spec(), spec()) as r:
        assert (await send(r, r.nodes[0].url + BLOB, DATA)).status == 201
        assert (await send(r, BLOB, method="HEAD")).status == 404
        assert (await send(r, BLOB, DATA)).status == 201
        assert (await send(r, BLOB, method="HEAD")).status == 200
        made = await send(r, "/api/create", {"model": "made", "files": {"m.gguf": DIGEST}})
        assert made.value_of_last["status"] == "success"
        for name in ("n1", "n2"):
            assert (await ask(r, "/api/chat", f"made@{name}")).status == 200


async def test_trap_32_a_create_goes_to_the_node_that_has_the_blob() -> None:
    async with rig(spec(), spec(), spec()) as r:
        assert (await send(r, r.nodes[1].url + BLOB, DATA)).status == 201
        made = await send(r, "/api/create", {"model": "made", "files": {"m.gguf": DIGEST}})
        assert made.value_of_last["status"] == "success"
        assert [len(node.calls("/api/create")) for node in r.nodes] == [0, 1, 0]


async def test_trap_33_a_blob_may_be_larger_than_any_body_that_is_held() -> None:
    async with rig(spec(), spec(), limits={"max_body_bytes": 1 << 20}) as r:
        state = hashlib.sha256(b"x" * (8 << 20))
        path = f"/api/blobs/sha256:{state.hexdigest()}"
        async with r.session.post(r.url + path, data=pieces(128, 1 << 16)) as told:
            assert told.status == 201
        assert (await send(r, path, method="HEAD")).status == 200


async def test_trap_33_a_node_that_answers_before_it_has_read_blocks_nobody() -> None:
    async def script(peer: Peer) -> None:
        # HEAD says that it is missing; the POST is answered before its body, as by another upload.
        if peer.head.startswith(b"HEAD"):
            await peer.say(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        await peer.say(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        await peer.gone()

    async with scripted(script) as url, rig(entries=[{"url": url}]) as r:
        async with asyncio.timeout(60):
            async with r.session.post(r.url + BLOB, data=pieces(512, 1 << 16)) as told:
                assert told.status == 200
        # Whatever is asked next is no part of what was left unread.
        assert (await send(r, "/", method="GET")).body == b"Ollama is running"
        await r.until(lambda: r.app.pool.in_flight == 0)


@pytest.mark.parametrize("there", [False, True])
async def test_trap_34_who_asks_to_continue_hears_what_the_nodes_know(*, there: bool) -> None:
    async with rig(spec(), spec()) as r, talk(r.url) as client:
        if there:
            assert (await send(r, BLOB, DATA)).status == 201
        head = f"POST {BLOB} HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
        await client.send(f"{head}Content-Length: {len(DATA)}\r\n\r\n".encode())
        _, status, _ = await client.head()
        assert status == (200 if there else 100)
        if not there:
            await client.send(DATA)
            assert (await client.answer()).status == 201


async def test_trap_35_a_pull_says_success_once_and_last() -> None:
    async with rig(*[spec(library=(PHI,))] * 3) as r:
        told = await send(r, "/api/pull", {"model": "phi"})
        lines = [json.loads(line) for line in told.body.splitlines()]
        assert [line.get("status") for line in lines].count("success") == 1
        assert lines[-1] == {"status": "success"}
        assert not any("error" in line for line in lines)


async def test_trap_35_a_pull_that_failed_somewhere_never_says_success() -> None:
    async with rig(spec(library=(PHI,)), spec(library=(PHI,))) as r:
        r.nodes[0].fault = Fault(K.DIE, path="/api/pull", after=1)
        told = await send(r, "/api/pull", {"model": "phi"})
        assert (told.status, b"success" in told.body) == (200, False)
        assert "n1" in told.value_of_last["error"]


async def test_trap_35_an_error_of_a_pull_is_a_line_in_a_stream_and_a_status_without() -> None:
    async with rig(spec(), spec()) as r:
        told = await send(r, "/api/pull", {"model": "no/such"})
        assert told.status == 200
        assert "file does not exist" in told.value_of_last["error"]
        told = await send(r, "/api/pull", {"model": "no/such", "stream": False})
        assert told.status == 500
        assert "file does not exist" in told.error


@pytest.mark.parametrize("path", VERBS)
@pytest.mark.parametrize("reset", [False, True])
async def test_trap_11_a_change_is_asked_of_a_node_once_however_it_fails(
    path: str, *, reset: bool
) -> None:
    specs = spec(library=(PHI,)), spec(library=(PHI,))
    async with rig(*specs, entries=[{"primary": True}]) as r:
        for node in r.nodes:
            node.fault = Fault(K.CUT, path=path, reset=reset)
        told = await send(r, path, VERBS[path])
        assert told.status == 502
        # The connections of the probes are kept: that one of them ended proves nothing.
        assert all(len(node.calls(path)) <= 1 for node in r.nodes)


async def test_trap_02_a_copy_is_routed_by_its_source() -> None:
    async with rig(spec(), spec(PHI)) as r:
        told = await send(r, "/api/copy", {"source": "phi", "destination": "copied"})
        assert (told.status, told.body) == (200, b"")
        assert [len(node.calls("/api/copy")) for node in r.nodes] == [0, 1]


async def test_trap_02_a_transcription_is_routed_by_a_part_of_its_form() -> None:
    form = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="model"\r\n\r\n'
        b'"model":"llama3:8b"\r\n'
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nphi\r\n--b--\r\n'
    )
    kind = "multipart/form-data; boundary=b"
    async with rig(spec(), spec(PHI)) as r:
        told = await send(r, "/v1/audio/transcriptions", form, Content_Type=kind)
        assert (told.status, told.node) == (200, "n2")
        assert [seen.body for seen in r.nodes[1].calls("/v1/audio/transcriptions")] == [form]


ACCOUNT = {"/api/me": "POST", "/api/signout": "POST", "/api/user/keys/abc": "DELETE"}


async def test_trap_51_everything_under_an_identity_goes_to_one_node() -> None:
    entries = [{}, {"primary": True}]
    async with rig(spec(user="anna"), spec(user="bert"), spec(user="carl"), entries=entries) as r:
        for _ in range(3):
            told = await send(r, "/api/push", {"model": MODEL})
            assert (told.status, told.node) == (200, "n2")
            assert "bert" in json.dumps((await send(r, "/api/me")).value)
        for path, method in ACCOUNT.items():
            assert (await send(r, path, method=method)).node == "n2"
            assert (await send(r, "/@n3" + path, method=method)).node == "n3"


async def test_trap_51_without_a_primary_no_node_is_taken_for_one() -> None:
    async with rig(spec(), spec()) as r:
        for path, method in ACCOUNT.items():
            told = await send(r, path, method=method)
            assert (told.status, told.node) == (400, "")
            assert "primary" in told.error
        assert not any(node.calls("/api/me") for node in r.nodes)
