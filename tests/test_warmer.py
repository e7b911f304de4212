"""Models that are kept in memory, on real sockets: what nodes are asked for, and what is told."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from router.sim import GB, Fault, FaultKind, SimSpec
from router.sim.exchange import Seen
from tests.rig import MODEL, Rig, model, parsed, rig, spec
from tests.test_metrics import scrape, total

K = FaultKind
OTHER = "phi:latest"
EMBEDS = "nomic-embed-text:latest"
POLICIES = pytest.mark.parametrize("policy", ["least-in-flight", "expected-delay"])


@asynccontextmanager
async def warm(*specs: SimSpec, policy: str = "least-in-flight", **kept: int) -> AsyncIterator[Rig]:
    """A router that keeps so many replicas of `llama3` in memory, or of `phi` or `embed`."""
    names = {"llama3": MODEL, "phi": OTHER, "embed": EMBEDS}
    routing = {"policy": policy, "warm": {names[key]: count for key, count in kept.items()}}
    async with rig(*specs, routing=routing) as r:
        task = asyncio.create_task(r.app.warmer.run())
        try:
            yield r
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def loads(r: Rig, index: int = 0) -> list[Seen]:
    """What a node was asked for beside probes."""
    return [seen for seen in r.nodes[index].seen if seen.method == "POST"]


def bodies(r: Rig, index: int = 0) -> list[tuple[str, Any]]:
    return [(seen.raw_path, json.loads(seen.body)) for seen in loads(r, index)]


def resident(r: Rig, name: str = MODEL) -> list[str]:
    [kept] = [one for one in r.app.pool.warm.kept() if one.model == name]
    return list(kept.nodes)


def idle(r: Rig) -> bool:
    return r.app.pool.in_flight == 0


def told(r: Rig, *events: str) -> list[dict[str, Any]]:
    return [line for line in r.lines if line["event"] in events]


@POLICIES
async def test_after_the_start_a_model_is_in_memory_on_as_many_nodes_as_wanted(policy: str) -> None:
    async with warm(spec(), spec(), spec(), policy=policy, llama3=2) as r:
        await r.until(lambda: len(resident(r)) == 2 and idle(r))
        assert resident(r) == ["n1", "n2"]
        assert bodies(r, 0) == bodies(r, 1) == [("/api/generate", {"model": MODEL})]
        assert loads(r, 2) == []
        lines = told(r, "preloading", "preloaded")
        assert sorted((line["event"], line["node"]) for line in lines) == [
            ("preloaded", "n1"), ("preloaded", "n2"), ("preloading", "n1"), ("preloading", "n2"),
        ]  # fmt: skip
        assert {(line["level"], line["model"]) for line in lines} == {("info", MODEL)}


async def test_that_is_no_request_of_a_client() -> None:
    async with warm(spec(), llama3=1) as r:
        await r.until(lambda: bool(resident(r)) and idle(r))
        values = await scrape(r)
        assert total(values, "ollamux_requests_total") == 0
        assert r.requests == []
        assert not r.app._means.dispatch.decisions


async def test_what_is_kept_is_shown() -> None:
    async with warm(spec(), llama3=2, phi=1) as r:
        await r.until(lambda: bool(resident(r)) and idle(r))
        async with r.session.get(f"{r.admin}/status") as answer:
            shown = json.loads(await answer.read())["warm"]
        assert shown == {
            MODEL: {"wanted": 2, "loaded": 1, "nodes": ["n1"]},
            OTHER: {"wanted": 1, "loaded": 0, "nodes": []},
        }
        text = await r.metrics()
        assert f'ollamux_warm_replicas{{model="{MODEL}",state="wanted"}} 2.0' in text
        assert f'ollamux_warm_replicas{{model="{MODEL}",state="loaded"}} 1.0' in text
        assert f'ollamux_warm_replicas{{model="{OTHER}",state="wanted"}} 1.0' in text


async def test_a_model_that_only_embeds_is_loaded_another_way() -> None:
    embeds = model(EMBEDS, embedding=True)
    async with warm(spec(embeds), spec(embeds), embed=1) as r:
        await r.until(lambda: bool(resident(r, EMBEDS)) and idle(r))
        assert bodies(r) == [
            ("/api/generate", {"model": EMBEDS}),
            ("/api/embed", {"model": EMBEDS}),
        ]
        await r.nodes[0].refuse()
        await r.look()
        await r.until(lambda: resident(r, EMBEDS) == ["n2"] and idle(r))
        assert bodies(r, 1) == [("/api/embed", {"model": EMBEDS})], "it is known by now"


@POLICIES
async def test_when_a_node_dies_another_one_has_the_model(policy: str) -> None:
    async with warm(spec(), spec(), policy=policy, llama3=1) as r:
        await r.until(lambda: resident(r) == ["n1"] and idle(r))
        await r.nodes[0].refuse()
        await r.look()
        await r.until(lambda: resident(r) == ["n2"] and idle(r))


@POLICIES
async def test_before_a_model_expires_it_is_asked_for_again_as_it_is(policy: str) -> None:
    short = spec(keep_alive_s=1.0, default_num_ctx=2048)
    async with warm(short, policy=policy, llama3=1) as r:
        again = ("/api/generate", {"model": MODEL, "options": {"num_ctx": 2048}})
        await r.until(lambda: bodies(r).count(again) >= 2 and idle(r))
        assert "keep_alive" not in str(bodies(r))
        assert told(r, "kept loaded")[0]["level"] == "debug"


@POLICIES
async def test_what_works_is_never_driven_out(policy: str) -> None:
    small = spec(model(), model("phi"), memory_bytes=GB * 3 // 2, warm=(MODEL,), max_loaded=1)
    gpus = [{"gpus": ["1500MB"]}]
    routing = {"policy": policy, "warm": {OTHER: 1}}
    async with rig(small, entries=gpus, routing=routing) as r, asyncio.TaskGroup() as group:
        r.nodes[0].fault = Fault(K.HANG, path="/api/chat", times=1)
        first = group.create_task(_chat(r))
        await r.until(lambda: r.nodes[0].held == 1)
        task = group.create_task(r.app.warmer.run())
        for _ in range(5):
            await r.look()
        assert len(loads(r)) == 1, "the chat"
        assert resident(r, OTHER) == []
        r.nodes[0].release()
        assert await first == 200
        if policy == "least-in-flight":  # by expected delay it stays for some seconds
            await r.look()
            await r.until(lambda: resident(r, OTHER) == ["n1"] and idle(r))
        task.cancel()


async def _chat(r: Rig) -> int:
    async with r.chat(stream=False) as answer:
        await answer.read()
        return int(answer.status)


@POLICIES
async def test_a_load_holds_its_connection_and_counts_until_it_is_answered(policy: str) -> None:
    async with rig(spec(), routing={"policy": policy, "warm": {MODEL: 1}}) as r:
        r.nodes[0].fault = Fault(K.HANG, path="/api/generate", times=1)
        task = asyncio.create_task(r.app.warmer.run())
        await r.until(lambda: r.nodes[0].held == 1)
        assert r.app.pool.in_flight == 1
        r.app.pool.registry.drain("n1", draining=True)
        await r.look()
        assert (r.app.pool.in_flight, r.nodes[0].held) == (1, 1), (
            "a drained node ends what it began"
        )
        r.nodes[0].release()
        await r.until(lambda: idle(r))
        task.cancel()


async def test_by_expected_delay_who_comes_waits_for_the_load() -> None:
    async with rig(spec(), routing={"policy": "expected-delay", "warm": {MODEL: 1}}) as r:
        r.nodes[0].fault = Fault(K.HANG, path="/api/generate", times=1)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(r.app.warmer.run())
            await r.until(lambda: r.nodes[0].held == 1)
            first = group.create_task(_chat(r))
            await r.until(lambda: r.app.pool.waiting == 1)
            r.nodes[0].release()
            assert await first == 200
            task.cancel()
        assert r.requests[0]["reason"] == "warm"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(K.STATUS, path="/api/generate", status=500), "status 500"),
        (Fault(K.STATUS, path="/api/generate", status=404), "status 404"),
        (Fault(K.STATUS, path="/api/generate", status=403), "status 403"),
        (Fault(K.GARBAGE, path="/api/generate"), "not HTTP"),
    ],
)
async def test_a_load_that_fails_is_told_and_done_by_another_node(
    fault: Fault, reason: str
) -> None:
    async with rig(spec(), spec(), routing={"warm": {MODEL: 1}}) as r:
        r.nodes[0].fault = fault
        task = asyncio.create_task(r.app.warmer.run())
        await r.until(lambda: resident(r) == ["n2"] and idle(r))
        [line] = told(r, "not preloaded")
        assert (line["level"], line["model"], line["node"]) == ("warning", MODEL, "n1")
        assert line["reason"].startswith(reason)
        assert len(loads(r)) == 1, "it is not asked again and again"
        task.cancel()


async def test_what_can_be_asked_neither_way_is_no_fault_of_the_node() -> None:
    async with rig(spec(), routing={"warm": {MODEL: 1}}) as r:
        for path in ("/api/generate", "/api/embed"):
            r.nodes[0].faults.add(Fault(K.STATUS, path=path, status=400))
        task = asyncio.create_task(r.app.warmer.run())
        await r.until(lambda: bool(told(r, "not preloaded")))
        assert [path for path, _ in bodies(r)] == ["/api/generate", "/api/embed"]
        assert r.app.pool.registry.snapshot()[0].ejected == ()
        task.cancel()


async def test_a_reload_takes_effect_at_once() -> None:
    async with warm(spec()) as r:
        assert loads(r) == []
        r.app.reconfigure(parsed({**r.settings, "routing": {"warm": {MODEL: 1}}}))
        await r.until(lambda: resident(r) == ["n1"] and idle(r))


async def test_nothing_is_begun_once_the_router_ends_or_another_one_serves() -> None:
    for how in ("drain", "hand_over"):
        async with warm(spec()) as r:
            await getattr(r.app, how)()
            r.app.reconfigure(parsed({**r.settings, "routing": {"warm": {MODEL: 1}}}))
            await r.look()
            assert loads(r) == []


async def test_nothing_is_begun_before_each_node_was_looked_at() -> None:
    async with rig(spec(), spec(warm=(MODEL,)), routing={"warm": {MODEL: 1}}, looked=False) as r:
        task = asyncio.create_task(r.app.warmer.run())
        first, second = r.app.pool.registry.specs()
        await r.app.prober.look(first, ("version", "tags", "ps"))
        await asyncio.sleep(0)
        await r.app.prober.look(second, ("version", "tags", "ps"))
        await asyncio.sleep(0)
        assert resident(r) == ["n2"]
        assert loads(r, 0) == loads(r, 1) == []
        task.cancel()
