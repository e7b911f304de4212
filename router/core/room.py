"""Room for those that wait long for what no node can load: one is made to free its memory."""

from collections.abc import Collection, Sequence
from math import inf

from router.core.memory import Loaded
from router.core.node import Node
from router.core.queue import Queue, Waiting
from router.core.score import Scores, name_of, names_of, need_bytes
from router.core.seat import Seat

_PATIENCE_S = 8.0  # then a node is made to make room
# Who has waited for so long cares for no more of those after it in turn than so many for each one
# that waits with it, and for none once so much of its time is over.
_LONG_S, _LATER, _LAST_SHARE = 30.0, 2, 0.5


class Room:
    """Which nodes make room, and for what. Only the scheduler asks for it."""

    __slots__ = ("_queue", "_scores")

    def __init__(self, queue: Queue, scores: Scores) -> None:
        self._queue = queue
        self._scores = scores

    def __repr__(self) -> str:
        wanted = {node: one.wanted for node, one in self._scores.memories.items() if one.wanted}
        return f"<Room {wanted}>"

    def release(self) -> None:
        """Nodes make no more room for what nobody waits for."""
        by_key = self._queue.by_key
        for node, memory in self._scores.memories.items():
            if not memory.wanted:
                continue
            keys = [key for key in by_key if node.runner(key) == memory.wanted]
            loaded = memory.loaded.get(memory.wanted)
            if loaded is None or loaded is memory.loading:
                needed = bool(keys)
            else:
                waiting = (one for key in keys for one in by_key[key])
                needed = any(loaded.differs(one.attempt.work) for one in waiting)
            if not needed:
                memory.release()

    @staticmethod
    def insist(one: Waiting, seat: Seat, now: float) -> None:
        """It waits until all have ended that use the model with another context. After some time
        no more of them begin."""
        memory, loaded = seat.memory, seat.loaded
        if loaded is None or now - one.since < _PATIENCE_S or memory.wanted:
            return
        if loaded.differs(one.attempt.work) and memory.loading is None:
            memory.reserve(loaded.key, [loaded])

    def reserve(self, one: Waiting, nodes: Sequence[Node], now: float) -> None:
        """No node can have it. After some time one makes room: where that costs all that wait the
        least, and those that wait for what has to go there no more than has been waited for this.
        """
        waited_s = now - one.since
        if waited_s < _PATIENCE_S:
            return
        if any(self._scores.memories[node].wanted == node.runner(one.key) for node in nodes):
            return
        best, least = None, inf
        for node in nodes:
            memory, runner = self._scores.memories[node], node.runner(one.key)
            if memory.wanted or memory.loading is not None or runner in memory.loaded:
                continue
            need = need_bytes(node, memory, one.key)
            victims = memory.victims(runner, need, busy=True) or ()
            own_s, others_s = self._room_s(one, node, victims, now)
            if own_s + others_s < least and others_s <= waited_s * self._waiting(one.key):
                best, least = (memory, runner, victims), own_s + others_s
        if best is not None:
            memory, runner, victims = best
            memory.reserve(runner, victims)

    def _room_s(
        self, one: Waiting, node: Node, victims: Collection[Loaded], now: float
    ) -> tuple[float, float]:
        """What it costs to make room for a model there, in seconds of all who wait: for it, and for
        what has to go, which is to be loaded again."""
        cost, key, later = self._scores.costs.of, one.key, self._later(one, now)
        ready_s = max((end for victim in victims for end in victim.ends(now)), default=0.0)
        ready_s += cost(node, key).load_s
        others_s = sum(
            min(self._scores.waiting(node, victim), self._sooner(node, victim, one) + later)
            * (ready_s + cost(node, name_of(node, victim)).load_s)
            for victim in victims
        )
        return self._waiting(key) * ready_s, others_s

    def _later(self, one: Waiting, now: float) -> float:
        """How many of those count whose turn comes later: there may be more of them all the time,
        so in the end it waits for twice as long as the change costs one of them."""
        waited_s = now - one.since
        if waited_s < _LONG_S:
            return inf
        if waited_s >= _LAST_SHARE * (one.attempt.work.deadline - one.since):
            return 0
        return _LATER * self._waiting(one.key)

    def _sooner(self, node: Node, victim: Loaded, one: Waiting) -> int:
        """How many of those that wait for what has to go come before it in turn."""
        return sum(self._queue.sooner(key, one) for key in names_of(node, victim))

    def _waiting(self, key: str) -> int:
        return len(self._queue.by_key.get(key, ()))
