"""How many requests one model on one node serves at once, where nobody has configured it.

Ollama does not tell its OLLAMA_NUM_PARALLEL. But its final records tell who had to wait there for a
slot; and who begins to be answered while all that came before are still at work had one of its own.
So one request more than is known to be served at once is tried, now and then.
"""

from collections import deque
from math import inf

_WAITED_S, _WAITED_SHARE = 0.2, 0.2  # of all its time: whoever has waited so long had no slot
_GAP_S = 0.05  # if others end sooner after it has come, it cannot be told what it began by
_AT_ONCE_S = 0.001
_AGAIN_S, _AGAIN_MAX_S = 10.0, 3600.0
_ENOUGH = 3  # signs in a row have to be good: the end of another may have been seen late
_LATE = 3  # in a row, of those that should not have waited
_MOST = 64
_ENDS_MAX = 4 * _MOST


class Slots:
    """What was learned. `sure`: so many are served at once; `trying`: one more is on trial."""

    __slots__ = ("_again_s", "_ends", "_good", "_late", "_next", "sure", "trying")

    def __init__(self) -> None:
        self.sure = 1
        self.trying = False
        self._next = 0.0
        self._again_s = _AGAIN_S
        self._late = 0
        self._good = 0
        self._ends: deque[float] = deque(maxlen=_ENDS_MAX)  # when requests have ended

    def __repr__(self) -> str:
        return f"<Slots {self.sure}{'+' if self.trying else ''}>"

    def tries(self, now: float) -> int:
        """1 where it is time to try one more, else 0."""
        return int(not self.trying and now >= self._next and self.sure < _MOST)

    def lease(self, ahead: int, now: float) -> None:
        """A request goes there, with so many before it. If it is the trial, then that has gone
        wrong until there is a better sign: many requests tell nothing."""
        if ahead >= self.sure:
            self.trying = True
            self._wait(now)

    def ended(self, ahead: int) -> None:
        """It has ended, however it did."""
        if ahead >= self.sure:
            self.trying = False

    def freed(self, now: float) -> None:
        """Whatever had waited on the node for a slot has one now."""
        self._ends.append(now)

    def began(self, ahead: int, since: float, now: float) -> None:
        """The answer begins to one that came at `since`."""
        if self._gap_s(since) > now - since:
            self._fits(ahead, now)

    def learn(self, ahead: int, waited_s: float, total_s: float, now: float) -> None:
        """Take how long a request has waited on the node, that had so many before it and has
        ended now."""
        gap_s = self._gap_s(now - total_s)
        if waited_s > max(_WAITED_S, min(gap_s / 2, _WAITED_SHARE * total_s)):
            self._waited(ahead, now)
        elif gap_s > max(_GAP_S, 2 * waited_s):
            self._fits(ahead, now)

    def _gap_s(self, since: float) -> float:
        """How long after that the first request has ended; 0 where that is not known."""
        ends = self._ends
        if len(ends) == _ENDS_MAX and ends[0] > since:
            return 0.0
        return next((end for end in ends if end > since + _AT_ONCE_S), inf) - since

    def _fits(self, ahead: int, now: float) -> None:
        """It was served beside all that were before it."""
        if ahead < self.sure - 1:
            return
        self._late = 0
        if ahead < self.sure:
            return
        self._next, self._again_s = now, _AGAIN_S
        self._good += 1
        if self._good >= _ENOUGH and self.sure < _MOST:
            self.sure, self._good, self.trying = self.sure + 1, 0, False

    def _waited(self, ahead: int, now: float) -> None:
        """It was not. That tells nothing where none was before it: then others use the node."""
        if ahead >= self.sure:
            self._good = 0
            self._next = max(self._next, now + self._again_s)
        elif ahead:
            self._late += 1
            if self._late >= _LATE:
                self.sure, self._late = self.sure - 1, 0
                self._wait(now)

    def _wait(self, now: float) -> None:
        """There is no trial for some time: each time longer."""
        self._next = now + self._again_s
        self._again_s = min(2 * self._again_s, _AGAIN_MAX_S)
