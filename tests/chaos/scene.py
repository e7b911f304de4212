"""A router process in front of node processes, and what must hold for it at every quiet moment."""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.chaos.fleet import Fleet, Node, Speed, fleet
from tests.chaos.link import Link, Mode, linked
from tests.chaos.load import Load, Tally, told
from tests.chaos.orders import Catalog
from tests.process import Router, started, write

# Quick to notice, so that much fits into a few seconds; and a client that no longer waits has
# been given up by the router before.
SECTIONS: Mapping[str, Any] = {
    "probe": {
        "interval_s": 0.5, "suspect_interval_s": 0.2, "timeout_s": 0.5,
        "ps_interval_s": 1, "tags_interval_s": 1,
    },
    "timeouts": {"connect_s": 1, "first_byte_s": 4, "between_records_s": 2},
}  # fmt: skip
_QUIET_S = 30.0
_GRACE_S = 0.5  # what had its lease before may still be on its way
_MB = 1 << 20


@dataclass(frozen=True)
class Footprint:
    """What the router's process holds: open descriptors, and memory."""

    descriptors: int
    rss_bytes: int


def footprint(pid: int) -> Footprint:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Footprint(len(os.listdir(f"/proc/{pid}/fd")), pages * os.sysconf("SC_PAGE_SIZE"))


@dataclass
class Scene:
    """The router, its nodes, and the links between them by the names of the nodes."""

    seed: str
    fleet: Fleet
    links: Mapping[str, Link]
    router: Router
    entries: Mapping[str, Mapping[str, Any]]
    sections: Mapping[str, Any]
    catalog: Catalog
    tallies: list[Tally] = field(default_factory=list)
    away: set[str] = field(default_factory=set)  # nodes that were taken out
    _file: asyncio.Lock = field(default_factory=asyncio.Lock)

    def load(self, **settings: Any) -> Load:
        """A load on this router; all of its promises are checked when the scene ends."""
        made = Load(self.router.url, f"{self.seed}.{len(self.tallies)}", self.catalog, **settings)
        self.tallies.append(made.tally)
        return made

    async def reload(self, **sections: Any) -> None:
        """Put a configuration into force with all nodes but those that are away."""
        nodes = [entry for name, entry in self.entries.items() if name not in self.away]
        async with self._file:
            write(self.router.path, {**self.sections, **sections, "nodes": nodes})
            status, answer = await self.router.reload()
            assert status == 200, answer

    @contextlib.asynccontextmanager
    async def without(self, name: str) -> AsyncIterator[None]:
        """Take a node out while the block runs: it gets nothing in that time."""
        self.away.add(name)
        await self.reload()
        async with self.without_new(self.fleet[name]):
            yield
        self.away.discard(name)
        await self.reload()

    @contextlib.asynccontextmanager
    async def drained(self, name: str) -> AsyncIterator[None]:
        """Drain a node while the block runs: it gets nothing new in that time."""
        await self._tell(f"/drain?node={name}")
        async with self.without_new(self.fleet[name]):
            yield
        await self._tell(f"/undrain?node={name}")

    async def break_file(self) -> None:
        """Save a broken file: what is in force stays."""
        async with self._file:
            write(self.router.path, b"nodes: [nonsense")
            assert (await self.router.reload())[0] == 422

    async def _tell(self, path: str) -> None:
        async with self.router.session.post(f"{self.router.admin}{path}") as answer:
            assert answer.status == 200, await answer.text()

    async def heal(self) -> None:
        """Undo all harm, and wait until the router sees all nodes up."""
        for link in self.links.values():
            link.set(Mode.OPEN)
            link.cuts.clear()
        await self.fleet.heal()
        async with asyncio.timeout(_QUIET_S):
            await self.all_up()

    async def all_up(self) -> None:
        """Wait until the router sees all nodes up."""
        await self.router.until(lambda shown: all(node["state"] == "up" for node in shown["nodes"]))

    async def quiet(self) -> Footprint:
        """Wait until nothing runs: the router's count and those of all nodes are zero."""
        counts: object = None
        try:
            async with asyncio.timeout(_QUIET_S):
                while any((counts := await self._in_flight()).values()):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"{_QUIET_S} s after the last request: {counts}") from None
        return footprint(self.router.process.pid)

    async def agree(self) -> None:
        """What the router counts on each node is what the node counts."""
        shown = await self.router.status()
        ours = {node["name"]: node["in_flight"] for node in shown["nodes"]}
        assert ours == await self.fleet.in_flight()
        assert shown["in_flight"] == sum(ours.values())

    async def _in_flight(self) -> Mapping[str, int]:
        shown = await self.router.status()
        counts = {f"{node['name']} in the router": node["in_flight"] for node in shown["nodes"]}
        return {"router": shown["in_flight"], **counts, **await self.fleet.in_flight()}

    @contextlib.asynccontextmanager
    async def without_new(self, node: Node, *, trials: int = 0) -> AsyncIterator[None]:
        """No request may be sent to the node while the block runs, but for so many trials, and
        for what had its lease when it began."""
        begun = time.monotonic() + _GRACE_S
        yield
        late = [at - begun for at in await node.arrivals() if at > begun]
        assert len(late) <= trials, (
            f"{node.name} got {len(late)} requests, e.g. after {late[0]:.2f} s"
        )

    def total(self) -> Tally:
        """What all loads have come to."""
        total = Tally()
        for tally in self.tallies:
            total.merge(tally)
        return total

    def violations(self) -> Sequence[str]:
        return [one for tally in self.tallies for one in tally.violations]

    def check(self, harmless: Footprint, *, clients: int = 64) -> None:
        """All promises were kept, and nothing has grown since `harmless`, but for connections
        that are kept to nodes."""
        assert not self.violations(), self.told()
        now = footprint(self.router.process.pid)
        kept = 64 * len(self.fleet.nodes) + clients
        assert now.descriptors <= harmless.descriptors + kept, f"{harmless} → {now}"
        assert now.rss_bytes <= harmless.rss_bytes + 48 * _MB, f"{harmless} → {now}"

    def told(self) -> str:
        """The first promises that were broken, with what the router has logged of them."""
        lines = list(self.violations()[:10])
        numbers = {line.split(" ")[0] for line in lines}
        logged = [
            line
            for line in self.router.process.log
            if line.get("id") in numbers or "exception" in line
        ]
        return "\n".join(
            [f"seed {self.seed}", *lines, *map(json.dumps, logged), told(self.total())]
        )


@contextlib.asynccontextmanager
async def scene(
    folder: Path,
    seed: str,
    *,
    nodes: int = 3,
    speed: Speed | None = None,
    links: bool = False,
    capped: float = 0.2,
    **sections: Any,
) -> AsyncIterator[Scene]:
    """Start nodes n1, n2, … and a router before them, with links between them if wanted; at the
    end the router must stop as it should. Tells the seed of what fails."""
    speed = speed or Speed()
    settings = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", **SECTIONS, **sections}
    path = folder / "router.yaml"
    try:
        async with contextlib.AsyncExitStack() as stack:
            made = await stack.enter_async_context(fleet(nodes, speed))
            laid = {
                node.name: await stack.enter_async_context(linked(node))
                for node in made.nodes
                if links
            }
            entries = {
                node.name: {
                    "name": node.name,
                    "url": laid[node.name].url if links else node.url,
                    "slots": speed.slots,
                }
                for node in made.nodes
            }
            write(path, {**settings, "nodes": list(entries.values())})
            router = await stack.enter_async_context(_serving(path))
            catalog = Catalog(speed.tokens, tuple(entries), capped)
            yield Scene(seed, made, laid, router, entries, settings, catalog)
    except BaseException:
        sys.stderr.write(f"\nchaos: to see this again, set OLLAMUX_CHAOS_SEED={seed}\n")
        raise


@contextlib.asynccontextmanager
async def _serving(path: Path) -> AsyncIterator[Router]:
    """Like `tests.process.serving`, for as long as it takes."""
    async with (
        started("serve", "--config", str(path)) as process,
        aiohttp.ClientSession() as session,
    ):
        async with asyncio.timeout(60):
            line = await process.logged("listening")
            await process.logged("ready")
        router = Router(process, path, session, line["clients"][0], line["admin"][0])
        yield router
        assert process.running, f"the router has ended:\n{process.text[-3000:]}"
        async with asyncio.timeout(60):
            assert await router.stop() == 0
        assert "Traceback" not in process.text, process.text
        unexpected = [line for line in process.log if "exception" in line]
        assert not unexpected, json.dumps(unexpected[0])
