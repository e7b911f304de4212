"""Nodes that die, hang, fail and come back while clients are at work: no promise is broken."""

import asyncio
import random
from pathlib import Path

import pytest

from router.sim.infer import BUSY
from tests.chaos.fleet import OTHER, Speed
from tests.chaos.link import Cut, Mode
from tests.chaos.orders import SAFE, Kind
from tests.chaos.scene import Scene, scene
from tests.chaos.verdicts import Outcome
from tests.rig import LEAST, MODEL

pytestmark = pytest.mark.chaos


async def ended(s: Scene) -> None:
    """After the harm: all counts come to zero, and every promise was kept."""
    await s.heal()
    await s.quiet()


async def test_nodes_that_are_killed_under_load_lose_nothing(
    tmp_path: Path, seed: str, dice: random.Random
) -> None:
    async with scene(tmp_path, seed) as s:
        before = await s.quiet()
        async with s.load(kinds=SAFE, workers=20).running() as tally:
            for _ in range(3):
                await asyncio.sleep(0.7)
                node = dice.choice(s.fleet.nodes)
                await node.kill()
                await asyncio.sleep(0.7)
                await node.start()
        await ended(s)
        s.check(before)
        assert tally.count(Outcome.RIGHT, *SAFE) == tally.total(*SAFE) > 50, tally.unhappy


async def test_nodes_that_are_stopped_are_left(
    tmp_path: Path, seed: str, dice: random.Random
) -> None:
    """Their probes fail, and then they may not be silent for long."""
    timeouts = {"connect_s": 0.5, "silent_down_s": 0.5}
    async with scene(tmp_path, seed, timeouts=timeouts) as s:
        before = await s.quiet()
        async with s.load(kinds=SAFE, patience_s=10).running() as tally:
            await asyncio.sleep(0.5)
            node = dice.choice(s.fleet.nodes)
            node.stop()
            await asyncio.sleep(2.5)
            node.go_on()
            await asyncio.sleep(0.5)
        await ended(s)
        s.check(before)
        assert tally.count(Outcome.RIGHT, *SAFE) == tally.total(*SAFE) > 50, tally.unhappy


async def test_a_network_that_fails_breaks_no_promise(
    tmp_path: Path, seed: str, dice: random.Random
) -> None:
    timeouts = {"connect_s": 0.5, "first_byte_s": 1.5, "between_records_s": 1}
    async with scene(tmp_path, seed, links=True, timeouts=timeouts) as s:
        before = await s.quiet()
        links = tuple(s.links.values())
        async with s.load(workers=20, leaving=0.1).running():
            for mode in (Mode.RESET, Mode.GARBAGE, Mode.SLOW, Mode.HOLE):
                link = dice.choice(links)
                link.set(mode)
                link.cuts.extend(Cut(dice.randrange(3000), reset=bool(n % 2)) for n in range(5))
                await asyncio.sleep(1)
                link.set(Mode.OPEN)
                await asyncio.sleep(0.3)
        await ended(s)
        s.check(before)


async def test_a_model_that_is_deleted_under_load_is_asked_for_elsewhere(
    tmp_path: Path, seed: str
) -> None:
    async with scene(tmp_path, seed) as s:
        before = await s.quiet()
        async with s.load(kinds=(Kind.OTHER, Kind.CHAT)).running() as tally:
            for node in s.fleet.nodes[:2]:
                await asyncio.sleep(0.5)
                await node.delete(OTHER)
            await asyncio.sleep(1)
            for node in s.fleet.nodes[:2]:
                await node.restore(OTHER)
        await ended(s)
        s.check(before)
        assert tally.count(Outcome.RIGHT, *Kind) == tally.total(*Kind) > 40, tally.unhappy


async def test_a_node_without_memory_for_one_model_goes_on_with_the_others(
    tmp_path: Path, seed: str
) -> None:
    message = "model requires more system memory; the node was told to say so"
    async with scene(tmp_path, seed) as s:
        before = await s.quiet()
        await s.fleet["n1"].fault(kind="status", status=500, model=OTHER, message=message)
        async with s.load(kinds=(Kind.OTHER,), workers=8).running() as other:
            await asyncio.sleep(1.5)
        async with s.load(kinds=(Kind.CHAT,), workers=8).running() as chat:
            await asyncio.sleep(1)
        await ended(s)
        s.check(before)
        assert other.count(Outcome.RIGHT, Kind.OTHER) == other.total(Kind.OTHER), other.unhappy
        assert chat.count(Outcome.RIGHT, Kind.CHAT) == chat.total(Kind.CHAT), chat.unhappy
        assert chat.nodes["n1"] > 0, f"{MODEL} was kept from the node as well"


async def test_where_all_nodes_are_busy_requests_wait(tmp_path: Path, seed: str) -> None:
    async with scene(tmp_path, seed) as s:
        before = await s.quiet()
        for node in s.fleet.nodes:
            await node.fault(kind="status", status=503, message=BUSY)
        async with s.load(kinds=(Kind.CHAT, Kind.WHOLE), workers=6).running() as tally:
            await asyncio.sleep(0.5)
            await asyncio.gather(*(node.behave() for node in s.fleet.nodes))
            await asyncio.sleep(1.5)
        await ended(s)
        s.check(before)
        assert tally.count(Outcome.RIGHT, *SAFE) == tally.total(*SAFE) > 5, tally.unhappy


async def test_an_ejected_node_gets_single_trials(tmp_path: Path, seed: str) -> None:
    async with scene(tmp_path, seed, routing=LEAST) as s:
        before = await s.quiet()
        bad = s.fleet["n2"]
        await bad.fault(kind="status", status=500, message="the runner was told to fail")
        async with s.load(kinds=(Kind.CHAT,), workers=12).running() as tally:
            async with asyncio.timeout(30):
                await s.router.until(lambda shown: bool(shown["nodes"][1]["ejected"]))
            async with s.without_new(bad, trials=2):  # the first after 0.5 s at least, then 1 s
                await asyncio.sleep(1.6)
        await ended(s)
        s.check(before)
        assert tally.count(Outcome.RIGHT, Kind.CHAT) == tally.total(Kind.CHAT), tally.unhappy


async def test_all_nodes_at_once(tmp_path: Path, seed: str) -> None:
    async with scene(tmp_path, seed) as s:
        before = await s.quiet()
        async with s.load(workers=8).running() as tally:
            await asyncio.sleep(0.7)
            await asyncio.gather(*(node.kill() for node in s.fleet.nodes))
            await asyncio.sleep(0.7)
            await asyncio.gather(*(node.start() for node in s.fleet.nodes))
            await s.heal()
            at_first = tally.count(Outcome.RIGHT, *Kind)
            await asyncio.sleep(1)
        await ended(s)
        s.check(before)
        assert tally.count(Outcome.REFUSED, *Kind) > 0
        assert tally.count(Outcome.RIGHT, *Kind) > at_first, "nothing was served again"


async def test_reloads_under_load_cost_nothing(tmp_path: Path, seed: str) -> None:
    async with scene(tmp_path, seed) as s:
        before = await s.quiet()
        async with s.load(kinds=SAFE).running() as tally:
            for gone in ("n1", "n2"):
                async with s.without(gone):
                    await asyncio.sleep(0.8)
                    await s.break_file()
                    await asyncio.sleep(0.4)
        await ended(s)
        s.check(before)
        assert tally.count(Outcome.RIGHT, *SAFE) == tally.total(*SAFE) > 50, tally.unhappy


async def test_a_drained_node_gets_nothing_new_and_loses_nothing(tmp_path: Path, seed: str) -> None:
    async with scene(tmp_path, seed) as s:
        before = await s.quiet()
        async with s.load().running() as tally:
            await asyncio.sleep(0.5)
            async with s.drained("n2"):
                await asyncio.sleep(0.7)
                await s.reload(log={"level": "debug"})
                # A pin there is a 503 that says so; however slow the machine, one will come.
                while not tally.count(Outcome.REFUSED, Kind.PINNED) or tally.total(*SAFE) <= 50:  # noqa: ASYNC110 - nothing tells of a change
                    await asyncio.sleep(0.05)
        await ended(s)
        s.check(before)
        assert tally.count(Outcome.RIGHT, *SAFE) == tally.total(*SAFE), tally.unhappy


async def test_clients_that_vanish_leave_nothing_behind(tmp_path: Path, seed: str) -> None:
    async with scene(tmp_path, seed) as s:
        async with s.load().running():
            await asyncio.sleep(0.5)
        before = await s.quiet()
        async with s.load(workers=32, leaving=0.9).running() as tally:
            await asyncio.sleep(1.5)
        after = await s.quiet()
        s.check(before)
        assert tally.count(Outcome.LEFT, *Kind) > 100
        assert after.descriptors < before.descriptors + 64


async def test_both_sides_count_the_same(tmp_path: Path, seed: str) -> None:
    async with scene(tmp_path, seed, routing=LEAST, timeouts={"first_byte_s": 60}) as s:
        for node in s.fleet.nodes:
            await node.fault(kind="hang")
        async with s.load(kinds=SAFE, workers=30, limit=30).running():
            async with asyncio.timeout(60):
                while sum((await s.fleet.in_flight()).values()) < 30:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            await s.agree()
            await s.heal()
        await s.quiet()


async def test_nodes_that_fail_at_once_attract_nothing(tmp_path: Path, seed: str) -> None:
    at_once = Speed(load_s=0, decode_tps=float("inf"), tokens=(3, 6))
    async with scene(tmp_path, seed, speed=at_once, nodes=4) as s:
        before = await s.quiet()
        for name, status in (("n3", 503), ("n2", 500)):
            bad = s.fleet[name]
            asked = len(await bad.arrivals())
            await bad.fault(kind="status", status=status, message="the runner was told to fail")
            load = s.load(kinds=SAFE, limit=1000)
            await load.run()
            await bad.behave()
            tally = load.tally
            assert tally.count(Outcome.RIGHT, *SAFE) == 1000, tally.unhappy
            # Some kinds ask for other models, each of which has to be found out by itself.
            assert len(await bad.arrivals()) - asked <= 30
        await s.quiet()
        s.check(before)
