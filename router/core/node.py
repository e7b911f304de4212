"""One node as the pool knows it: health, models, in-flight."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from router.core.names import Name
from router.core.types import Flip, Health, Model, NodeSpec, Observation, Sign

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


class Node:
    """A node's state. Only the pool changes it."""

    __slots__ = (
        "_listed", "_loaded", "detail", "health", "in_flight", "pool", "present", "release",
        "resident", "seen", "signs", "since", "spec", "turn", "up", "used", "version",
    )  # fmt: skip

    def __init__(self, spec: NodeSpec, pool: str, now: float) -> None:
        self.spec = spec
        self.pool = pool
        self.health = Health.UNKNOWN
        self.up = False  # whether health says so: asked for every node by every request
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

    def __repr__(self) -> str:
        return f"<{self.spec.name} {self.health} {self.in_flight} in flight>"

    @property
    def suspect(self) -> bool:
        """Worth another look soon: not up, or its last probe failed."""
        return not self.up or self.signs > 0

    @property
    def load(self) -> float:
        return self.in_flight / (self.spec.slots * self.spec.weight)

    @property
    def disk(self) -> int:
        """Bytes of all models that it lists."""
        sizes = [model.entry.get("size") for model in self._listed.values()]
        return sum(size for size in sizes if isinstance(size, int))

    def configure(self, spec: NodeSpec, pool: str) -> None:
        """Take a new specification of the same server; what is known of it stays."""
        self.spec, self.pool = spec, pool
        self.present = self._usable(self._listed)
        self.resident = self._usable(self._loaded)

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

    def feel(self, sign: Sign, up_after: int, down_after: int, now: float) -> tuple[Health, Health]:
        """Take one sign of health; returns (health before, health after)."""
        was = self.health
        nxt, needed = TRANSITIONS[was, sign]
        self.signs = self.signs + 1 if nxt is not was else 0
        if nxt is not was and self.signs >= (1, up_after, down_after)[needed]:
            self.health, self.since, self.signs = nxt, now, 0
            self.up = nxt is Health.UP
        return was, self.health

    def learn(self, seen: Observation) -> bool:
        """Take what a probe learned about versions and models; says whether anything changed."""
        before = (self.version, self._listed, self._loaded)
        if seen.version is not None:
            self.version = seen.version
            self.release = release(seen.version)
        if seen.present is not None and seen.present != self._listed:
            self._listed = seen.present
            self.present = self._usable(seen.present)
        if seen.resident is not None and seen.resident != self._loaded:
            self._loaded = seen.resident
            self.resident = self._usable(seen.resident)
        return before != (self.version, self._listed, self._loaded)

    def flip(self, was: Health) -> Flip | None:
        if was is self.health:
            return None
        return Flip(self.spec.name, was, self.health, self.detail)


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
