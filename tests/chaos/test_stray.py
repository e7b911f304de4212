"""After the storm: no task and no lease is left in the router's process."""

import asyncio
import contextlib

import pytest

from router.sim import Fault, FaultKind
from tests.chaos.load import Load
from tests.chaos.orders import Catalog, Kind
from tests.rig import Rig, model, rig, spec

pytestmark = pytest.mark.chaos

_BOUNDS = (5, 20)
_NODE = spec(
    model(decode_tps=200), model("qwen2.5:0.5b", decode_tps=200), num_parallel=64,
    answer_tokens=_BOUNDS,
)  # fmt: skip
_KINDS = tuple(kind for kind in Kind if kind is not Kind.EMBED)
_FAULTS = (
    Fault(FaultKind.DIE, after=3),
    Fault(FaultKind.DIE, after=2, partial=True, reset=True),
    Fault(FaultKind.STALL, after=2),
    Fault(FaultKind.HANG),
    Fault(FaultKind.GARBAGE),
    Fault(FaultKind.STATUS, status=500, message="the runner was told to fail"),
)


async def storm(r: Rig, seed: str) -> Load:
    """Every fault once on every node, with clients that vanish at every stage."""
    load = Load(r.url, seed, Catalog(_BOUNDS, ("n1", "n2")), _KINDS, workers=16, leaving=0.4)
    async with load.running():
        for fault in _FAULTS:
            for node in r.nodes:
                node.fault = fault
                await asyncio.sleep(0.15)
                node.fault = None
                node.release()
    return load


async def test_no_task_is_left_after_every_fault(seed: str) -> None:
    timeouts = {"first_byte_s": 1, "between_records_s": 0.5}
    async with rig(_NODE, _NODE, timeouts=timeouts) as r:
        before = asyncio.all_tasks()
        load = await storm(r, seed)
        async with asyncio.timeout(60):
            await r.until(lambda: r.app.pool.in_flight == 0)
            for node in r.nodes:
                await node.until(lambda node=node: node.in_flight == 0)  # type: ignore[misc]
                node.drop_connections()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(30):
                    await r.until(lambda: asyncio.all_tasks() <= before)
        assert asyncio.all_tasks() <= before
        assert not load.tally.violations, load.tally.violations[:5]
