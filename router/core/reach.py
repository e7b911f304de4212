"""Which nodes those that wait may have: the first pool's, and with time those of the next ones."""

from collections.abc import Callable, Collection, Iterator, Sequence
from math import inf

import msgspec

from router.core import policy
from router.core.node import Node
from router.core.policy import Attempt, Eligible
from router.core.types import Reason, Rejected, Weighed


class Range(msgspec.Struct, frozen=True, eq=False):
    """What may be had by who has waited for `after_s`. `nodes`: what the scheduler shares out.
    `outright`: nodes where nobody waits for a turn; `reason`: why one of those is taken. `refused`:
    why there is nothing."""

    after_s: float
    nodes: Sequence[Node]
    outright: Sequence[Node] = ()
    reason: Reason = Reason.LATER_POOL
    refused: Rejected | None = None


def ranges(found: Eligible, met: Collection[str] = ()) -> Iterator[Range]:
    """One more for each pool that is spilled into: the earlier ones' nodes stay. Where nobody
    waits for a turn nobody goes any further. Nodes that have been `met` are the last resort."""
    one: Eligible | None = found
    nodes: Sequence[Node] = ()
    after_s, reason = 0.0, found.reason
    while one is not None:
        if not one.nodes[0].schedules:
            yield Range(after_s, nodes, policy.fresh(one.nodes, met), reason)
            return
        nodes = [*nodes, *one.nodes]
        yield Range(after_s, policy.fresh(nodes, met))
        after_s, one, reason = after_s + one.nodes[0].spill_s, one.then, Reason.LATER_POOL


class Reach:
    """What each of those that wait may have at one moment: worked out once for those that ask for
    the same. All that have waited for as many pools are given the very same list. `lost`: those
    that were looked at, and for whom there is nothing."""

    __slots__ = ("_eligible", "_known", "_last", "_now", "_since", "lost")

    def __init__(
        self, eligible: Callable[[Attempt], Eligible | Rejected],
        since: Callable[[Attempt, float], float], now: float,
    ) -> None:  # fmt: skip
        self._eligible = eligible
        self._since = since
        self._now = now
        self._known: dict[object, Sequence[Range]] = {}
        self._last: tuple[Attempt, Sequence[Range]] | None = None
        self.lost: dict[Attempt, Rejected] = {}

    def find(self, attempt: Attempt, found: Eligible) -> "Reach":
        """It is known already what this one may have."""
        self._last = attempt, (*ranges(found, attempt.met),)
        return self

    def __call__(self, attempt: Attempt) -> Sequence[Node]:
        """The nodes that the scheduler may give it."""
        known = self.of(attempt)
        if known[0].refused is not None:
            self.lost[attempt] = known[0].refused
        return known[0].nodes if len(known) == 1 else self.now(attempt).nodes

    def now(self, attempt: Attempt) -> Range:
        """What it may have, for as long as it has waited."""
        waited_s = self._now - self._since(attempt, self._now)
        return next(one for one in reversed(self.of(attempt)) if one.after_s <= waited_s)

    def of(self, attempt: Attempt) -> Sequence[Range]:
        """All that it may have, sooner or later."""
        if self._last is not None and self._last[0] is attempt:
            return self._last[1]
        target = attempt.target
        model = None if target.model is None else target.model.key
        same = (
            model, target.pin, target.scope, target.bounds, frozenset(attempt.tried),
            frozenset(attempt.met), attempt.digest,
        )  # fmt: skip
        known = self._known.get(same)
        if known is None:
            found = self._eligible(attempt)
            known = self._known[same] = (
                (Range(0.0, (), refused=found),)
                if isinstance(found, Rejected)
                else (*ranges(found, attempt.met),)
            )
        self._last = attempt, known
        return known

    def spilled(self, attempt: Attempt, node: Node) -> bool:
        """Whether this node of a later pool is had only for having waited."""
        known = self.of(attempt)
        return len(known) > 1 and node not in known[0].nodes

    def spills_s(self, attempt: Attempt) -> float:
        """For how long it waits for the first pool alone."""
        known = self.of(attempt)
        return known[1].after_s if len(known) > 1 else inf

    def later(self, attempt: Attempt) -> Iterator[Weighed]:
        """The nodes of later pools, with how long it waits before it may have them."""
        known = self.of(attempt)
        before = {*known[0].nodes}
        for reach in known[1:]:
            nodes = [node for node in (*reach.nodes, *reach.outright) if node not in before]
            before.update(nodes)
            for node in nodes:
                barred = f"of a later pool: may be had after {reach.after_s:g} s"
                yield Weighed(node.spec, barred, later=True)
