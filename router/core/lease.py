"""What becomes of an attempt: it is leased to a node, waits for one, or has waited in vain."""

from collections.abc import Sequence

import msgspec

from router.core.policy import Attempt
from router.core.types import Flip, NodeSpec, Reason, Rejected


class Lease(msgspec.Struct, frozen=True, eq=False):
    """The right to have `attempt` in flight on `node`. `place`: its number in the line for the
    model there, where slots are learned; `expected_s`: when the answer is expected to begin."""

    attempt: Attempt
    node: NodeSpec
    reason: Reason
    flips: Sequence[Flip] = ()
    place: int = 0
    expected_s: float | None = None


class Queued(msgspec.Struct, frozen=True, eq=False):
    """`attempt` waits for a node: `granted` will tell of it, unless it leaves. `expected_s`: for
    how long, as far as can be told now."""

    attempt: Attempt
    expected_s: float


class Lost(msgspec.Struct, frozen=True, eq=False):
    """`attempt` has waited in vain: what it needs is gone. It is told what one who came now
    would be."""

    attempt: Attempt
    rejected: Rejected


class Warming(msgspec.Struct, frozen=True, eq=False):
    """A model that a node is to be asked for so that it stays in memory, or gets there (`loads`).
    `name`: as the node spells it; `num_ctx`: the context that it has there, where that is told."""

    lease: Lease
    key: str
    name: str
    loads: bool
    num_ctx: int | None = None
