"""python -m tests.chaos.soak: everything at once, at random, until the time is up.

Prints what was done how often and what requests came to. Exit code 1 if a promise was broken, with
the seed that shows it again: the same deeds in the same order, at nearly the same times.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from tests.chaos.deeds import ALONE, DEEDS
from tests.chaos.load import told
from tests.chaos.scene import Footprint, Scene, scene

_NODES = 4
_ROUNDS = 8  # between two quiet moments
_LOGGED_S = 600  # a longer run would fill the memory with lines about requests
_TIMEOUTS = {"connect_s": 0.5, "first_byte_s": 8, "between_records_s": 1.5, "silent_down_s": 1}


@dataclass
class Soak:
    """One run: what was done, and what the router held at each quiet moment."""

    scene: Scene
    dice: random.Random
    single: bool = False  # one deed at a time, and a while to recover
    done: Counter[str] = field(default_factory=Counter)
    footprints: list[Footprint] = field(default_factory=list)

    async def run(self, seconds: float) -> None:
        """Raises AssertionError as soon as a promise is broken."""
        until = time.monotonic() + seconds
        self.footprints.append(await self.scene.quiet())
        while time.monotonic() < until:
            load = self.scene.load(workers=self.dice.choice((8, 16, 24)), leaving=0.15)
            async with load.running():
                for _ in range(_ROUNDS):
                    await self._round()
                    assert not load.tally.violations, self.scene.told()
            await self.scene.heal()
            self.footprints.append(await self.scene.quiet())
            self.scene.check(self.footprints[min(1, len(self.footprints) - 1)])

    async def _round(self) -> None:
        """One deed, or several at once to different nodes; then a moment without."""
        many = 1 if self.single else self.dice.choice((1, 1, 2, 3))
        names = self.dice.sample(sorted(self.scene.entries), many)
        if not self.single and self.dice.random() < 0.05:
            deeds, names = dict(ALONE), names[:1]
        else:
            deeds = dict(DEEDS)
        async with asyncio.TaskGroup() as group:
            for name in names:
                what = self.dice.choice(sorted(deeds))
                self.done[what] += 1
                own = random.Random(self.dice.random())  # what runs beside it takes no dice from it
                group.create_task(deeds[what](self.scene, name, own))
        await asyncio.sleep(3 if self.single else self.dice.uniform(0, 0.5))

    def table(self) -> str:
        """What was done and what it came to."""
        total = self.scene.total()
        done = [f"{what:<34} {count:>6}" for what, count in sorted(self.done.items())]
        first, last = self.footprints[0], self.footprints[-1]
        held = (
            f"descriptors {first.descriptors} → {last.descriptors}, memory "
            f"{first.rss_bytes >> 20} → {last.rss_bytes >> 20} MiB, "
            f"{len(self.footprints)} quiet moments"
        )
        waits = f"longest wait: first byte {total.first_s:.2f} s, in a stream {total.gap_s:.2f} s"
        return "\n".join([*done, "", told(total), "", waits, held])


async def _soak(seed: str, seconds: float, *, single: bool) -> int:
    broken = await _broken(_in_scene(seed, seconds, single=single))
    if broken:
        _say(f"\nBROKEN with SEED={seed}:\n{broken}")
        return 1
    _say(f"\nno promise broken in {seconds:.0f} s with SEED={seed}")
    return 0


async def _in_scene(seed: str, seconds: float, *, single: bool) -> None:
    log = {"requests": seconds <= _LOGGED_S}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with scene(folder, seed, nodes=_NODES, links=True, timeouts=_TIMEOUTS, log=log) as s:
            soak = Soak(s, random.Random(seed), single)
            try:
                await soak.run(seconds)
            finally:
                _say(soak.table())


async def _broken(run: Awaitable[None]) -> str:
    """Which promise a run has broken; empty for none."""
    try:
        await run
    except (AssertionError, BaseExceptionGroup) as error:
        return "\n".join(_reasons(error))
    return ""


def _reasons(error: BaseExceptionGroup[BaseException] | BaseException) -> list[str]:
    if isinstance(error, BaseExceptionGroup):
        return [reason for one in error.exceptions for reason in _reasons(one)]
    if not isinstance(error, AssertionError):
        raise error
    return [str(error)[:6000]]


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", default="")
    parser.add_argument("--single", action="store_true", help="one deed at a time")
    options = parser.parse_args()
    seed = options.seed or str(random.SystemRandom().randrange(10**6))
    _say(f"seed {seed}, {options.seconds:.0f} s")
    return uvloop.run(_soak(seed, options.seconds, single=options.single))


if __name__ == "__main__":
    sys.exit(main())
