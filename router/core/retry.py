"""After a failed attempt: again on this node, elsewhere, or give up."""

import enum

from router.core.types import Failure, FailureKind


class Verdict(enum.Enum):
    """What the failure of an attempt leads to."""

    FRESH = "fresh"  # again on this node, over a new connection
    ELSEWHERE = "elsewhere"
    GIVE_UP = "give-up"


_STATUS = {
    FailureKind.REFUSED: 503,
    FailureKind.BUSY: 503,
    FailureKind.CONNECT: 503,
    FailureKind.RESET: 502,
    FailureKind.GARBAGE: 502,
    FailureKind.FIRST_BYTE_TIMEOUT: 504,
    FailureKind.STALLED: 504,
}


def decide(failure: Failure) -> Verdict:
    """What may be done before the client has seen a byte.

    A kept connection that the node closed while it idled gives not one byte: the node has not
    read the request. Anything else that was sent may have been acted upon.
    """
    if failure.kind is FailureKind.RESET and failure.reused and not failure.received:
        return Verdict.FRESH
    if not failure.sent:
        return Verdict.ELSEWHERE
    return Verdict.GIVE_UP


def status(failure: Failure) -> int:
    """The HTTP status that tells the client of this failure."""
    return _STATUS[failure.kind]
