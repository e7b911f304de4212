"""One timer for the limits of all connections: each is cut at its own, and no other is."""

import asyncio
from math import inf
from typing import cast

import pytest

from router.sweep import Sweep
from router.wire import Connection


class Silent:
    """A connection as the sweep sees it; `said` is when it was last heard."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.limit_s = self.down_s = inf
        self.said = 0.0
        self.cut = asyncio.Event()

    def limit(self, limit_s: float, down_s: float = inf, *, down: bool = False) -> float:
        self.limit_s, self.down_s, self.said = limit_s, down_s, self.loop.time()
        return self.doubt(down=down)

    def doubt(self, *, down: bool) -> float:
        if down:
            self.limit_s = self.down_s
        return self.said + self.limit_s

    def overdue(self, now: float) -> float:
        due = self.said + self.limit_s
        if due > now:
            return due
        self.cut.set()
        return inf


class Group:
    def __init__(self, size: int) -> None:
        self.members = [Silent() for _ in range(size)]
        self.sweep = Sweep(cast(list[Connection], self.members))

    def limit(
        self, number: int, limit_s: float | None, down_s: float | None = None, *, down: bool = False
    ) -> None:
        self.sweep.limit(cast(Connection, self.members[number]), limit_s, down_s, down=down)

    def doubt(self, *numbers: int) -> None:
        members = [cast(Connection, self.members[number]) for number in numbers]
        self.sweep.doubt(members, down=True)


async def test_each_is_cut_at_its_own_limit_in_whatever_order_they_are_set() -> None:
    group = Group(3)
    group.limit(0, 0.03)
    group.limit(1, 0.01)
    group.limit(2, 3600)
    await group.members[1].cut.wait()
    await group.members[0].cut.wait()
    assert not group.members[2].cut.is_set()
    group.sweep.stop()


async def test_one_that_speaks_is_looked_at_again_later() -> None:
    group = Group(1)
    group.limit(0, 0.02)
    until = asyncio.get_running_loop().time() + 0.05
    while (now := asyncio.get_running_loop().time()) < until:
        group.members[0].said = now
        await asyncio.sleep(0)
    await group.members[0].cut.wait()
    assert asyncio.get_running_loop().time() >= until


async def test_without_a_limit_there_is_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(1)
    monkeypatch.setattr(asyncio.get_running_loop(), "call_at", None)
    group.limit(0, None)
    group.sweep.stop()
    assert not group.members[0].cut.is_set()


async def test_after_the_last_was_cut_a_new_limit_holds() -> None:
    group = Group(1)
    for _ in range(2):
        group.limit(0, 0.005)
        await group.members[0].cut.wait()
        group.members[0].cut.clear()


async def test_the_shorter_limit_of_a_node_that_is_down_rings_at_once() -> None:
    group = Group(3)
    group.limit(0, 3600, 0.01)
    group.limit(1, None, 0.01)
    group.limit(2, 3600, 0.01)
    group.doubt(0, 1)
    await group.members[0].cut.wait()
    await group.members[1].cut.wait()
    assert not group.members[2].cut.is_set()
    group.limit(2, None, 0.01, down=True)
    await group.members[2].cut.wait()
    group.sweep.stop()


async def test_doubt_of_a_node_without_connections_or_limits_sets_no_timer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = Group(1)
    monkeypatch.setattr(asyncio.get_running_loop(), "call_at", None)
    group.doubt()
    group.limit(0, None)
    group.doubt(0)
    assert not group.members[0].cut.is_set()
