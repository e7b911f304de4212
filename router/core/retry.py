"""After a failed attempt: again on this node, elsewhere, or give up; and how often, in all."""

import enum
from collections import deque
from collections.abc import Iterable

from router.core.types import Failure, FailureKind, Resilience


class Verdict(enum.Enum):
    """What the failure of an attempt leads to."""

    FRESH = "fresh"  # again on this node, over a new connection
    ELSEWHERE = "elsewhere"
    GIVE_UP = "give-up"


_STATUS = {
    FailureKind.REFUSED: 503,
    FailureKind.BUSY: 503,
    FailureKind.CONNECT: 503,
    FailureKind.OURS: 503,
    FailureKind.RESET: 502,
    FailureKind.GARBAGE: 502,
    FailureKind.ANSWERED: 502,
    FailureKind.FIRST_BYTE_TIMEOUT: 504,
    FailureKind.STALLED: 504,
    FailureKind.ASTRAY: 502,
    FailureKind.MISSING: 404,
}
# Which failure tells the client most, of several. An answer says more than none.
_TELLING = (
    FailureKind.ANSWERED, FailureKind.STALLED, FailureKind.FIRST_BYTE_TIMEOUT, FailureKind.RESET,
    FailureKind.GARBAGE, FailureKind.BUSY, FailureKind.OURS, FailureKind.CONNECT,
    FailureKind.REFUSED, FailureKind.ASTRAY, FailureKind.MISSING,
)  # fmt: skip
_UNABLE = frozenset((501, 505))  # not here, so nowhere: a model without the skill, for one


def judge(status: int, *, had_model: bool) -> FailureKind | None:
    """Whether an answer is one that another node may give better; None for what is the client's.

    `had_model`: the node was believed to have the model.
    """
    if status < 500:
        return FailureKind.MISSING if status == 404 and had_model else None
    if status in _UNABLE:
        return None
    return FailureKind.BUSY if status == 503 else FailureKind.ANSWERED


def decide(failure: Failure, *, changes: bool = False, left: int = 1) -> Verdict:
    """What may be done before the client has seen a byte.

    A kept connection that the node closed while it idled gives not one byte: the node has not
    read the request. `changes`: it changes something outside the node, so nothing that was sent
    may be sent again. `left`: how many other nodes may still be asked.
    """
    if failure.kind is FailureKind.RESET and failure.reused and not failure.received:
        return Verdict.FRESH
    if left <= 0 or (changes and failure.sent):
        return Verdict.GIVE_UP
    return Verdict.ELSEWHERE


def telling(failures: Iterable[Failure]) -> Failure:
    """The failure to tell the client of, of those that a request has met; the last of its kind."""
    return min(reversed(list(failures)), key=lambda failure: _TELLING.index(failure.kind))


def status(failure: Failure) -> int:
    """The HTTP status that tells the client of this failure."""
    return failure.status or _STATUS[failure.kind]


class Budget:
    """How many requests are being tried again after an answer: a share of all in flight, or a few
    in some seconds, so that failure does not multiply load."""

    __slots__ = ("_recent", "running")

    def __init__(self) -> None:
        self.running = 0
        self._recent: deque[float] = deque()

    def take(self, in_flight: int, rules: Resilience, now: float) -> bool:
        """Count one more, if there is room for it."""
        recent = self._recent
        while recent and (recent[0] <= now - rules.budget_s or len(recent) > rules.budget_least):
            recent.popleft()
        if len(recent) >= rules.budget_least and self.running >= rules.budget * in_flight:
            return False
        recent.append(now)
        self.running += 1
        return True

    def give(self) -> None:
        self.running -= 1
