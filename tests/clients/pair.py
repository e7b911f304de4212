"""One simulated node, and a router whose two nodes together are the same as that one."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from router.sim import SimNode
from tests.rig import MODEL, model, rig, spec

EMBED = "nomic-embed-text"
# What the models' files say of their age, in each spelling that a client may show.
CHANGED = (datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC))
DATES = (
    *CHANGED,
    *(int(one.timestamp()) for one in CHANGED),
    *(f"{one:%Y-%m-%dT%H:%M:%S}Z" for one in CHANGED),
)

_CHAT = model(modified_at=CHANGED[0])
_EMBED = model(EMBED, embedding=True, context_length=2048, modified_at=CHANGED[1])
WHOLE = spec(_CHAT, _EMBED, warm=(MODEL, EMBED))


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[str, str]]:
    """The address of the node and that of the router."""
    async with (
        SimNode(WHOLE) as node,
        rig(spec(_CHAT, warm=(MODEL,)), spec(_EMBED, _CHAT, warm=(EMBED,))) as r,
    ):
        yield node.url, r.url
