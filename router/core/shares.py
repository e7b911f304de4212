"""How many of the slots one flow may have, while there are others."""

from math import ceil

from router.core.queue import Queue, Waiting
from router.core.score import Scores

_FLOW_SHARE = 0.7
_BACKLOG = 4  # a flow that has more of them waiting would take each slot that gets free


class Shares:
    """Who has its share already. What it counts is counted once in a pass."""

    __slots__ = ("_all", "_counts", "_queue", "_scores", "_weights")

    def __init__(self, queue: Queue, scores: Scores) -> None:
        self._queue = queue
        self._scores = scores
        self._counts: dict[str, tuple[int, int]] = {}  # slots: empty ones and all, by model
        self._weights: dict[str, float] = {}  # of flows that wait, by model
        self._all = -1  # slots of all models

    def __repr__(self) -> str:
        return f"<Shares of {len(self._queue.flows)} flows>"

    def begin(self) -> None:
        """Count anew."""
        self._counts.clear()
        self._weights.clear()
        self._all = -1

    def _count(self, key: str) -> tuple[int, int]:
        """How many slots nodes without anything in memory would have for a model, and how many it
        has with these."""
        found = self._counts.get(key)
        if found is None:
            empty = self._empty(key)
            found = self._counts[key] = empty, empty + self.slots(key)
        return found

    def _count_all(self) -> int:
        """How many slots what is in memory has."""
        if self._all < 0:
            self._all = sum([
                memory.slots(key, node.spec)
                for node, memory in self._scores.memories.items() for key in memory.loaded
            ])  # fmt: skip
        return self._all

    def slots(self, key: str) -> int:
        """How many requests for a model are served at once."""
        return sum(
            memory.slots(runner, node.spec) for node, memory in self._scores.memories.items()
            if (runner := node.runner(key)) in memory.loaded
        )  # fmt: skip

    def _empty(self, key: str) -> int:
        """How many requests nodes could serve at once that have nothing in memory yet."""
        return sum(
            1 if node.spec.auto else node.spec.slots
            for node, memory in self._scores.memories.items()
            if not memory.loaded and node.open and key in node.present
        )  # fmt: skip

    def may(self, one: Waiting, waiting: int = 0) -> bool:
        """Whether its flow has not got its share of the slots already, of all and of those for
        the model. Nodes that have nothing in memory count as slots, too. `waiting`: how many of the
        flow are to be thought to wait, if not those that do."""
        flow = one.flow
        waiting = waiting or flow.waiting
        if len(self._queue.flows) < 2 or (not flow.leases and waiting <= _BACKLOG):
            return True
        share = self._share
        empty, mine = self._count(one.key)
        held = flow.held.get(one.key, 0)
        if held and waiting > max(mine, _BACKLOG) and held >= self.part(one, mine):
            return False
        return flow.leases < max(1, share * (empty + self._count_all()))

    def part(self, one: Waiting, slots: int) -> int:
        """How many of a model's slots a flow with a backlog may have: as many as the others that
        wait for it, and never more than its share."""
        own, key, queue = one.flow.weight, one.key, self._queue
        all_ = self._weights.get(key)
        if all_ is None:
            all_ = self._weights[key] = queue.weight(key)
        part = own / (all_ if queue.shares(one) else all_ + own)
        return max(1, min(int(self._share * slots), ceil(part * slots)))

    @property
    def _share(self) -> float:
        """How much one flow may have of the slots."""
        return max(_FLOW_SHARE, 1 / len(self._queue.flows))
