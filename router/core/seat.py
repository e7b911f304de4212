"""One model on one node as a pass sees it, and what it would cost a request."""

from collections.abc import Collection
from heapq import heapreplace

import msgspec

from router.core.costs import Size
from router.core.estimate import Cost
from router.core.memory import Loaded, Memory, overdue_s
from router.core.node import Node
from router.core.policy import Attempt
from router.core.prefix import BLOCK_TOKENS
from router.core.types import NodeSpec, Reason

_CONTENTION = 0.7
FIRST_SHARE = 0.3  # how much the length of an answer weighs against its first token
_ENDS_MAX = 64  # of one seat that are told apart
_LOADING_S = 0.1  # at least, until it is seen to be over
_RUNNING_S = 0.01  # likewise: what is at work has its slot, however short it was thought to be
_PINNED, _LOAD, _CACHED, _WARM = Reason.PINNED, Reason.LOAD, Reason.CACHED, Reason.WARM


class Delay(msgspec.Struct, frozen=True, eq=False):
    """What a node would cost a request, in seconds: waiting for a slot, a load with what it drives
    out, reading the prompt and writing the answer. `total_s` is what nodes are compared by: the
    answer's length counts less than its beginning. `known`: blocks of the prompt in the cache
    there; `now`: it may have it now."""

    total_s: float
    wait_s: float
    load_s: float
    first_s: float
    out_s: float
    known: int
    now: bool

    @property
    def answer_s(self) -> float:
        return self.first_s + FIRST_SHARE * self.out_s

    @property
    def service_s(self) -> float:
        """For how long it would have a slot there, once the model is loaded."""
        return self.first_s + self.out_s

    def reason(self, attempt: Attempt) -> Reason:
        """Why a request would go there."""
        if attempt.target.pin is not None:
            return _PINNED
        if self.load_s:
            return _LOAD
        return _CACHED if self.known else _WARM


class Seat(msgspec.Struct, eq=False):
    """One model on one node, in one pass that is at `now`. `runner`: what stands for it in that
    memory; `loaded` is None where it has to be loaded, and `victims` then what has to go for it,
    None where that cannot be; `evicts_s` what that costs others. `free`: how many of its slots are
    so."""

    node: Node
    runner: str
    memory: Memory
    loaded: Loaded | None
    cost: Cost
    contention: float
    slots: int
    free: int
    now: float
    victims: Collection[Loaded] | None = ()
    evicts_s: float = 0.0
    heap: list[float] | None = None

    @property
    def open(self) -> bool:
        """Whether it could take a request now."""
        return self.victims is not None if self.loaded is None else self.free > 0

    @property
    def ends(self) -> list[float]:
        """A heap of when its slots are free, in seconds."""
        if self.heap is None:
            assert self.loaded is not None  # what is to be loaded has no slots
            self.heap = _ends(self.loaded, self.slots, self.now)
        return self.heap

    def hold(self, service_s: float) -> None:
        """One more has its turn there."""
        if self.loaded is None:
            return  # whoever can load it does so now
        ends = self.ends
        heapreplace(ends, max(ends[0], 0.0) + service_s)
        self.free = max(0, self.free - 1)

    def take(self, delay: Delay) -> None:
        """One more is at work there."""
        if self.heap is not None:
            heapreplace(self.heap, max(delay.service_s, _RUNNING_S))
        self.free -= 1


def there(node: Node, memory: Memory, loaded: Loaded, price: Cost, now: float) -> Seat:
    """What is in memory, or on its way there."""
    slots, slower = slots_now(node.spec, memory, loaded, now), contention(memory, loaded)
    free = slots - len(loaded.runs) if loaded.ready is None else 0
    return Seat(node, loaded.key, memory, loaded, price, slower, slots, free, now)


def absent(
    node: Node, runner: str, memory: Memory, price: Cost, now: float,
    victims: Collection[Loaded] | None, evicts_s: float,
) -> Seat:  # fmt: skip
    """What would have to be loaded."""
    slower = 1.0 if victims is None else contention(memory, None)
    return Seat(node, runner, memory, None, price, slower, 0, 0, now, victims, evicts_s)


def contention(memory: Memory, loaded: Loaded | None) -> float:
    """How much longer all takes for what else is at work on the same GPUs."""
    if loaded is not None and len(memory.loaded) <= memory.gpus:
        return 1.0
    others = len([1 for one in memory.loaded.values() if one.runs and one is not loaded])
    return 1 + _CONTENTION * max(0, others + 1 - memory.gpus) / memory.gpus


def answer_s(size: Size, known: int, price: Cost, slower: float) -> tuple[float, float]:
    """What of an answer comes before its first token, of whose prompt so many blocks are in the
    cache, and the rest. Of a prompt that is cut none of them is of use."""
    tokens, cut, out = size
    if known and not cut:
        tokens = max(0, tokens - known * BLOCK_TOKENS)
    return tokens * price.prefill_s * slower, out * price.decode_s * slower


def slots_now(spec: NodeSpec, memory: Memory, loaded: Loaded, now: float) -> int:
    """How many requests it may serve at once now: where that is learned, with those tried."""
    if not spec.auto:
        return spec.slots
    learned = memory.learned(loaded.key)
    sure = learned.sure
    return sure + learned.tries(now) if len(loaded.runs) >= sure else sure


def _ends(loaded: Loaded, slots: int, now: float) -> list[float]:
    """When its slots are free, in seconds, as a heap."""
    free = min(slots - len(loaded.runs), _ENDS_MAX)
    ends = [0.0] * free  # in order, they are a heap
    if loaded.runs and free < _ENDS_MAX:  # or nobody gets to see when those that run will end
        runs = loaded.runs.values()
        ends += sorted(max(run.holds_s(now), _RUNNING_S) for run in runs)[-slots:]
    if loaded.ready is not None:
        left_s = _ready_s(loaded.ready, now)
        ends = [max(end, left_s) for end in ends]
    return ends


def _ready_s(ready: float, now: float) -> float:
    """How long a load still takes that should be over at `ready`."""
    left_s = ready - now
    return max(left_s, _LOADING_S, overdue_s(left_s))


def loading_s(memory: Memory, now: float) -> float:
    """How long a node still loads something."""
    loading = memory.loading
    return 0.0 if loading is None or loading.ready is None else _ready_s(loading.ready, now)
