"""python -m tests.chaos.run: what ollamux promises of failing nodes, counted.

1. A steady load of 100 streams of three seconds each over four nodes, and requests that are not
   streamed beside it. One node is killed every five seconds, and back after three.
2. A node that answers 503 (then: 500) at once beside three good ones, 10,000 requests.

Prints a table for docs/reliability.md, with --json the figures. Exit code 1 if any is missed.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from tests.chaos.fleet import Node, Speed
from tests.chaos.load import Load, Tally
from tests.chaos.orders import SAFE, Kind
from tests.chaos.scene import Scene, scene
from tests.chaos.verdicts import Outcome

# What the product does by itself: no limit is made shorter for this.
_DEFAULTS: Mapping[str, Any] = {"probe": {}, "timeouts": {}}
_STREAM_S, _STREAM_TOKENS = 3.0, 30
_STREAMS, _WHOLE = 100, 10
_EVERY_S, _BACK_AFTER_S = 5.0, 3.0
_PROBE_S = 5.0  # the default interval
_LOOK_S = 0.02
_PLAIN = (Kind.CHAT, Kind.OPENAI)
_UNSTREAMED = (Kind.WHOLE, Kind.OPENAI_WHOLE, Kind.EMBED)


@dataclass(frozen=True)
class Figure:
    """One line of the table; `missed` if something else was promised."""

    name: str
    value: float | int | str
    promised: str = ""
    missed: bool = False


@dataclass
class Deaths:
    """When each node was killed, and when the router first showed that it knows."""

    scene: Scene
    killed: list[float] = field(default_factory=list)
    noticed_s: list[float] = field(default_factory=list)
    idle: int = 0  # that had nothing to do, and were back before anybody asked them
    _waiting: dict[str, float] = field(default_factory=dict)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(self._watch())
            yield
            watch.cancel()

    async def kill_in_turn(self, seconds: float) -> None:
        """One node every five seconds, back after three."""
        nodes = self.scene.fleet.nodes
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(1, int(seconds / _EVERY_S)):
                await asyncio.sleep(started + number * _EVERY_S - time.monotonic())
                group.create_task(self._kill(nodes[number % len(nodes)]))
        await asyncio.sleep(max(0.0, started + seconds - time.monotonic()))

    async def _kill(self, node: Node) -> None:
        busy = await self._at_work(node)
        now = time.monotonic()
        await node.kill()
        self.killed.append(now)
        self._waiting[node.name] = now
        await asyncio.sleep(_BACK_AFTER_S)
        await node.start()
        if self._waiting.pop(node.name, None) is not None:
            if busy:
                self.noticed_s.append(float("inf"))
            else:
                self.idle += 1

    async def _at_work(self, node: Node) -> bool:
        shown = (await self.scene.router.status())["nodes"]
        return any(one["name"] == node.name and one["in_flight"] for one in shown)

    async def _watch(self) -> None:
        while True:
            for shown in (await self.scene.router.status())["nodes"]:
                if shown["name"] in self._waiting and shown["state"] != "up":
                    self.noticed_s.append(time.monotonic() - self._waiting.pop(shown["name"]))
            await asyncio.sleep(_LOOK_S)


async def steady(folder: Path, seed: str, seconds: float) -> Sequence[Figure]:
    """The first run."""
    tokens = (_STREAM_TOKENS, _STREAM_TOKENS)
    speed = Speed(load_s=0, decode_tps=_STREAM_TOKENS / _STREAM_S, tokens=tokens, slots=128)
    async with scene(folder, seed, nodes=4, speed=speed, capped=0, **_DEFAULTS) as s:
        deaths = Deaths(s)
        streams = s.load(kinds=_PLAIN, workers=_STREAMS, patience_s=120)
        whole = s.load(kinds=_UNSTREAMED, workers=_WHOLE, patience_s=120)
        async with deaths.watched(), streams.running(), whole.running():
            await deaths.kill_in_turn(seconds)
        await s.quiet()
        continued = await _continuations(s)
        return [*_of_streams(streams), *_of_whole(whole), *continued, *_of_deaths(deaths)]


def _of_streams(load: Load) -> Sequence[Figure]:
    tally = load.tally
    begun, right = _begun(tally), tally.count(Outcome.RIGHT, *Kind)
    return [
        Figure("streams", begun),
        Figure("complete, text equal byte for byte", right, "all", missed=right != begun),
        Figure("told of an error", tally.count(Outcome.TOLD, *Kind)),
        Figure("refused", tally.count(Outcome.REFUSED, *Kind)),
        Figure("wrong, cut off or not answered", len(tally.violations)),
        Figure(
            "longest wait for a first byte, s", round(tally.first_s, 2), "60", tally.first_s > 60
        ),
        Figure("longest pause inside a stream, s", round(tally.gap_s, 2)),
        *_examples(tally),
    ]


def _of_whole(load: Load) -> Sequence[Figure]:
    tally = load.tally
    asked, right = _begun(tally), tally.count(Outcome.RIGHT, *Kind)
    return [
        Figure("requests that are not streamed", asked),
        Figure("answered 200, and rightly", right, "all", missed=right != asked),
        *_examples(tally),
    ]


def _examples(tally: Tally) -> Sequence[Figure]:
    return [Figure("for example", one) for one in (*tally.violations[:5], *tally.unhappy[:5])]


def _begun(tally: Tally) -> int:
    return sum(tally.outcomes.values())


async def _continuations(s: Scene) -> Sequence[Figure]:
    name = "ollamux_continuations_total"
    samples = await s.router.metrics()
    found = {key.removeprefix(name): int(n) for key, n in samples.items() if key.startswith(name)}
    return [Figure(f"continuations{labels}", count) for labels, count in found.items()]


def _of_deaths(deaths: Deaths) -> Sequence[Figure]:
    worst = max(deaths.noticed_s, default=0.0)
    middle = sorted(deaths.noticed_s)[len(deaths.noticed_s) // 2] if deaths.noticed_s else 0.0
    return [
        Figure("nodes killed", len(deaths.killed)),
        Figure("of them idle, and back before a probe", deaths.idle),
        Figure("until the pool knew, s: median", round(middle, 3)),
        Figure("until the pool knew, s: worst", round(worst, 3), f"{_PROBE_S:g}", worst > _PROBE_S),
    ]


async def failing(folder: Path, seed: str, status: int, requests: int) -> Sequence[Figure]:
    """The second run: `n3` answers `status` at once."""
    speed = Speed(load_s=0, decode_tps=float("inf"), tokens=(5, 10))
    async with scene(folder, seed, nodes=4, speed=speed, **_DEFAULTS) as s:
        bad = s.fleet["n3"]
        await bad.fault(kind="status", status=status, message="the node was told to fail")
        load = s.load(kinds=SAFE, limit=requests)
        began = time.monotonic()
        await load.run()
        took_s = time.monotonic() - began
        await s.quiet()
        got = len(await bad.arrivals())
    tally = load.tally
    lost = requests - tally.count(Outcome.RIGHT, *SAFE)
    share = got / requests
    return [
        Figure(f"requests beside a node that answers {status}", requests),
        Figure("seconds that they took", round(took_s, 1)),
        Figure("of them asked of that node", f"{got} ({share:.2%})", "1 %", share > 0.01),
        Figure("that a client saw fail", lost, "0", lost > 0),
        *_examples(tally),
    ]


async def _run(seed: str, options: argparse.Namespace) -> Sequence[Figure]:
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.only in ("", "steady"):
            figures += await steady(folder, seed, options.seconds)
        for status in (503, 500):
            if options.only in ("", str(status)):
                figures += await failing(folder, seed, status, options.requests)
    return figures


def _table(figures: Sequence[Figure]) -> str:
    rows = [
        f"| {one.name} | {one.value} | {one.promised} | {'**missed**' if one.missed else ''} |"
        for one in figures
    ]
    return "\n".join(["| | | promised | |", "|---|---|---|---|", *rows])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.run", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of the first run")
    parser.add_argument("--requests", type=int, default=10_000, help="of each second run")
    parser.add_argument("--only", choices=("steady", "503", "500"), default="")
    parser.add_argument("--seed", default="")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    seed = options.seed or str(random.SystemRandom().randrange(10**6))
    figures = uvloop.run(_run(seed, options))
    if options.json:
        told = [{"name": f.name, "value": f.value, "missed": f.missed} for f in figures]
        sys.stdout.write(json.dumps({"seed": seed, "figures": told}, indent=2) + "\n")
    else:
        sys.stdout.write(f"seed {seed}\n\n{_table(figures)}\n")
    return int(any(figure.missed for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
