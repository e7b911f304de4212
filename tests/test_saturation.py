"""More requests than nodes have slots, for a long time: the rest waits in the router."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.fleet import OTHER, Fleet, Speed, fleet
from tests.rig import MODEL, Rig, rig, talk
from tests.test_metrics import scrape, total

MODELS = (MODEL, OTHER)
NODES, PARALLEL, CLIENTS = 3, 3, 200
# A prompt takes 20 ms: who had to wait on a node for the end of another is seen to begin after it.
SHORT = Speed(decode_tps=10_000, tokens=(1, 1), slots=PARALLEL, prefill_tps=350, warm=MODELS)
# Slots are learned from answers that begin while others go on for a while.
LONGER = replace(SHORT, decode_tps=200, tokens=(20, 60))


@asynccontextmanager
async def pool(slots: int | str, speed: Speed) -> AsyncIterator[tuple[Rig, Fleet]]:
    """A router in this process, and nodes in processes of their own that have all models loaded."""
    sections: dict[str, Any] = {
        "routing": {"policy": "expected-delay", "flow_header": "X-Team"},
        "trusted": ["127.0.0.1"],
        "timeouts": {"busy_s": 3600},  # nobody is refused for how long it may have to wait
    }
    async with fleet(NODES, speed) as nodes:
        urls = [node.url for node in nodes.nodes]
        async with rig(others=urls, entries=[{"slots": slots}] * NODES, **sections) as r:
            yield r, nodes


def body(number: int) -> bytes:
    value = {
        "model": MODELS[number % len(MODELS)],
        "messages": [{"role": "user", "content": "hello"}],
        "stream": number % 4 == 0,
    }
    return json.dumps(value).encode()


async def ask(r: Rig, team: int, numbers: Sequence[int], statuses: Counter[int]) -> None:
    """One client that sends its requests one after the other, on one connection."""
    async with talk(r.url) as client:
        for number in numbers:
            await client.post("/api/chat", body(number), f"X-Team: {team}")
            answer = await client.answer()
            assert answer.whole
            statuses[answer.status] += 1


async def saturate(r: Rig, count: int) -> Counter[int]:
    """How often which status was answered to `count` requests of several teams."""
    statuses: Counter[int] = Counter()
    async with asyncio.TaskGroup() as group:
        for place in range(CLIENTS):
            numbers = range(place, count, CLIENTS)
            group.create_task(ask(r, place % 8, numbers, statuses))
    return statuses


async def balanced(r: Rig, nodes: Fleet, count: int) -> None:
    """Nothing waits, nothing is counted in flight, and every request had one lease."""
    assert (r.app.pool.waiting, r.app.pool.in_flight) == (0, 0)
    assert [view.in_flight for view in r.app.pool.registry.snapshot()] == [0] * NODES
    while any((await nodes.in_flight()).values()):
        pass  # a node may learn after the client that it has answered
    samples = await scrape(r)
    assert total(samples, "ollamux_decisions_total") == count
    assert total(samples, "ollamux_queue_depth") == 0
    assert len(r.requests) == count


async def peaks(nodes: Fleet) -> list[Mapping[str, Any]]:
    """The most of each model that each node has had at once, counted there."""
    return [(await node.state())["peaks"] for node in nodes.nodes]


@pytest.mark.timeout(600)
async def test_of_20_000_requests_no_node_gets_more_at_once_than_it_has_slots() -> None:
    async with pool(PARALLEL, SHORT) as (r, nodes):
        assert await saturate(r, 20_000) == {200: 20_000}
        assert await peaks(nodes) == [dict.fromkeys(MODELS, PARALLEL)] * NODES
        await balanced(r, nodes, 20_000)


@pytest.mark.timeout(600)
async def test_slots_that_are_learned_are_overdrawn_by_one_at_most() -> None:
    """Nodes that have nothing configured get as many as they are thought to serve, and one more
    that tries. They are thought to serve no more than they do, as ends are seen before what they
    make room for begins."""
    async with pool("auto", LONGER) as (r, nodes):
        assert await saturate(r, 1000) == {200: 1000}
        most = [max(found.values()) for found in await peaks(nodes)]
        assert all(1 < one <= PARALLEL + 1 for one in most), most
        learned = [max(view.slots.values()) for view in r.app.pool.registry.snapshot()]
        assert all(one <= PARALLEL for one in learned), learned
        await balanced(r, nodes, 1000)
