"""A case on real sockets: the requests of the virtual run, through a router's own process."""

import asyncio
import sys
import time
from collections.abc import Sequence

from bench.routing.experiment import Case, Figures, Sample, Served, figures, requests
from bench.routing.replay import listed, loads, replay
from bench.routing.stage import Contender, Setting, Stage, staged
from bench.routing.workload import Request


def measure(
    case: Case, seeds: Sequence[int], setting: Setting, other: Contender | None = None
) -> Figures:
    """All seeds of a case, one after the other."""
    return figures(case, [run(case, seed, setting, other) for seed in seeds])


def run(case: Case, seed: int, setting: Setting, other: Contender | None = None) -> Sample:
    """One run, told in seconds of the trace. What a decision takes cannot be seen from here."""
    asked = requests(case, seed)
    with staged(case, seed, setting, other) as stage:
        served, count = asyncio.run(_drive(stage, asked, setting.speed))
    return Sample(served, count, asked[-1].ask.at - asked[0].ask.at, len(asked), 0.0)


async def _drive(
    stage: Stage, asked: Sequence[Request], speed: float
) -> tuple[Sequence[Served], int]:
    await listed(stage.url, {one.ask.model for one in asked})
    before, began, mine = _cpu_s(stage), time.monotonic(), time.process_time()
    served = await replay(stage.url, asked, speed)
    took_s = time.monotonic() - began
    used = {name: cpu_s - before[name] for name, cpu_s in _cpu_s(stage).items()}
    used["client"] = time.process_time() - mine
    shares = ", ".join(f"{name} {cpu_s / took_s:.0%}" for name, cpu_s in used.items())
    print(f"{took_s:.0f} s; of a core: {shares}", file=sys.stderr)
    return served, await loads(stage.nodes)


def _cpu_s(stage: Stage) -> dict[str, float]:
    return {name: process.cpu_s() for name, process in stage.watched.items()}
