"""How many requests one model on one node serves at once, where nobody has configured it.

Ollama does not tell its OLLAMA_NUM_PARALLEL. But it serves requests in the order in which they
come: when one begins to be served, all that went there before it and have not ended are served,
too. So many slots there are at least, and if it has waited for one, at most. Final records tell how
long each has waited on the node. So a few more than are known to be served at once are tried.
"""

from bisect import bisect_right
from collections import deque
from math import inf

# What is sooner or later by less may have been the other way round: ends are seen late. In seconds,
# or of what an answer takes.
_SLACK_S, _SLACK_MIN_S, _SLACK_SHARE = 0.05, 0.002, 0.15
# Until the next trial, in seconds or answers: at first whichever is less, in the end more.
_AGAIN_S, _AGAIN_SHARE = 10.0, 2.5
_AGAIN_MAX_S, _AGAIN_MAX_SHARE = 300.0, 40.0
_ENOUGH, _ENOUGH_MAX = 3, 12  # signs in a row have to be good; each time there were fewer, twice
_BAD = 2  # signs in a row end a rise
_LATE = 3  # more of those that should not have waited did than did not
_UNTOLD = 4  # trials tell nothing; while it rises, for each that is there
_PART = 1 / 16  # of what is new in a mean
_MOST = 64
_ENDS_MAX = 4 * _MOST
LINE = 1 << 32  # more places than any line has


class Slots:
    """What was learned. `sure`: so many are served at once. Places are numbered from `first` on."""

    __slots__ = (
        "_again_s", "_bad", "_ended", "_ends", "_enough", "_first", "_good", "_late", "_least_s",
        "_next", "_rises", "_service_s", "_trial", "_untold", "_width", "sure",
    )  # fmt: skip

    def __init__(self, first: int = 0) -> None:
        self.sure = 1
        self._rises = True  # as far as is known there are more; else one is tried at a time
        self._width = 1  # so many are tried at once while it rises; 0: one has waited
        self._trial = -1  # the place of the one that is tried
        self._untold = 0  # trials since the last sign
        self._good: dict[int, int] = {}  # so many there were at least, as these places tell
        self._bad = 0  # trials that have waited since the last good sign
        self._late: list[int] = []  # so many at most, by those that should not have waited
        self._enough = _ENOUGH
        self._next = 0.0
        self._again_s = 0.0  # 0: as at first
        self._first = self._ended = first
        self._ends: deque[float] = deque(maxlen=_ENDS_MAX)  # when the last of them did
        self._service_s = 0.0  # what an answer takes that has a slot
        self._least_s = inf  # what every one takes before, with nobody to wait for

    def __repr__(self) -> str:
        return f"<Slots {self.sure}{'+' if self._rises or self._trial >= 0 else ''}>"

    def tries(self, now: float) -> int:
        """How many more than is sure may be there now, to see whether they are served."""
        if self.sure >= _MOST:
            return 0
        if self._rises:
            return min(self._width or 1, _MOST - self.sure)
        return int(self._trial < 0 and now >= self._next)

    def lease(self, ahead: int, now: float) -> int:
        """A request goes there, with so many before it that have not ended; gives its place. If it
        is a trial, then that has gone wrong until there is a better sign: many tell nothing."""
        place = self._ended + ahead
        if ahead >= self.sure:
            self._untold += 1
            if self._rises:
                if self._untold > _UNTOLD * (self.sure + 1):
                    self._rest(now)
            else:
                self._trial = place
                self._wait(now, longer=self._bad > 0 or self._untold >= _UNTOLD)
        return place

    def ended(self, place: int, now: float) -> None:
        """It has ended, however it did: whatever waited on the node for a slot has one now."""
        if place == self._trial:
            self._trial = -1
        self._ended += 1
        self._ends.append(now)

    def began(self, place: int) -> None:
        """An answer begins."""
        told = self._service_s > 0  # then one less: durations show who was overtaken, this does not
        self._fits(place, place + 1 - told - self._ended)

    def learn(self, place: int, waited_s: float, total_s: float, now: float) -> None:
        """Take how long a request has waited on the node that has ended now, of all the time that
        it was there with the model loaded. Its place may be one in another model's line: its name
        stood for that when it came."""
        if not 0 <= place - self._first < LINE:
            return
        slack_s = self._slack_s(total_s - waited_s)
        self._least_s = least_s = min(self._least_s, waited_s)
        start, ends = now - total_s + waited_s, self._ends
        before = start - slack_s - least_s
        if len(ends) == _ENDS_MAX and ends[0] > before:
            return  # nobody knows any more how many had ended by then
        left = place + 1 - self._ended + len(ends)
        least, most = left - bisect_right(ends, start + slack_s), left - bisect_right(ends, before)
        if waited_s - least_s > slack_s and most > least:  # until another ended
            self._waited(most - 1, now)
        else:
            self._least_s += _PART * min(waited_s - least_s, slack_s)
            if most >= self.sure and self._late:
                del self._late[0]
        self._fits(place, least)

    def _slack_s(self, service_s: float) -> float:
        """By how much times have to differ to tell anything."""
        mean_s = self._service_s
        self._service_s = mean_s = mean_s + _PART * (service_s - mean_s) if mean_s else service_s
        return max(_SLACK_MIN_S, min(_SLACK_S, _SLACK_SHARE * mean_s))

    def _fits(self, place: int, least: int) -> None:
        """So many were served at once."""
        if least < self.sure:
            return
        self._late.clear()
        if least > self.sure:
            self._rises, self._untold, self._bad = True, 0, 0
            self._good[place] = max(least, self._good.get(place, 0))
            if len(self._good) >= self._enough:
                self._raise()

    def _raise(self) -> None:
        """As many are sure as enough of them tell."""
        self.sure = sure = min(sorted(self._good.values())[-self._enough], _MOST)
        self._good = {place: least for place, least in self._good.items() if least > sure}
        self._width = min(2 * self._width, sure // 2) or 1
        self._trial, self._again_s = -1, 0.0

    def _waited(self, most: int, now: float) -> None:
        """No more than so many were. Where none was before it, others use the node."""
        self._width = 0
        if most > self.sure or most <= 0:
            return
        self._good.clear()
        self._bad += 1
        if not self._rises:
            self._next = max(self._next, now + self._again_s)
        elif self._bad >= _BAD:
            self._rest(now)
        if most < self.sure:
            self._late.append(most)
            if len(self._late) >= _LATE:
                self._lower()

    def _lower(self) -> None:
        """Those are too many. It takes more signs to believe in them again."""
        self.sure = max(*self._late, self.sure // 2)
        self._late.clear()
        self._enough = min(2 * self._enough, _ENOUGH_MAX)

    def _rest(self, now: float) -> None:
        """It rises no more."""
        self._good.clear()
        self._rises = False
        self._wait(now, longer=True)

    def _wait(self, now: float, *, longer: bool) -> None:
        """There is no trial for some time, and for longer the next time."""
        mean_s = self._service_s
        again_s = self._again_s or min(_AGAIN_S, _AGAIN_SHARE * mean_s or _AGAIN_S)
        self._next = now + again_s
        if longer:
            again_s = min(2 * again_s, max(_AGAIN_MAX_S, _AGAIN_MAX_SHARE * mean_s))
            self._untold = self._bad = 0
        self._again_s = again_s
