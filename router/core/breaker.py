"""Keeping away from what fails, and trying it again: breakers, back-off, the share of good ends."""

import enum
from collections.abc import Callable, Mapping

from router.core.types import Ejection, Resilience

Roll = Callable[[], float]
_CLOSED, _OPEN, _TRIAL = Ejection.CLOSED, Ejection.OPEN, Ejection.TRIAL
_PARTS = 6  # of the window in which good and bad ends are counted


class Sign(enum.Enum):
    """What an attempt says of what it was made on."""

    LEASED = "leased"  # it begins
    GOOD = "good"
    BAD = "bad"
    UNTOLD = "untold"  # the client left before anything could be told


# What has ended says nothing if it began before the breaker opened (`Breaker.feel`).
TRANSITIONS: Mapping[tuple[Ejection, Sign], Ejection] = {
    (_CLOSED, Sign.LEASED): _CLOSED,
    (_CLOSED, Sign.GOOD): _CLOSED,
    (_CLOSED, Sign.BAD): _OPEN,  # after as many as it takes
    (_CLOSED, Sign.UNTOLD): _CLOSED,
    (_OPEN, Sign.LEASED): _TRIAL,
    (_OPEN, Sign.GOOD): _CLOSED,  # tried in panic
    (_OPEN, Sign.BAD): _OPEN,
    (_OPEN, Sign.UNTOLD): _OPEN,
    (_TRIAL, Sign.LEASED): _TRIAL,
    (_TRIAL, Sign.GOOD): _CLOSED,
    (_TRIAL, Sign.BAD): _OPEN,
    (_TRIAL, Sign.UNTOLD): _OPEN,
}


class Ground:
    """What holds for all breakers of a pool: its rules, its dice, the number of the last lease."""

    __slots__ = ("roll", "rules", "turn")

    def __init__(self, rules: Resilience, roll: Roll) -> None:
        self.rules = rules
        self.roll = roll
        self.turn = 0


class BackOff:
    """How long to keep away: twice as long each time, until it is told to forget."""

    __slots__ = ("times", "until", "wait_s")

    def __init__(self) -> None:
        self.times = 0
        self.until = 0.0
        self.wait_s = 0.0

    def grow(self, ground: Ground, now: float) -> None:
        rules = ground.rules
        wait_s = min(rules.back_off_s * 2.0 ** min(self.times, 30), rules.back_off_max_s)
        self.times += 1
        self.wait_s = wait_s * (1 + rules.jitter * (2 * ground.roll() - 1))
        self.until = now + self.wait_s

    def repeat(self, now: float) -> None:
        """As long again."""
        self.until = now + self.wait_s

    def undo(self, now: float) -> None:
        """The last time was for nothing."""
        self.times -= 1
        self.until = min(self.until, now)


class Breaker:
    """Opens when too much fails, and closes after one good trial.

    `turn` numbers leases in their order: one that was given before the breaker opened, and ends
    after, says nothing of the time since.
    """

    __slots__ = ("_at", "_closed_at", "back_off", "reason", "run", "state")

    def __init__(self) -> None:
        self.state = _CLOSED
        self.back_off = BackOff()
        self.reason = ""
        self.run = 0
        self._at = 0
        self._closed_at = 0.0

    def __repr__(self) -> str:
        return f"<Breaker {self.state} {self.run} bad in a row>"

    def lets(self, now: float) -> bool:
        """Whether a request may go there: always while closed, one for trial when it is time, and
        one more when as much time has passed again: a trial may take long to tell."""
        return self.state is _CLOSED or now >= self.back_off.until

    def lease(self, turn: int, now: float) -> None:
        """A request goes there: if that is while it is open and due, it is the trial."""
        if self.state is _CLOSED or now < self.back_off.until:
            return
        if self.state is _OPEN:
            self._at = turn - 1
        self.state = TRANSITIONS[self.state, Sign.LEASED]
        self.back_off.repeat(now)

    def good(self, turn: int, now: float) -> None:
        if self.state is _CLOSED:
            self.run = 0
        elif turn > self._at:
            self.state, self.run, self._closed_at = TRANSITIONS[self.state, Sign.GOOD], 0, now

    def untold(self, turn: int, now: float) -> None:
        """The trial told nothing: the next request is one."""
        if self.state is _TRIAL and turn > self._at:
            self.state = TRANSITIONS[self.state, Sign.UNTOLD]
            self.back_off.until = now

    def stale(self, turn: int) -> bool:
        """Whether this lease was given before it opened."""
        return turn <= self._at

    def bad(self, limit: int) -> bool:
        """Count a failure that is not stale; says whether it is enough to open."""
        self.run += 1
        return self.state is _TRIAL or (self.state is _CLOSED and self.run >= limit)

    def forgive(self) -> None:
        """The last failure that was counted was none."""
        self.run = max(0, self.run - 1)

    def open(self, reason: str, ground: Ground, now: float) -> None:
        """Keep away. What failed long ago is forgotten."""
        if self.state is _CLOSED and now - self._closed_at > ground.rules.back_off_max_s:
            self.back_off.times = 0
        self.state, self._at, self.run = TRANSITIONS[self.state, Sign.BAD], ground.turn, 0
        self.reason = reason
        self.back_off.grow(ground, now)


class Share:
    """Good and bad ends over the last so many seconds, in parts."""

    __slots__ = ("_bad", "_good", "_next")

    def __init__(self) -> None:
        self._good = [0] * _PARTS
        self._bad = [0] * _PARTS
        self._next = 0.0

    def good(self, now: float, window_s: float) -> None:
        if now >= self._next:
            self._shift(now, window_s / _PARTS)
        self._good[-1] += 1

    def bad(self, now: float, window_s: float) -> None:
        if now >= self._next:
            self._shift(now, window_s / _PARTS)
        self._bad[-1] += 1

    def _shift(self, now: float, part_s: float) -> None:
        passed = 1 + int((now - self._next) / part_s)
        self._next += passed * part_s
        passed = min(passed, _PARTS)
        self._good = self._good[passed:] + [0] * passed
        self._bad = self._bad[passed:] + [0] * passed

    def forgive(self) -> None:
        """The last bad one was none."""
        self._bad[-1] = max(0, self._bad[-1] - 1)

    def poor(self, least: int, share: float) -> bool:
        """Whether fewer than this share were good, of no fewer than `least`."""
        good, bad = sum(self._good), sum(self._bad)
        return good + bad >= least and good < share * (good + bad)

    def clear(self) -> None:
        self._good, self._bad = [0] * _PARTS, [0] * _PARTS
