"""What is in one node's memory, what works there, and what Ollama would evict for something else.

Ollama tells what is loaded (`/api/ps`) some seconds late, and never how much fits. In between, what
requests have loaded or driven out is worked out as Ollama does it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from operator import attrgetter

import msgspec

from router.core.prefix import Prefixes
from router.core.slots import LINE, Slots
from router.core.types import UNTOLD_BYTES, Model, NodeSpec
from router.core.work import Work

_KEEP_ALIVE_S = 300.0
DISK_TO_MEMORY = 1.2
_AT_LEAST = 0.3  # of what is expected of an answer is always left
_OVERDUE_MAX_S = 60.0  # or all that comes is refused at once for the sake of one long answer
_LESS = 0.999  # of what did not fit
_PER_GPU = 3  # models that Ollama keeps, unless it is told otherwise
_LATE_S = 5.0  # and as long again as was expected: a load that takes longer waits for room
_SETTLING_S = 3.0  # so long after its end a load may be missing in an answer of /api/ps


def overdue_s(left_s: float) -> float:
    """What should have been over for some time is thought to go on for as long again: it may hang,
    and nobody is to wait for it for ever while another node is free. 0 for what is in time."""
    return min(max(-left_s, 0.0), _OVERDUE_MAX_S)


class Loads(msgspec.Struct):
    """What loading has come to on a node, counted: models that were not in its memory, and those
    that were, for another context; `external`: contexts that changed without a request here that
    was to do so; `evicted`: models that made room before their time."""

    absent: int = 0
    reloads: int = 0
    external: int = 0
    evicted: int = 0


class Run(msgspec.Struct, eq=False):
    """One request at work: since when, and how long it is expected to take until its answer
    begins and for the answer. `place`: its number in the line, where slots are learned."""

    since: float
    first_s: float
    out_s: float
    place: int = -1

    def left_s(self, now: float) -> float:
        return max(self._until_s(now), _AT_LEAST * self.out_s)

    def holds_s(self, now: float) -> float:
        """For how long who waits has to think that it keeps its slot."""
        return max(self.left_s(now), overdue_s(self._until_s(now)))

    def _until_s(self, now: float) -> float:
        return self.since + self.first_s + self.out_s - now

    def begin(self, now: float) -> None:
        """Its answer begins: what is left is the answer."""
        self.since, self.first_s = now, 0.0


@dataclass(slots=True, eq=False)
class Loaded:
    """A model in memory, or on its way there: then `ready` is when it is expected, else None.
    `key`: what stands for it there, whatever it is called (`Node.runner`); `name`: one name of it.
    `since`: when it was loaded; `used`: when a request for it last began or ended. `asked`: the
    context that it was loaded for, `num_ctx` what it was told to have, which may be less; `plain`:
    a request that asked for none has been answered with it. `default`: what such a one gets there,
    None while nobody has seen it."""

    key: str
    name: str
    size_bytes: float
    since: float
    used: float
    asked: int | None = None
    num_ctx: int | None = None
    default: int | None = None
    plain: bool = False
    keep_alive_s: float = _KEEP_ALIVE_S
    ready: float | None = None
    runs: dict[object, Run] = field(default_factory=dict)
    prefixes: Prefixes = field(default_factory=Prefixes)

    @property
    def rank(self) -> tuple[bool, float, str]:
        """The smaller, the sooner it is unloaded for another."""
        return bool(self.runs), self.keep_alive_s, self.name

    def ends(self, now: float) -> list[float]:
        """In how many seconds each of its requests is expected to end."""
        return [run.left_s(now) for run in self.runs.values()]

    @property
    def context(self) -> int | None:
        """For how many tokens it is loaded, as far as known."""
        return self.num_ctx or self.asked or self.default

    def differs(self, work: Work) -> bool:
        """Whether a request has Ollama load it anew: it asks for another context, or for none, and
        the model is loaded for another one than it is where nobody asks. Where the router may
        raise what is asked for, only more than there is does so."""
        wanted = work.num_ctx or self.default
        if wanted is None:
            return self.asked is not None and not work.at_least
        has = self.context
        if has is None:
            return work.at_least
        if self.asked is not None and self.asked > has:
            wanted = min(wanted, has)  # the model was not trained for more, whoever asks for it
        return wanted > has if work.at_least else wanted not in (has, self.asked)


_BY_RANK = attrgetter("rank")


class Memory:
    """The state of one node's memory. `loading`: the one load that is on its way; `wanted`: what
    room is made for, and `leaving` what gets nothing new for that."""

    __slots__ = (
        "_count_max", "_defaults", "_driven_out", "_limit_bytes", "_lines", "_slots", "_told",
        "_vanished", "gpus", "growth", "leaving", "loaded", "loading", "loads", "sizes", "wanted",
    )  # fmt: skip

    def __init__(self, gpus: Collection[int]) -> None:
        self._limit_bytes: float = inf
        self._count_max = 0  # of models at once, by Ollama's setting for that or its default
        self.sizes: dict[str, float] = {}  # of what was ever seen in it
        self.growth = 0.0  # how much larger models are in memory than on disk; 0 if not known
        self._slots: dict[str, Slots] = {}
        self._lines = 0  # that there have been, each with numbers of its own
        self._defaults: dict[str, int] = {}  # contexts where nobody asks for one
        self._driven_out: set[str] = set()  # by what was loaded, as far as that can be told
        self._vanished: dict[str, int | None] = {}  # for nothing that is known, with their contexts
        self.loads = Loads()
        self.loaded: dict[str, Loaded] = {}
        self.loading: Loaded | None = None
        self.wanted = ""
        self.leaving: Collection[str] = ()
        self.gpus = 0
        self.configure(gpus)

    def __repr__(self) -> str:
        return f"<Memory {list(self.loaded)}>"

    def configure(self, gpus: Collection[int]) -> None:
        """Take what a configuration says; where it says nothing, that is learned."""
        count = max(1, len(gpus))
        if count != self.gpus:
            self.gpus, self._count_max = count, _PER_GPU * count
        self._told = bool(gpus)
        if gpus:
            self._limit_bytes = sum(gpus)

    def see(self, resident: Mapping[str, Model], now: float, wall: float) -> None:
        """Take an answer of `/api/ps`, by what stands for each model; its times are of the same
        clock as `wall`."""
        loading = self.loading
        if loading is not None and loading.key in resident and (loading.ready or 0.0) <= now:
            self.ready(loading, now)  # some versions list it while it is loaded, too
        self._count_driven_out(resident)
        for key, model in resident.items():
            one = self.loaded.get(key)
            if one is None:
                was, default = self._vanished.pop(key, None), self._defaults.get(key)
                one = self.loaded[key] = Loaded(
                    key, model.key, 0.0, now, now, num_ctx=was, default=default
                )
            self._describe(one, model, now, wall)
        missing = [one for key, one in self.loaded.items() if key not in resident]
        gone = [
            one for one in missing
            if one.ready is None and not one.runs and now - one.since > _SETTLING_S
        ]  # fmt: skip
        self._gone(sorted(gone, key=lambda one: one.rank), now)
        self._count_max = max(self._count_max, len(resident))
        if not self._told:  # what is there together fits
            fits = sum(self.loaded[key].size_bytes for key in resident)
            self._limit_bytes = max(self._limit_bytes, fits)
        self._make_way(now)

    def _make_way(self, now: float) -> None:
        """A load takes so long that it must be waiting for room, which there is once one of the
        others has nothing to do: Ollama does not see to that."""
        one = self.loading
        if one is None or one.ready is None or self.wanted:
            return
        others = [other for other in self.loaded.values() if other is not one]
        late_s = now - one.ready - (one.ready - one.since)
        if others and late_s > _LATE_S and all(other.runs for other in others):
            self.reserve(one.key, others)

    def _gone(self, gone: Sequence[Loaded], now: float) -> None:
        """They are no longer in memory. If something was loaded since one of them was used, and it
        was not its time to go, then there is less room than was thought."""
        newest = max((one.since for one in self.loaded.values() if one not in gone), default=-inf)
        for one in gone:
            early = now - one.used < one.keep_alive_s
            if early and newest > one.used:
                self.loads.evicted += 1
                self._take_less()
            elif early:
                self._vanished[one.key] = one.num_ctx
            del self.loaded[one.key]

    def _take_less(self) -> None:
        """What was there did not stay together."""
        if not self._told:
            self._limit_bytes = min(self._limit_bytes, _LESS * self.used_bytes)
        elif self.used_bytes <= self._limit_bytes:
            self._count_max = max(1, len(self.loaded) - 1)

    def _count_driven_out(self, resident: Collection[str]) -> None:
        """Of what was thought to make room, what has."""
        gone = {key for key in self._driven_out if key not in resident}
        self.loads.evicted += len(gone)
        for key in gone & self.loaded.keys():  # it was listed for some time
            if not self.loaded[key].runs:
                del self.loaded[key]
        self._driven_out = self._driven_out - gone if self.loading is not None else set()

    @property
    def used_bytes(self) -> float:
        return sum(one.size_bytes for one in self.loaded.values())

    def _describe(self, one: Loaded, model: Model, now: float, wall: float) -> None:
        size = model.number("size_vram") or model.size_bytes
        one.size_bytes = self.sizes[one.key] = size or one.size_bytes or UNTOLD_BYTES
        ctx = model.context
        if ctx and one.ready is None:
            self._take_context(one, ctx)
        left_s = model.moment("expires_at").timestamp() - wall
        if wall and not one.runs and left_s > 0:
            one.keep_alive_s = round((left_s + now - one.used) / 5) * 5.0

    def _take_context(self, one: Loaded, ctx: int) -> None:
        if one.num_ctx is not None and ctx != one.num_ctx:  # others have loaded it anew
            self.loads.external += ctx != one.asked
            one.asked, one.plain = None, False
        one.num_ctx = ctx
        if one.plain:
            one.default = self._defaults[one.key] = ctx

    def keep(self, keys: Collection[str]) -> None:
        """Forget what was learned of models that the node does not have any more."""
        for known in (self.sizes, self._slots, self._defaults, self._vanished):
            for key in [key for key in known if key not in keys and key not in self.loaded]:
                del known[key]

    def learned(self, key: str) -> Slots:
        """What is known of how many requests a model serves at once."""
        found = self._slots.get(key)
        if found is None:
            self._lines += 1
            found = self._slots[key] = Slots(self._lines * LINE)
        return found

    def slots(self, key: str, spec: NodeSpec) -> int:
        """How many requests may be at work on a model."""
        return self.learned(key).sure if spec.auto else spec.slots

    @property
    def learned_slots(self) -> Mapping[str, int]:
        """How many each model serves at once, as far as that was learned."""
        return {key: one.sure for key, one in self._slots.items()}

    def need_bytes(self, key: str, disk_bytes: float) -> float:
        """How much memory a model takes: as it was seen, or as it is likely by its size on
        disk."""
        growth = self.growth or DISK_TO_MEMORY
        return self.sizes.get(key) or growth * (disk_bytes or UNTOLD_BYTES)

    def victims(
        self, key: str, need_bytes: float, *, busy: bool = False
    ) -> Collection[Loaded] | None:
        """What Ollama would unload to load a model; None where it would have to wait for that,
        unless that is wanted."""
        others = [one for one in self.loaded.values() if one.key != key]
        room, left = self._limit_bytes - sum([one.size_bytes for one in others]), len(others)
        found: list[Loaded] = []
        idle = others if busy else [one for one in others if not one.runs]
        if len(idle) > 1:
            idle.sort(key=_BY_RANK)
        for one in idle:
            if room >= need_bytes and left < self._count_max:
                break
            if one.ready is not None:
                return None
            found.append(one)
            room, left = room + one.size_bytes, left - 1
        if left and (room < need_bytes or left >= self._count_max):
            return None  # what is busy would have to go, too
        return found  # it may be too large for any room: then it is alone, partly in main memory

    def load(
        self, key: str, name: str, need_bytes: float, num_ctx: int | None, ready: float, now: float
    ) -> Loaded:
        """A request goes there that has this model loaded first; gives the new one."""
        for victim in self.victims(key, need_bytes) or ():
            del self.loaded[victim.key]
            self._driven_out.add(victim.key)
        if key in self.loaded:
            self.loads.reloads += 1
        else:
            self.loads.absent += 1
        if key in self._driven_out:  # nobody has looked in between
            self._driven_out.discard(key)
            self.loads.evicted += 1
        self._vanished.pop(key, None)
        default = self._defaults.get(key)
        one = Loaded(key, name, need_bytes, now, now, num_ctx, default=default, ready=ready)
        self.loaded[key] = self.loading = one
        if self.wanted == key:
            self._reserve_nothing()
        return one

    def began(self, one: Loaded, work: Work, now: float) -> None:
        """An answer of it begins, and with that it has been loaded."""
        self.ready(one, now)
        if work.num_ctx is None and not (work.at_least and one.context):
            one.plain = True

    def ready(self, one: Loaded, now: float) -> None:
        """It has been loaded."""
        if one.ready is not None:
            one.ready, one.since = None, now
        if self.loading is one:
            self.loading = None
            if self.wanted == one.key:  # room was made, by what has nothing to do
                kept = {k: v for k, v in self.loaded.items() if v.runs or k not in self.leaving}
                self.loaded = kept
                self._reserve_nothing()

    def end(self, one: Loaded, attempt: object, now: float, *, good: bool) -> None:
        """A request for what is there has ended. If it was to load it and did not, nothing has."""
        run, key = one.runs.pop(attempt), one.key
        one.used = now
        if key in self._slots:
            self._slots[key].ended(run.place, now)
        if one.ready is None:
            return
        if good:
            self.ready(one, now)
        elif not one.runs:
            del self.loaded[key]
            self.loading = None
            self._reserve_nothing()

    def forget(self) -> None:
        """The node has ended: it is empty, but for what has not ended yet as far as is known. That
        counts until it does. It may come back with other settings."""
        self.loaded = {key: one for key, one in self.loaded.items() if one.runs}
        self._driven_out.clear()
        self._vanished.clear()
        self._defaults.clear()
        self._reserve_nothing()

    def reserve(self, key: str, victims: Collection[Loaded]) -> None:
        """Keep new work from what has to make room for a model."""
        self.wanted, self.leaving = key, frozenset(one.key for one in victims)

    def release(self) -> None:
        """Keep it no longer, but for a load that is on its way."""
        if self.loading is None or self.loading.key != self.wanted:
            self._reserve_nothing()

    def _reserve_nothing(self) -> None:
        self.wanted, self.leaving = "", ()
