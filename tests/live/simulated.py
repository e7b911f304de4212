"""Two simulated nodes, and a router in front of them."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

from router.sim import SimSpec
from tests.live.target import Target
from tests.rig import MODEL, model, rig

EMBEDDER = "nomic-embed-text:latest"
SLOW = "slow:8b"


def _spec() -> SimSpec:
    # A token of `SLOW` takes 20 ms, and its answers are as long as a request lets them be.
    models = (model(), model(EMBEDDER, embedding=True), model(SLOW, decode_tps=50.0))
    return SimSpec(models=models, answer_tokens=(2000, 2000), check_host=True)


@contextlib.asynccontextmanager
async def simulated(*, routed: bool) -> AsyncIterator[Target]:
    """The router over two nodes, or the first of them."""
    async with rig(_spec(), _spec()) as r:
        node = Target(r.nodes[0].url, MODEL, EMBEDDER, SLOW, (0, 33, 0))
        yield replace(node, url=r.url, names=("n1", "n2"), rig=r) if routed else node
