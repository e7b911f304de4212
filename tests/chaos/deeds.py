"""What is done to nodes, links, files and models: each deed harms for a while, and undoes it."""

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from tests.chaos.fleet import OTHER
from tests.chaos.link import Cut, Mode
from tests.chaos.scene import Scene

Deed = Callable[[Scene, str, random.Random], Coroutine[Any, Any, None]]


async def _for_a_while(dice: random.Random) -> None:
    await asyncio.sleep(dice.uniform(0.2, 2.0))


async def _kill(s: Scene, name: str, dice: random.Random) -> None:
    node = s.fleet[name]
    await node.kill()
    await _for_a_while(dice)
    await node.start()


async def _kill_all(s: Scene, _name: str, dice: random.Random) -> None:
    await asyncio.gather(*(node.kill() for node in s.fleet.nodes))
    await _for_a_while(dice)
    await asyncio.gather(*(node.start() for node in s.fleet.nodes))


async def _stop(s: Scene, name: str, dice: random.Random) -> None:
    node = s.fleet[name]
    node.stop()
    await _for_a_while(dice)
    node.go_on()


def _linked(mode: Mode) -> Deed:
    async def deed(s: Scene, name: str, dice: random.Random) -> None:
        link = s.links[name]
        link.set(mode)
        await _for_a_while(dice)
        link.set(Mode.OPEN)

    return deed


async def _cut(s: Scene, name: str, dice: random.Random) -> None:
    link = s.links[name]
    for _ in range(dice.randint(1, 5)):
        link.cuts.append(Cut(dice.randrange(3000), reset=dice.random() < 0.3))
    await _for_a_while(dice)
    link.cuts.clear()


def _faulty(**fields: object) -> Deed:
    async def deed(s: Scene, name: str, dice: random.Random) -> None:
        node = s.fleet[name]
        after = {"after": dice.randint(0, 8)} if fields["kind"] in ("die", "stall") else {}
        await node.fault(**fields, **after)
        await _for_a_while(dice)
        await node.behave()

    return deed


async def _delete(s: Scene, name: str, dice: random.Random) -> None:
    node = s.fleet[name]
    await node.delete(OTHER)
    await _for_a_while(dice)
    await node.restore(OTHER)


async def _take_out(s: Scene, name: str, dice: random.Random) -> None:
    async with s.without(name):
        await _for_a_while(dice)


async def _drain(s: Scene, name: str, dice: random.Random) -> None:
    async with s.drained(name):
        await _for_a_while(dice)


async def _break_file(s: Scene, _name: str, dice: random.Random) -> None:
    await s.break_file()
    await _for_a_while(dice)
    await s.reload()


_TOLD = "the runner was told to fail"
DEEDS: Mapping[str, Deed] = {
    "node killed, and back": _kill,
    "node stopped, and continued": _stop,
    "connections reset": _linked(Mode.RESET),
    "network is a black hole": _linked(Mode.HOLE),
    "network throttled": _linked(Mode.SLOW),
    "garbage for answers": _linked(Mode.GARBAGE),
    "answers cut at any byte": _cut,
    "node answers 500": _faulty(kind="status", status=500, message=_TOLD),
    "node answers 503": _faulty(kind="status", status=503, message=_TOLD),
    "no memory for one model": _faulty(kind="status", status=500, model=OTHER, message=_TOLD),
    "node hangs": _faulty(kind="hang"),
    "streams break": _faulty(kind="die"),
    "streams break inside a record": _faulty(kind="die", partial=True, reset=True),
    "streams stall": _faulty(kind="stall"),
    "node slow": _faulty(kind="slow", factor=5.0),
    "model deleted, and back": _delete,
    "node taken out by a reload": _take_out,
    "node drained": _drain,
    "broken file saved": _break_file,
}
# These touch every node, so nothing else is done meanwhile.
ALONE: Mapping[str, Deed] = {"all nodes killed at once": _kill_all}
