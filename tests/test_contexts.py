"""Clients that ask for different contexts of one model, on real sockets: what nodes get of that,
how often they load, and what is told of it."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

from router.sim import SimSpec
from tests.rig import LEAST, MODEL, Rig, model, rig, spec, talk
from tests.test_metrics import scrape, total

AT_LEAST: dict[str, Any] = {"policy": "expected-delay", "num_ctx": "at_least"}
CONTENT: Mapping[str, Any] = {
    "/api/chat": {"messages": [{"role": "user", "content": "héllo"}]},
    "/api/generate": {"prompt": "héllo"},
    "/api/embed": {"input": "héllo"},
    "/api/embeddings": {"prompt": "héllo"},
}
OTHER: Mapping[str, Any] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
    "/v1/completions": {"prompt": "hello", "options": {"num_ctx": 2048}},
    "/v1/embeddings": {"input": "hello"},
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5},
}


def roomy(**settings: Any) -> SimSpec:
    """A node with a default context of 4096 whose model was trained for more."""
    return spec(model(context_length=131_072), default_num_ctx=4096, **settings)


async def post(r: Rig, path: str, body: bytes) -> bytes:
    """Send it, and see what the node has in its memory then; gives what the node got."""
    r.nodes[0].seen.clear()
    async with talk(r.url) as client:
        await client.post(path, body)
        assert (await client.answer()).status == 200
    await r.look()
    [got] = [one.body for one in r.nodes[0].calls(path)]
    return bytes(got)


async def ask(r: Rig, num_ctx: int | None, path: str = "/api/chat", name: str = MODEL) -> bytes:
    options = {} if num_ctx is None else {"options": {"seed": 1, "num_ctx": num_ctx}}
    return await post(r, path, json.dumps({"model": name, **CONTENT[path], **options}).encode())


async def contexts(r: Rig) -> list[int]:
    async with r.session.get(f"{r.nodes[0].url}/api/ps") as answer:
        return [one["context_length"] for one in (await answer.json())["models"]]


ALTERNATING = (None, 2048, None, 1024, 4096, None, 2048)


@pytest.mark.parametrize("policy", ["expected-delay", "least-in-flight"])
async def test_clients_that_alternate_cause_no_reload(policy: str) -> None:
    async with rig(roomy(), routing={"policy": policy, "num_ctx": "at_least"}) as r:
        for path in CONTENT:
            for num_ctx in ALTERNATING:
                await ask(r, num_ctx, path)
        assert r.nodes[0].scheduler.loads == 1


async def test_as_sent_they_cause_one_each_time() -> None:
    async with rig(roomy(), routing={"policy": "expected-delay"}) as r:
        for num_ctx in (None, 2048, None, 1024, 4096, None, 2048):
            await ask(r, num_ctx)
        assert r.nodes[0].scheduler.loads == 6, "4096 is the default, too"
        samples = await scrape(r)
        assert total(samples, "ollamux_reloads_total", cause="num_ctx") == 5
        assert total(samples, "ollamux_cold_loads_total", cause="reload") == 5
        assert total(samples, "ollamux_cold_loads_total", cause="absent") == 1
        assert total(samples, "ollamux_reloads_total", cause="external") == 0


async def test_they_settle_on_the_largest() -> None:
    async with rig(roomy(), routing=AT_LEAST) as r:
        for num_ctx in (None, 8192, 2048, None, 16384, 8192, None, 16384):
            await ask(r, num_ctx)
        assert r.nodes[0].scheduler.loads == 3
        assert total(await scrape(r), "ollamux_reloads_total", cause="num_ctx") == 2


async def test_who_sends_none_is_not_given_less_than_the_default_once_that_was_seen() -> None:
    async with rig(roomy(), routing=AT_LEAST) as r:
        await ask(r, 1024)
        await ask(r, None)
        assert (await contexts(r), r.nodes[0].scheduler.loads) == ([1024], 1)
        await post(r, "/v1/completions", json.dumps({"model": MODEL, "prompt": "hello"}).encode())
        await _past(r, 1024)
        await r.look()
        await ask(r, 512)
        assert (await contexts(r), r.nodes[0].scheduler.loads) == ([1024], 3)
        await ask(r, None)
        await ask(r, 1024)
        assert (await contexts(r), r.nodes[0].scheduler.loads) == ([4096], 4)


async def _past(r: Rig, num_ctx: int) -> None:
    """A client asks the node itself."""
    body = {"model": MODEL, "prompt": "x", "options": {"num_ctx": num_ctx}}
    async with r.session.post(f"{r.nodes[0].url}/api/generate", json=body) as answer:
        await answer.read()


@pytest.mark.parametrize("path", CONTENT)
async def test_only_the_context_of_a_body_changes(path: str) -> None:
    async with rig(roomy(), routing=AT_LEAST) as r:
        await ask(r, 8192, path)
        text = json.dumps(CONTENT[path], ensure_ascii=False)[1:-1]
        smaller = '{ "model" : "%s",%s, "options":{"num_ctx" : 2048 ,"seed":1}, "x":1.50}\n'
        none = '{ "model" : "%s",%s, "x":1.50 }\n'
        for name in (MODEL, f"{MODEL}@n1"):
            got = await post(r, path, (smaller % (name, text)).encode())
            assert got.decode() == (smaller % (MODEL, text)).replace("2048", "8192")
            got = await post(r, path, (none % (name, text)).encode())
            changed = '{ "model" : "%s",%s, "x":1.50,"options":{"num_ctx":8192} }\n'
            assert got.decode() == changed % (MODEL, text)
            enough = (smaller % (name, text)).replace("2048", "8192").encode()
            assert await post(r, path, enough) == enough.replace(b"@n1", b"")
        assert r.nodes[0].scheduler.loads == 1


async def test_a_large_body_is_raised_too() -> None:
    async with rig(roomy(), routing=AT_LEAST) as r:
        await ask(r, 8192)
        body = {"model": f"{MODEL}@n1", "options": {"num_ctx": 512}, "prompt": "x" * 400_000}
        got = await post(r, "/api/generate", json.dumps(body).encode())
        assert json.loads(got) == {**body, "model": MODEL, "options": {"num_ctx": 8192}}


@pytest.mark.parametrize("path", OTHER)
async def test_bodies_that_hold_no_context_stay_as_they_are(path: str) -> None:
    async with rig(roomy(), routing=AT_LEAST) as r:
        await ask(r, 8192)
        body = json.dumps({"model": MODEL, **OTHER[path]}).encode()
        assert await post(r, path, body) == body
        assert await contexts(r) == [4096], "the node's default"
        assert total(await scrape(r), "ollamux_reloads_total", cause="num_ctx") == 1, "foreseen"


async def test_each_goes_to_the_node_with_its_context_and_nothing_is_loaded() -> None:
    async with rig(roomy(), roomy(), routing={"policy": "expected-delay"}) as r:
        for name, num_ctx in (("n1", None), ("n2", 8192)):
            body = {"model": f"{MODEL}@{name}", "messages": [], "options": {"num_ctx": num_ctx}}
            async with talk(r.url) as client:
                await client.post("/api/chat", json.dumps(body).encode())
                assert (await client.answer()).status == 200
        await r.look()
        for num_ctx, name in ((8192, "n2"), (None, "n1"), (8192, "n2"), (4096, "n1")):
            async with r.chat(options={"num_ctx": num_ctx}) as answer:
                await answer.read()
                assert answer.headers["X-Ollamux-Node"] == name
        assert [node.scheduler.loads for node in r.nodes] == [1, 1]


async def test_who_comes_right_behind_a_load_waits_until_its_context_is_seen() -> None:
    """Nobody can tell what has just been loaded, so that a smaller context would change it."""
    async with rig(roomy(num_parallel=2), routing=AT_LEAST, probe={"ps_interval_s": 3600}) as r:
        probing = asyncio.create_task(r.app.prober.run())
        try:
            await r.until(r.app.prober.looked.is_set)
            async with asyncio.TaskGroup() as group:
                for num_ctx in (None, 2048, None, 1024):
                    group.create_task(_chat(r, num_ctx))
            await r.until(lambda: bool(r.app.pool.registry.snapshot()[0].resident))
            await _chat(r, 2048)
        finally:
            probing.cancel()
        assert await contexts(r) == [4096]


async def _chat(r: Rig, num_ctx: int | None) -> None:
    async with r.chat(options={"num_ctx": num_ctx}) as answer:
        await answer.read()
        assert answer.status == 200


async def test_what_another_client_of_the_node_changes_is_counted_apart() -> None:
    async with rig(roomy(), routing={"policy": "expected-delay"}) as r:
        await ask(r, None)
        await _past(r, 8192)
        await r.look()
        samples = await scrape(r)
        assert total(samples, "ollamux_reloads_total", node="n1", cause="external") == 1
        assert total(samples, "ollamux_reloads_total", node="n1", cause="num_ctx") == 0


async def test_speeds_are_told_once_they_were_seen() -> None:
    slow = spec(model(prefill_tps=100_000.0, decode_tps=10_000.0, load_s=0.15))
    async with rig(slow, routing=LEAST) as r:
        names = ("prefill_tokens_per_second", "decode_tokens_per_second", "load_seconds")
        families = [f"ollamux_node_model_{name}" for name in names]
        assert [total(await scrape(r), name) for name in families] == [0, 0, 0]
        body = {"model": MODEL, "prompt": "many words " * 300}
        async with r.session.post(f"{r.url}/api/generate", json=body) as answer:
            await answer.read()
        r.app._gate.ledger.settle()
        samples = await scrape(r)
        assert all(total(samples, name, node="n1", model=MODEL) > 0 for name in families)
        assert not any(name.startswith("ollamux_cold_loads") for name, _ in samples), "no plan"


async def test_a_node_with_very_many_models_has_a_bounded_number_of_series() -> None:
    names = [f"m{number}:latest" for number in range(101)]
    async with rig(spec(*map(model, names), max_loaded=1)) as r:
        node = r.app.pool.registry.nodes[r.nodes[0].url]
        for name in names:
            await ask(r, None, name=name)
        r.app._gate.ledger.settle()
        assert len(node.replicas) == 101
        [learned] = r.app.pool.learned()
        assert len(learned.speeds) == 100
        assert names[-1] in learned.speeds, "it is in memory"


async def test_first_bytes_are_told_beside_what_was_expected() -> None:
    async with rig(routing={"policy": "expected-delay"}) as r:
        await ask(r, None)
        await _chat(r, None)
        async with r.chat(stream=False) as answer:
            await answer.read()
        samples = await scrape(r)
        for name in ("ollamux_first_byte_seconds", "ollamux_first_byte_expected_seconds"):
            assert total(samples, f"{name}_count", reason="load") == 1
            assert total(samples, f"{name}_count") == 2, "of one in one piece nothing begins"
    async with rig(routing=LEAST) as r:
        await _chat(r, None)
        assert total(await scrape(r), "ollamux_first_byte_seconds_count") == 0


async def test_a_copy_of_a_model_is_in_memory_with_it() -> None:
    """A node holds the weights once, whatever they are called, and lists the name that loaded
    them."""
    async with rig(roomy(), routing={"policy": "expected-delay"}) as r:
        async with r.session.post(
            f"{r.url}/api/copy", json={"source": MODEL, "destination": "mine"}
        ) as answer:
            assert answer.status == 200
        await r.look()
        reasons = []
        for name in (MODEL, "mine", MODEL, "mine"):
            async with talk(r.url) as client:
                body = json.dumps({"model": name, **CONTENT["/api/chat"]}).encode()
                await client.post("/api/chat", body)
                reasons.append((await client.answer()).header("X-Ollamux-Reason"))
            await r.look()
        assert reasons == ["load", "warm", "warm", "warm"]
        assert r.nodes[0].scheduler.loads == 1
        assert total(await scrape(r), "ollamux_cold_loads_total") == 1
