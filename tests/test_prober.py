"""Probes: what they ask, what they make of the answers, and one task per node."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

from router.core.dialect import VIA
from router.core.pool import Pool
from router.core.types import Health
from router.prober import Prober, Settings
from router.sim import Fault, FaultKind
from tests.rig import MODEL, Peer, Rig, model, parsed, rig, scripted, spec

K = FaultKind
ALL = ("version", "tags", "ps")


def health(r: Rig) -> list[Health]:
    return [node.health for node in r.app.pool.registry.snapshot()]


def paths(r: Rig, index: int = 0) -> list[str]:
    return [seen.raw_path for seen in r.nodes[index].seen]


def flips(r: Rig) -> list[tuple[str, str, str]]:
    return [
        (line["level"], line["event"], line["reason"])
        for line in r.lines
        if line["event"].startswith("node ")
    ]


async def test_a_look_learns_version_models_and_residents() -> None:
    async with rig(spec(model(), model("phi"), warm=(MODEL,), version="0.31.2")) as r:
        (node,) = r.app.pool.registry.snapshot()
        assert (node.version, node.health, node.detail) == ("0.31.2", Health.UP, "answers")
        assert sorted(node.present) == [MODEL, "phi:latest"]
        assert list(node.resident) == [MODEL]
        assert node.resident[MODEL].entry["context_length"] == 4096
        assert node.present[MODEL].digest == r.nodes[0].spec.models[0].digest
        assert sorted(paths(r)) == ["/api/ps", "/api/tags", "/api/version"]
        assert all(seen.header(VIA) == r.app.prober.instance for seen in r.nodes[0].seen)


async def test_only_what_is_asked_is_changed() -> None:
    async with rig() as r:
        (node,) = r.app.pool.registry.specs()
        r.nodes[0].fault = Fault(K.STATUS, path="/api/tags", status=500)
        assert await r.app.prober.look(node, ("tags",)) == set()
        assert health(r) == [Health.UP]
        assert list(r.app.pool.registry.snapshot()[0].present) == [MODEL]
        assert paths(r)[3:] == ["/api/tags"]


@pytest.mark.parametrize(
    ("fault", "detail"),
    [
        (Fault(K.STATUS, status=500), "status 500 to a probe"),
        (Fault(K.STATUS, status=508), "its url leads back to this router"),
        (Fault(K.STATUS, status=200, body="[]"), "the answer to a probe is not a JSON object"),
        (Fault(K.STATUS, status=200, body="<p>"), "the answer to a probe is not a JSON object"),
        (Fault(K.STATUS, status=200, body="[" * 200_000),
         "the answer to a probe is not a JSON object"),
        (Fault(K.GARBAGE), "not HTTP"),
        (Fault(K.HANG), "no answer to /api/version within 0.1 s"),
    ],
)  # fmt: skip
async def test_three_bad_answers_take_a_node_down_and_two_good_ones_bring_it_back(
    fault: Fault, detail: str
) -> None:
    async with rig(probe={"timeout_s": 0.1 if fault.kind is K.HANG else 10}) as r:
        (node,) = r.app.pool.registry.specs()
        r.nodes[0].fault = replace(fault, path="/api/version")
        for expected in (Health.UP, Health.UP, Health.DOWN, Health.DOWN):
            assert await r.app.prober.look(node, ("version",)) == set()
            assert health(r) == [expected]
        assert r.app.pool.registry.snapshot()[0].detail.startswith(detail)
        r.nodes[0].fault = None
        for expected in (Health.DOWN, Health.UP):
            await r.app.prober.look(node, ("version",))
            assert health(r) == [expected]
        first, down, up = flips(r)
        assert first == up == ("info", "node up", "answers")
        assert down[:2] == ("warning", "node down")
        assert down[2].startswith(detail)
        told = [line for line in r.lines if line["event"] == "no node is up"]
        assert len(told) == 1
        metrics = await r.metrics()
        assert 'ollamux_node_probe_failures_total{node="n1",probe="version"} 4.0' in metrics
        assert 'ollamux_node_probe_failures_total{node="n1",probe="ps"} 0.0' in metrics


@pytest.mark.parametrize("up_after", [1, 3])
async def test_a_refused_connection_counts_at_once(up_after: int) -> None:
    async with rig(probe={"up_after": up_after}) as r:
        await r.nodes[0].refuse()
        await r.look()
        assert health(r) == [Health.DOWN]
        await r.nodes[0].accept()
        for n in range(up_after):
            await r.look()
            assert health(r) == [Health.UP if n + 1 == up_after else Health.DOWN]


async def test_the_first_probe_decides_alone() -> None:
    tags: Mapping[bytes, Any] = {
        b"/api/version": b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n",
        b"/api/tags": {"models": []},
        b"/api/ps": {"models": []},
    }

    async def script(peer: Peer) -> None:
        raise AssertionError

    async with scripted(script, tags) as url, rig(spec(), spec(), entries=[{"url": url}]) as r:
        assert health(r) == [Health.DOWN, Health.UP]


async def test_a_node_that_is_slow_to_list_is_not_down() -> None:
    async with rig(probe={"timeout_s": 0.02}) as r:
        (node,) = r.app.pool.registry.specs()
        r.nodes[0].faults.add(Fault(K.HANG, path="/api/tags"))
        r.nodes[0].faults.add(Fault(K.HANG, path="/api/ps"))
        for _ in range(4):
            assert await r.app.prober.look(node, ALL) <= {"version"}
        assert list(r.app.pool.registry.snapshot()[0].present) == [MODEL]


async def test_an_answer_that_never_ends_is_given_up() -> None:
    megabyte = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        with suppress(ConnectionError):
            while True:
                writer.write(megabyte)
                await writer.drain()

    server = await asyncio.start_server(endless, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, rig(probe={"timeout_s": 15}) as r:
        r.app.reconfigure(parsed({**r.settings, "nodes": [url]}))
        (node,) = r.app.pool.registry.specs()
        assert await r.app.prober.look(node, ("version",)) == set()
        assert r.app.pool.registry.snapshot()[0].detail == "an answer too large for a probe"


async def test_a_connection_that_went_stale_says_nothing_about_the_node() -> None:
    async with rig() as r:
        r.nodes[0].drop_connections()
        await r.look()
        r.nodes[0].fault = Fault(K.DIE, path="*", times=1)
        await r.look()
        assert health(r) == [Health.UP]
        assert len(flips(r)) == 1


@pytest.mark.parametrize(
    "tags",
    [
        {"models": None},
        {},
        {"models": "many"},
        {"models": [7, {"name": "a b"}, {}, {"model": MODEL}]},
    ],
)
async def test_odd_lists_are_read_as_far_as_they_can_be(tags: Mapping[str, Any]) -> None:
    probed: Mapping[bytes, Any] = {
        b"/api/version": {"version": "0.33.0"},
        b"/api/tags": tags,
        b"/api/ps": {"models": [{"name": "PHI", "digest": 5}]},
    }

    async def script(peer: Peer) -> None:
        raise AssertionError

    async with scripted(script, probed) as url, rig(entries=[{"url": url}]) as r:
        (node,) = r.app.pool.registry.snapshot()
        assert (node.up, node.version, dict(node.present)) == (True, "0.33.0", {})
        assert node.resident["phi:latest"].digest == "5"


# One task per node


@asynccontextmanager
async def running(prober: Prober) -> AsyncIterator[None]:
    """The prober at work, as in a daemon."""
    task = asyncio.create_task(prober.run())
    try:
        yield
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


FAST = {"interval_s": 0.002, "ps_interval_s": 0.004, "tags_interval_s": 0.006,
        "suspect_interval_s": 0.001}  # fmt: skip


async def test_every_node_is_probed_again_and_again() -> None:
    async with rig(spec(), spec(), probe=FAST) as r, running(r.app.prober):
        for node in r.nodes:
            for path in ("/api/version", "/api/tags", "/api/ps"):
                await node.until(lambda node=node, path=path: len(node.calls(path)) > 4)  # type: ignore[misc]


async def test_the_first_round_ends_whatever_it_finds() -> None:
    async with rig(spec(), spec()) as r:
        await r.nodes[1].stop()
        pool = Pool(r.app.config.topology, 0.0)
        looked = asyncio.Event()
        prober = replace(r.app.prober, pool=pool, looked=looked, _tasks={})
        assert not pool.registry.probed
        async with running(prober):
            await looked.wait()
            assert [node.health for node in pool.registry.snapshot()] == [Health.UP, Health.DOWN]


async def test_nodes_that_come_are_probed_and_those_that_go_are_not() -> None:
    async with rig(spec(), spec(), probe=FAST) as r, running(r.app.prober):
        entries = r.settings["nodes"]
        await r.nodes[1].until(lambda: len(r.nodes[1].seen) > 3)
        r.app.reconfigure(parsed({**r.settings, "nodes": entries[:1]}))
        await r.until(lambda: len(r.app.prober._tasks) == 1)
        count = len(r.nodes[1].seen)
        await r.nodes[0].until(lambda: len(r.nodes[0].seen) > 30)
        assert len(r.nodes[1].seen) <= count + 1, "one may have been on its way"
        r.app.reconfigure(parsed(r.settings))
        await r.nodes[1].until(lambda: len(r.nodes[1].seen) > count + 3)


async def test_a_node_with_another_header_is_probed_with_it() -> None:
    async with rig(probe={"interval_s": 1000, "tags_interval_s": 1000}) as r, running(r.app.prober):
        await r.nodes[0].until(lambda: len(r.nodes[0].seen) > 3)
        entry = {**r.settings["nodes"][0], "headers": {"X-Key": "2"}}
        r.app.reconfigure(parsed({**r.settings, "nodes": [entry]}))
        await r.nodes[0].until(lambda: r.nodes[0].seen[-1].header("X-Key") == "2")


async def test_other_intervals_hold_at_once() -> None:
    slow = dict.fromkeys(FAST, 1000)
    async with rig(probe=slow) as r, running(r.app.prober):
        await r.nodes[0].until(lambda: len(r.nodes[0].calls("/api/version")) == 2)
        r.app.reconfigure(parsed({**r.settings, "probe": FAST}))
        await r.nodes[0].until(lambda: len(r.nodes[0].calls("/api/version")) > 9)


async def test_a_request_may_ask_for_a_probe_at_once_but_not_for_any_number_of_them() -> None:
    slow = dict.fromkeys(FAST, 1000)
    async with rig(probe=slow) as r, running(r.app.prober):
        node, prober = r.nodes[0], r.app.prober
        await node.until(lambda: len(node.calls("/api/ps")) == 1)
        await r.app.prober.looked.wait()
        before, began = len(node.calls("/api/tags")), time.monotonic()
        for _ in range(300):
            prober.hurry(node.url, "tags")
            prober.hurry("http://gone:11434", "tags")
            await asyncio.sleep(0.002)
        most = 2 + (time.monotonic() - began) / 0.5
        assert 1 <= len(node.calls("/api/tags")) - before <= most
        # none is forgotten
        before = len(node.calls("/api/tags"))
        prober.hurry(node.url, "tags")
        await node.until(lambda: len(node.calls("/api/tags")) > before)


async def test_a_node_that_is_not_up_is_asked_for_everything() -> None:
    """It must not come up with models that nobody has listed."""
    settings = {**FAST, "tags_interval_s": 1000, "ps_interval_s": 1000}
    async with rig(probe=settings) as r:
        await r.nodes[0].refuse()
        await r.look()
        async with running(r.app.prober):
            await r.nodes[0].accept()
            await r.until(lambda: health(r) == [Health.UP])
            assert len(r.nodes[0].calls("/api/tags")) >= 3
            count = len(r.nodes[0].calls("/api/tags"))
            at = len(r.nodes[0].calls("/api/version"))
            await r.nodes[0].until(lambda: len(r.nodes[0].calls("/api/version")) > at + 9)
            assert len(r.nodes[0].calls("/api/tags")) <= count + 1


def test_each_question_has_its_own_interval() -> None:
    settings = Settings(timeout_s=1, interval_s=2, suspect_s=3, ps_s=4, tags_s=5, jitter=0.5)
    assert [settings.every(what) for what in ALL] == [2, 5, 4]


async def test_intervals_vary_by_the_jitter() -> None:
    async with rig(probe={"jitter": 0.5}) as r:
        rolls = itertools.cycle([0.0, 0.5, 1.0])
        r.app.prober.roll = lambda: next(rolls)
        assert [r.app.prober._varied() for _ in range(3)] == [0.5, 1.0, 1.5]
