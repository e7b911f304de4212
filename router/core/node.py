"""One node as the pool knows it: health, breakers, models, in-flight."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import inf

from router.core.breaker import Breaker, Ground
from router.core.names import Name
from router.core.rates import Speed
from router.core.replica import Replica
from router.core.types import (
    Ejected,
    Ejection,
    Failure,
    FailureKind,
    Flip,
    Health,
    Model,
    NodeSpec,
    Observation,
    Outcome,
    Sign,
)

_NUMBERS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9}){0,3}")

# (health, sign) -> (next health, how many such signs in a row it takes). A refused connection
# is no accident of timing: nobody listens, so it counts at once.
_AT_ONCE, _UP_AFTER, _DOWN_AFTER = range(3)
TRANSITIONS: Mapping[tuple[Health, Sign], tuple[Health, int]] = {
    (Health.UNKNOWN, Sign.GOOD): (Health.UP, _AT_ONCE),
    (Health.UNKNOWN, Sign.BAD): (Health.DOWN, _AT_ONCE),
    (Health.UNKNOWN, Sign.REFUSED): (Health.DOWN, _AT_ONCE),
    (Health.UP, Sign.GOOD): (Health.UP, _AT_ONCE),
    (Health.UP, Sign.BAD): (Health.DOWN, _DOWN_AFTER),
    (Health.UP, Sign.REFUSED): (Health.DOWN, _AT_ONCE),
    (Health.DOWN, Sign.GOOD): (Health.UP, _UP_AFTER),
    (Health.DOWN, Sign.BAD): (Health.DOWN, _AT_ONCE),
    (Health.DOWN, Sign.REFUSED): (Health.DOWN, _AT_ONCE),
}


_CLOSED = Ejection.CLOSED
_OTHERS = 2  # so many of the answers in a row are of other models than the worst one
_SPEEDS_MAX = 100  # or they would be as many series as there are models
_REPLICAS_MAX = 1000  # a cloud model can have any name
_BROKEN = frozenset((FailureKind.CONNECT, FailureKind.RESET, FailureKind.GARBAGE))
_NO_FAULT = frozenset((
    FailureKind.REFUSED, FailureKind.MISSING, FailureKind.BUSY, FailureKind.OURS,
    FailureKind.ASTRAY,
))  # fmt: skip


class Node:
    """A node's state. Only the pool changes it.

    `open`: new leases may be given, as far as probes and the operator say. `troubled`: models of
    which a breaker is not closed, or which were busy; None stands for the node itself.
    `schedules`: requests wait for their turn here; `spill_s`: who has for so long may have nodes
    of the next pool, too.
    """

    __slots__ = (
        "_listed", "_loaded", "_names", "_runners", "answered", "breaker", "detail", "draining",
        "full_at", "health", "in_flight", "open", "pool", "present", "release", "replicas",
        "resident", "schedules", "seen", "signs", "since", "spec", "spill_s", "troubled", "turn",
        "up", "used", "version",
    )  # fmt: skip

    def __init__(self, spec: NodeSpec, pool: str, now: float) -> None:
        self.spec = spec
        self.pool = pool
        self.schedules = False
        self.spill_s = inf
        self.health = Health.UNKNOWN
        self.up = False  # whether health says so: asked for every node by every request
        self.open = False
        self.draining = False
        self.breaker = Breaker()
        self.answered: list[str] = []  # the models of the last answers of 5xx, all in a row
        self.replicas: dict[str, Replica] = {}
        self.troubled: set[str | None] = set()
        self.full_at = now  # when it gets its full share of requests
        self.since = now
        self.detail = "not probed yet"
        self.signs = 0
        self.in_flight = 0
        self.turn = 0
        self.used = 0  # requests that have begun or ended here
        self.seen = 0  # how many of them had when its memory was last looked at
        self.version = ""
        self.release: tuple[int, ...] = ()
        self._listed: Mapping[str, Model] = {}
        self._loaded: Mapping[str, Model] = {}
        self.present: Mapping[str, Model] = {}
        self.resident: Mapping[str, Model] = {}
        self._runners: Mapping[str, str] = {}
        self._names: Mapping[str, Sequence[str]] = {}

    def __repr__(self) -> str:
        return f"<{self.spec.name} {self.health} {self.in_flight} in flight>"

    @property
    def suspect(self) -> bool:
        """Worth another look soon: not up, or its last probe failed."""
        return not self.up or self.signs > 0

    def load(self, now: float, slow_start_s: float) -> float:
        """What is in flight for its size; it counts as smaller for some time after its return."""
        size = self.spec.slots * self.spec.weight
        if now < self.full_at:
            grown = 1 - (self.full_at - now) / slow_start_s
            size *= max(grown, 1 / self.spec.slots)
        return self.in_flight / size

    @property
    def disk(self) -> float:
        """Bytes of all models that it lists."""
        return sum(model.size_bytes for model in self._listed.values())

    def speeds(self) -> Mapping[str, Speed]:
        """What the models that it has have shown; where those are many, of those in its memory."""
        known = {key: one.rates.speed for key, one in self.replicas.items() if key in self.present}
        if len(known) <= _SPEEDS_MAX:
            return known
        kept = sorted(known, key=lambda key: (key not in self.resident, key))[:_SPEEDS_MAX]
        return {key: known[key] for key in kept}

    def configure(self, spec: NodeSpec, pool: str) -> None:
        """Take a new specification of the same server; what is known of it stays."""
        self.spec, self.pool = spec, pool
        self._list(self._listed)
        self.resident = self._usable(self._loaded)

    def _list(self, listed: Mapping[str, Model]) -> None:
        self._listed, self.present = listed, self._usable(listed)
        self._runners = {key: model.digest or key for key, model in self.present.items()}
        names: dict[str, list[str]] = {}
        for key, runner in self._runners.items():
            names.setdefault(runner, []).append(key)
        self._names = names

    def _usable(self, models: Mapping[str, Model]) -> Mapping[str, Model]:
        return {key: model for key, model in models.items() if self.may_use(key)}

    def may_use(self, key: str) -> bool:
        """Whether the configured globs let this node's `key` be used."""
        return not self.spec.models or fits(key, self.spec.models)

    def new_enough(self, since: tuple[int, ...]) -> bool:
        """Whether its version is not known to be older."""
        return not self.release or self.release >= since

    def serves(self, model: Name | None) -> bool:
        """Whether it has the model, as far as known. No name, or a cloud name: every node."""
        if model is None:
            return True
        return self.may_use(model.key) if model.cloud else model.key in self.present

    def size(self, key: str) -> float:
        """Bytes of a model on its disk; 0 where that is not known."""
        model = self.present.get(key)
        return 0.0 if model is None else model.size_bytes

    def digest(self, key: str) -> str:
        """Which model it has under this name; empty where that is not known."""
        return self.present[key].digest if key in self.present else ""

    def runner(self, key: str) -> str:
        """What stands for a model in its memory, the same for all names of it: the digest, or the
        name where that is not known."""
        return self._runners.get(key, key)

    @property
    def runners(self) -> Collection[str]:
        """Those of all models that it has."""
        return self._names.keys()

    def runs(self, model: Model) -> str:
        """That of an entry of its memory. Where its list does not know the digest, either of them
        may be out of date: then the name says which model it is."""
        return model.digest if model.digest in self._names else self.runner(model.key)

    def names(self, runner: str) -> Sequence[str]:
        """All names that it lists a model by."""
        return self._names.get(runner, ())

    def resides(self, key: str) -> Model | None:
        """The model as the node has it in memory, be it under another name for the same."""
        found, digest = self.resident.get(key), self.digest(key)
        if found is not None or not digest:
            return found
        return next((one for one in self._loaded.values() if one.digest == digest), None)

    @property
    def in_memory(self) -> Mapping[str, Model]:
        """What it has in memory of what may be used, by what stands for it there. Its memory may
        call it by a name that may not be used."""
        named, usable = self._names, self.resident
        loaded = self._loaded.items()
        return {self.runs(one): one for key, one in loaded if key in usable or one.digest in named}

    # What traffic says.

    def lets(self, key: str, now: float) -> bool:
        """Whether neither a breaker nor a full queue keeps requests for this model away."""
        if not self.troubled:
            return True
        replica = self.replicas.get(key)
        return self.breaker.lets(now) and (replica is None or replica.lets(now))

    def busy_until(self, key: str, now: float) -> float | None:
        """When it may have room again for a model, if it has said that it has none."""
        replica = self.replicas.get(key)
        return replica.busy.until if replica is not None and replica.busy.until > now else None

    def lease(self, key: str, ground: Ground, now: float) -> Sequence[Flip]:
        """Count a request that goes there."""
        self.turn = ground.turn
        self.in_flight += 1
        self.used += 1
        replica = self.replicas.get(key)
        if replica is None:
            replica = self._replica(key, now)
        if not self.troubled:
            replica.in_flight += 1
            return ()
        before = self.breaker.state, replica.breaker.state
        self.breaker.lease(ground.turn, now)
        replica.lease(ground, now)
        return self._flips(key, replica, before, now)

    def _replica(self, key: str, now: float) -> Replica:
        if len(self.replicas) >= _REPLICAS_MAX:
            gone = self.replicas.keys() - self.present.keys()
            for one in [key for key in gone if self.replicas[key].idle(now)]:
                del self.replicas[one]
                self.troubled.discard(one)
        replica = self.replicas[key] = Replica()
        return replica

    def leave(
        self, key: str, turn: int, outcome: Outcome, ground: Ground, now: float
    ) -> Sequence[Flip]:
        """A request has ended, that was lease number `turn`: count it, and what it says."""
        self.in_flight -= 1
        self.used += 1
        replica, failure = self.replicas[key], outcome.failure
        replica.in_flight -= 1
        if failure is None and not self.troubled:
            if outcome.told:
                replica.share.good(now, ground.rules.window_s)
                replica.breaker.run = self.breaker.run = 0  # both are closed
                self.answered.clear()
            return ()
        before = self.breaker.state, replica.breaker.state
        if failure is not None:
            self._failed(key, replica, failure, turn, ground, now)
        elif outcome.told:
            replica.good(turn, ground, now)
            self.breaker.good(turn, now)
            self.answered.clear()
        else:
            replica.untold(turn, now)
            self.breaker.untold(turn, now)
        self._note(key, calm=replica.calm)
        self._note(None, calm=self.breaker.state is _CLOSED)
        if before[0] is not _CLOSED and self.breaker.state is _CLOSED:
            self.full_at = now + ground.rules.slow_start_s
        return self._flips(key, replica, before, now)

    def _note(self, key: str | None, *, calm: bool) -> None:
        (self.troubled.discard if calm else self.troubled.add)(key)

    def _failed(
        self, key: str, replica: Replica, failure: Failure, turn: int, ground: Ground, now: float
    ) -> None:
        """Broken connections are the node's fault; bad answers and silence the model's, so those
        to a request that names none are nobody's."""
        breaker, kind = self.breaker, failure.kind
        why = failure.detail or kind.value
        if kind in _BROKEN:
            replica.breaker.untold(turn, now)
            if not breaker.stale(turn) and breaker.bad(ground.rules.resets):
                breaker.open(why, ground, now)
        elif kind in _NO_FAULT or not key:
            replica.breaker.untold(turn, now)
            breaker.untold(turn, now)
            if kind is FailureKind.BUSY:
                replica.full(ground, now)
        else:
            replica.bad(why, turn, ground, now)
            if key not in self.present:  # a cloud model: what fails is behind the node
                breaker.untold(turn, now)
            elif not breaker.stale(turn):
                self._answered(key, why, ground, now)

    def _answered(self, key: str, why: str, ground: Ground, now: float) -> None:
        """It is the node's fault, too, if several of its models fail in a row."""
        most = ground.rules.answers
        self.answered.append(key)
        del self.answered[:-most]
        worst = max(map(self.answered.count, self.answered))
        many = len(self.answered) == most and worst <= most - _OTHERS
        state = self.breaker.state
        if state is Ejection.TRIAL or (many and state is _CLOSED):
            self.breaker.open(why, ground, now)

    def _flips(
        self, key: str, replica: Replica, before: tuple[Ejection, Ejection], now: float
    ) -> Sequence[Flip]:
        """What has changed about who is kept away."""
        found = []
        for breaker, was, model in (
            (self.breaker, before[0], ""),
            (replica.breaker, before[1], key),
        ):
            if breaker.state is not was:
                shut = breaker.state is not _CLOSED
                wait_s = max(0.0, breaker.back_off.until - now) if shut else 0.0
                found.append(
                    Flip(self.spec.name, was, breaker.state, breaker.reason, model, wait_s)
                )
        return found

    def ejected(self) -> tuple[Ejected, ...]:
        """What requests are kept away from, for the operator."""
        found = []
        if self.breaker.state is not _CLOSED:
            trial = self.breaker.state is Ejection.TRIAL
            found.append(Ejected(self.breaker.reason, self.breaker.back_off.until, "", trial))
        for key in sorted(key for key in self.troubled if key is not None):
            found += self.replicas[key].ejected(key)
        return tuple(found)

    def drain(self, *, draining: bool) -> bool:
        """Give no new leases, or give them again; says whether that is a change."""
        was, self.draining = self.draining, draining
        self.open = self.up and not draining
        return was is not draining

    def forgive(self, key: str) -> None:
        """The last answer of 5xx for this model was the request's fault."""
        replica = self.replicas.get(key)
        if replica is not None:
            replica.forgive()
        if self.answered:
            self.answered.pop()

    def spells(self, model: Name) -> bool:
        """Whether it lists this model, if at all, under the very name that was asked for: some
        endpoints know no other spelling, and `:local` means something else."""
        found = self.present.get(model.key)
        return found is None or found.entry.get("name") in (model.text, f"{model.text}:latest")

    # What probes say.

    def feel(self, sign: Sign, up_after: int, down_after: int, now: float) -> tuple[Health, Health]:
        """Take one sign of health; returns (health before, health after)."""
        was = self.health
        nxt, needed = TRANSITIONS[was, sign]
        self.signs = self.signs + 1 if nxt is not was else 0
        if nxt is not was and self.signs >= (1, up_after, down_after)[needed]:
            self.health, self.since, self.signs = nxt, now, 0
            self.up = nxt is Health.UP
            self.open = self.up and not self.draining
        return was, self.health

    def learn(self, seen: Observation) -> bool:
        """Take what a probe learned about versions and models; says whether anything changed."""
        before = (self.version, self._listed, self._loaded)
        if seen.version is not None:
            self.version = seen.version
            self.release = release(seen.version)
        if seen.present is not None and seen.present != self._listed:
            self._list(seen.present)
        if seen.resident is not None and seen.resident != self._loaded:
            self._loaded = seen.resident
            self.resident = self._usable(seen.resident)
        return before != (self.version, self._listed, self._loaded)


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, at least three; none where it tells nothing: `0.0.0` is what a
    build from source says."""
    texts = _NUMBERS.match(version)
    numbers = [int(text) for text in texts[0].split(".")] if texts else []
    if not any(numbers):
        return ()
    return tuple(numbers + [0] * (3 - len(numbers)))


def fits(key: str, globs: Sequence[str]) -> bool:
    """Whether a canonical name fits one of the globs, all if none includes, and none with `!`."""
    wanted = [glob for glob in globs if not glob.startswith("!")]
    barred = [glob[1:] for glob in globs if glob.startswith("!")]
    return (not wanted or _matches(key, wanted)) and not _matches(key, barred)


def _matches(key: str, globs: Iterable[str]) -> bool:
    """Whether any glob fits the key; one without a tag means `latest` too, as a name does."""
    return any(
        fnmatchcase(key, form)
        for glob in globs
        for form in (glob.lower(), f"{glob.lower()}:latest")
    )
