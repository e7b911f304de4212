"""One model on one node: what is in flight there, and whether it may be asked."""

from router.core.breaker import BackOff, Breaker, Ground, Share
from router.core.rates import Rates
from router.core.types import Ejected, Ejection

_CLOSED = Ejection.CLOSED


class Replica:
    """Its state. Only its node changes it.

    `busy` is the back-off after a 503: nothing new goes there until a request of its ends well, or
    the time has passed.
    """

    __slots__ = ("breaker", "busy", "in_flight", "rates", "share")

    def __init__(self) -> None:
        self.in_flight = 0
        self.breaker = Breaker()
        self.busy = BackOff()
        self.share = Share()
        self.rates = Rates()

    def __repr__(self) -> str:
        return f"<Replica {self.in_flight} in flight, {self.breaker.state}>"

    @property
    def calm(self) -> bool:
        """Nothing keeps requests away."""
        return self.breaker.state is _CLOSED and not self.busy.until

    def lets(self, now: float) -> bool:
        """Whether a request may go there now."""
        return now >= self.busy.until and self.breaker.lets(now)

    def lease(self, ground: Ground, now: float) -> None:
        """A request goes there. Where all was full, it goes alone until it ends, or again some
        time has passed."""
        self.in_flight += 1
        self.breaker.lease(ground.turn, now)
        if self.busy.until:
            self.busy.grow(ground, now)

    def untold(self, turn: int, now: float) -> None:
        """A request has ended that tells nothing."""
        self.breaker.untold(turn, now)
        if self.busy.times > 1 and not self.in_flight:
            self.busy.undo(now)  # it had gone alone, and left

    def good(self, turn: int, ground: Ground, now: float) -> None:
        """A request has ended well: what was full has room again."""
        self.share.good(now, ground.rules.window_s)
        self.breaker.good(turn, now)
        self.busy.until = 0.0
        self.busy.times = 0

    def full(self, ground: Ground, now: float) -> None:
        """It has said that it takes no more. Of many that are told so at once, the first counts."""
        if now >= self.busy.until:
            self.busy.grow(ground, now)

    def idle(self, now: float) -> bool:
        """Nothing would be lost with it."""
        return not self.in_flight and self.lets(now)

    def forgive(self) -> None:
        """The last failure was the request's own."""
        self.breaker.forgive()
        self.share.forgive()

    def bad(self, why: str, turn: int, ground: Ground, now: float) -> None:
        """A request has failed there."""
        rules, poor = ground.rules, False
        if self.breaker.stale(turn):
            return
        if self.breaker.state is _CLOSED:
            self.share.bad(now, rules.window_s)
            poor = self.share.poor(rules.answers, rules.good_share)
        if self.breaker.bad(rules.answers) or poor:
            self.breaker.open(why, ground, now)
            self.share.clear()

    def ejected(self, model: str) -> list[Ejected]:
        """What keeps requests away, for the operator."""
        found = []
        if self.breaker.state is not _CLOSED:
            trial = self.breaker.state is Ejection.TRIAL
            found.append(Ejected(self.breaker.reason, self.breaker.back_off.until, model, trial))
        if self.busy.until:
            found.append(Ejected("busy", self.busy.until, model, busy=True))
        return found
