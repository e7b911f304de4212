"""A node, and a client session on it."""

from collections.abc import AsyncIterator

import aiohttp
import pytest

from router.sim import SimNode
from tests.sim.nodes import SPEC


@pytest.fixture
async def node() -> AsyncIterator[SimNode]:
    async with SimNode(SPEC) as node:
        yield node


@pytest.fixture
async def web(node: SimNode) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(node.url) as session:
        yield session
