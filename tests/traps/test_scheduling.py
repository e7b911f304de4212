"""The contract's traps 12 to 18, 20, 21, 45, 47, 48 and 53: where a request goes, and what of a
node's scheduler the router leaves alone."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import openai
import pytest

from router.sim import GB, Fault, FaultKind
from tests.rig import MODEL, Peer, model, rig, scripted, spec, talk
from tests.traps.asking import ASKING, GENERATING, HELLO, ask, bodies, posts, send

K = FaultKind
COLD = 0.05  # seconds of a load


@pytest.mark.parametrize("path", GENERATING)
async def test_trap_12_a_cold_model_is_asked_of_one_node_once(path: str) -> None:
    async with rig(spec(model(load_s=COLD)), spec(model(load_s=COLD)), spec()) as r:
        r.nodes[2].fault = Fault(K.HANG)
        assert (await ask(r, path)).status == 200
        assert posts(r) == 1
        assert sum(node.scheduler.loads for node in r.nodes) == 1
        assert sum(node.scheduler.aborted_loads for node in r.nodes) == 0


async def test_trap_12_no_second_copy_is_sent_while_a_node_is_silent() -> None:
    async with rig(spec(), spec()) as r:
        for node in r.nodes:
            node.fault = Fault(K.HANG)
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(ask(r, "/api/chat"))
            await r.until(lambda: sum(node.held for node in r.nodes) == 1)
            for _ in range(3):
                await r.look()
            assert posts(r) == 1
            for node in r.nodes:
                node.release()
        assert asked.result().status == 200
        assert posts(r) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", GENERATING)
async def test_trap_13_a_client_that_leaves_frees_the_nodes_slot(
    path: str, *, stream: bool
) -> None:
    async with rig() as r:
        node = r.nodes[0]
        node.fault = Fault(K.STALL, after=1) if stream else Fault(K.HANG)
        async with talk(r.url) as client:
            fields = {"model": MODEL, "stream": stream, **GENERATING[path]}
            await client.post(path, json.dumps(fields).encode())
            await node.until(lambda: node.held == 1)
        await node.until(lambda: node.in_flight == 0)
        assert node.calls(path)[0].outcome == "cancelled"
        assert node.scheduler.in_flight == 0
        await r.until(lambda: r.app.pool.in_flight == 0)


async def test_trap_13_a_node_sees_the_whole_connection_closed() -> None:
    cut = asyncio.Event()

    async def script(peer: Peer) -> None:
        asked.set()
        await peer.gone()
        try:
            while True:  # a connection that is closed one way only would take this, or block
                await peer.say(b"x" * 65536)
        except ConnectionError:
            cut.set()

    asked = asyncio.Event()
    async with scripted(script) as url, rig(entries=[{"url": url}]) as r:
        async with talk(r.url) as client:
            await client.post("/api/chat", json.dumps({"model": MODEL}).encode())
            await asked.wait()
        await cut.wait()


async def test_trap_14_requests_in_flight_are_counted_by_the_router_itself() -> None:
    three = [spec(num_parallel=3, warm=(MODEL,)) for _ in range(3)]
    async with rig(*three) as r:
        for node in r.nodes:
            node.fault = Fault(K.HANG)  # none of them ever says 503
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(ask(r, "/api/chat")) for _ in range(9)]
            await r.until(lambda: sum(node.held for node in r.nodes) == 9)
            assert [node.held for node in r.nodes] == [3, 3, 3]
            for node in r.nodes:
                node.release()
        assert {one.result().status for one in asked} == {200}


async def test_trap_14_a_busy_nodes_503_is_not_passed_on_while_another_is_idle() -> None:
    async with rig(spec(), spec()) as r:
        r.nodes[0].fault = Fault(K.STATUS, status=503, message="server busy, please try again.")
        told = [await ask(r, "/api/chat") for _ in range(4)]
        assert [one.status for one in told] == [200] * 4


async def test_trap_14_a_503_of_every_node_is_passed_on_in_its_own_words() -> None:
    async with rig(spec(), spec(), timeouts={"busy_s": 0.01}) as r:
        for node in r.nodes:
            node.fault = Fault(K.STATUS, status=503, message="server busy, please try again.")
        told = await ask(r, "/api/chat")
        assert (told.status, told.error) == (503, "server busy, please try again.")


@pytest.mark.parametrize("status", [400, 404, 499, 500, 501, 503])
async def test_trap_15_an_answer_is_no_sign_of_illness(status: int) -> None:
    async with rig(probe={"down_after": 1}, timeouts={"busy_s": 0.01}) as r:
        r.nodes[0].fault = Fault(K.STATUS, status=status)
        for path in ASKING:
            if path != "/api/show":
                assert (await ask(r, path)).status == status
        await r.look()
        (node,) = r.app.pool.registry.snapshot()
        assert node.up
        assert not node.suspect


async def test_trap_15_a_node_whose_ps_is_slow_is_well() -> None:
    async with rig(probe={"down_after": 2, "timeout_s": 0.2}) as r:
        for path in ("/api/ps", "/api/ps", "/api/tags", "/api/tags"):
            r.nodes[0].fault = Fault(K.HANG, path=path)
            await r.look()
            assert r.app.pool.registry.any_up
        assert (await ask(r, "/api/chat")).status == 200


async def test_trap_16_a_port_that_accepts_is_no_node_yet() -> None:
    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        got.append(await reader.read())
        writer.close()

    connected = asyncio.Event()
    got: list[bytes] = []
    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, rig(spec(), entries=[{"url": url}], probe={"timeout_s": 0.05}) as r:
        assert connected.is_set()
        assert not r.app.pool.registry.any_up
        assert (await ask(r, "/api/chat")).status == 503
        assert (await send(r, f"{r.admin}/readyz", method="GET")).status == 503
    assert not any(b"POST" in sent for sent in got)


OPTIONS: tuple[Mapping[str, Any], ...] = (
    {},
    {"options": {}},
    {"options": {"num_ctx": 8192, "num_batch": 64, "num_gpu": -1, "num_thread": 4}},
    {"options": {"NUM_CTX": 4096.0}, "shift": False},
    {"options": None, "keep_alive": None},
)


@pytest.mark.parametrize("fields", OPTIONS)
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/api/embed"])
async def test_trap_17_what_makes_a_node_load_again_is_neither_added_nor_changed(
    path: str, fields: Mapping[str, Any]
) -> None:
    async with rig() as r:
        body = json.dumps({"model": f"{MODEL}@n1", **ASKING[path], **fields}).encode()
        await send(r, path, body)
        assert bodies(r.nodes[0]) == [body.replace(b"@n1", b"")]


async def test_trap_17_clients_that_send_none_do_not_make_a_node_load_again() -> None:
    async with rig() as r:
        for path in GENERATING:
            assert (await ask(r, path)).status == 200
            await r.look()
        assert r.nodes[0].scheduler.loads == 1


@pytest.mark.parametrize("path", [path for path in GENERATING if path.startswith("/v1/")])
async def test_trap_18_v1_carries_no_options_and_none_are_made_of_them(path: str) -> None:
    wished = {"num_ctx": 512, "options": {"num_ctx": 512}, "keep_alive": 0}
    async with rig() as r:
        body = json.dumps({"model": MODEL, **GENERATING[path], **wished}).encode()
        assert (await send(r, path, body)).status == 200
        assert bodies(r.nodes[0]) == [body]
        await r.look()
        (loaded,) = (await send(r, "/api/ps", method="GET")).value["models"]
        assert loaded["context_length"] == r.nodes[0].spec.default_num_ctx


async def test_trap_20_two_names_of_one_file_are_both_served_whichever_is_loaded() -> None:
    twins = [model(name, weights="w") for name in ("one", "two")]
    async with rig(spec(*twins)) as r:
        for name in ("one", "two", "one"):
            assert (await ask(r, "/api/chat", name)).status == 200
            await r.look()
            ps = (await send(r, "/api/ps", method="GET")).value["models"]
            # As the node lists them: nothing is concluded for the other name.
            alone = await send(r, f"{r.nodes[0].url}/api/ps", method="GET")
            assert [one["name"] for one in ps] == [one["name"] for one in alone.value["models"]]
            tags = (await send(r, "/api/tags", method="GET")).value["models"]
            assert {one["name"] for one in tags} == {"one:latest", "two:latest"}


async def test_trap_21_each_node_keeps_its_own_default_context() -> None:
    async with rig(spec(), spec(default_num_ctx=8192)) as r:
        for name in ("n1", "n2"):
            told = await ask(r, "/api/chat", f"{MODEL}@{name}")
            assert told.node == name  # so a client can tell which context it had
        assert bodies(r.nodes[0]) == bodies(r.nodes[1])
        ctx = []
        for node in r.nodes:
            (loaded,) = (await send(r, f"{node.url}/api/ps", method="GET")).value["models"]
            ctx.append(loaded["context_length"])
        assert ctx == [4096, 8192]


@pytest.mark.parametrize("keep", ["absent", None, 0, -1, 0.5, "5m", "-1m", 300, "10", True])
async def test_trap_45_keep_alive_is_the_clients_word_alone(keep: object) -> None:
    fields = {} if keep == "absent" else {"keep_alive": keep}
    async with rig() as r:
        body = json.dumps({"model": MODEL, **GENERATING["/api/chat"], **fields}).encode()
        told = await send(r, "/api/chat", body)
        alone = await send(r, f"{r.nodes[0].url}/api/chat", body)
        assert told.status == alone.status
        assert bodies(r.nodes[0]) == [body, body]


async def test_trap_45_the_year_2319_does_not_spoil_the_listing() -> None:
    async with rig(spec(model(), model("other"))) as r:
        await ask(r, "/api/chat", keep_alive=-1)
        await ask(r, "/api/chat", "other")
        await r.look()
        told = (await send(r, "/api/ps", method="GET")).value["models"]
        alone = (await send(r, f"{r.nodes[0].url}/api/ps", method="GET")).value["models"]
        assert [one["name"] for one in told] == [one["name"] for one in alone]
        assert told[0]["expires_at"][:4] == alone[0]["expires_at"][:4] > "2300"


@pytest.mark.parametrize("status", [400, 408, 409, 429])
async def test_trap_47_what_an_sdk_tries_again_the_router_does_not_multiply(status: int) -> None:
    async with rig(spec(), spec(), spec()) as r:
        for node in r.nodes:
            node.fault = Fault(K.STATUS, status=status)
        told = await ask(r, "/v1/chat/completions")
        assert (told.status, posts(r)) == (status, 1)


async def test_trap_47_a_budget_bounds_what_the_tries_of_a_client_come_to() -> None:
    """Each of them may be tried elsewhere, as long as that is not too much in all."""
    async with rig(spec(), spec(), spec(), retry={"budget": 0, "budget_least": 2}) as r:
        for node in r.nodes:
            node.fault = Fault(K.STATUS, status=500)
        async with openai.AsyncOpenAI(base_url=f"{r.url}/v1", api_key="x", max_retries=2) as client:
            with pytest.raises(openai.InternalServerError):
                await client.chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": "x"}]
                )
        assert posts(r) == 3 + 2


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
async def test_trap_48_a_preload_is_held_until_the_model_is_loaded(path: str) -> None:
    async with rig(spec(model(load_s=COLD))) as r:
        told = await send(r, path, {"model": MODEL})
        assert (told.status, told.value["done_reason"]) == (200, "load")
        scheduler = r.nodes[0].scheduler
        assert (scheduler.loads, scheduler.aborted_loads) == (1, 0)
        await r.look()
        ps = (await send(r, "/api/ps", method="GET")).value["models"]
        assert [one["name"] for one in ps] == [MODEL]


async def test_trap_53_what_is_not_in_ps_counts_too() -> None:
    async with rig(spec(), spec(memory_bytes=GB, warm=(MODEL,))) as r:
        r.nodes[0].fault = Fault(K.HANG)
        async with asyncio.TaskGroup() as group:
            # A load that no ps lists: n1 looks empty, n2 looks full, and is the free one.
            held = group.create_task(ask(r, "/api/chat", f"{MODEL}@n1"))
            await r.nodes[0].until(lambda: r.nodes[0].held == 1)
            await r.look()
            first, second = [node.resident for node in r.app.pool.registry.snapshot()]
            assert (set(first), set(second)) == (set(), {MODEL})
            assert (await ask(r, "/api/chat", messages=HELLO)).node == "n2"
            r.nodes[0].release()
        assert held.result().status == 200
