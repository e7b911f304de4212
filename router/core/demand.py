"""What there has been of something of late, by model: how often it was asked for, say."""

from math import exp

_FORGOTTEN_S = 300.0  # what is this long ago counts as a third
_AT_ONCE_S = 1.0  # what comes within so long counts as if it came together
_MODELS_MAX = 4096


class Demand:
    """Amounts by model, of which the recent ones count most."""

    __slots__ = ("_seen",)

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float]] = {}  # how much, as of when

    def count(self, key: str, now: float, amount: float = 1.0) -> None:
        """So much more of it for this model: one request, say."""
        seen = self._seen
        before, at = seen.pop(key, (0.0, now))  # the one that was asked for longest ago is first
        if now - at >= _AT_ONCE_S:
            before, at = _left(before, at, now), now
        seen[key] = before + amount, at
        if len(seen) > _MODELS_MAX:
            del seen[next(iter(seen))]

    def total(self, key: str, now: float) -> float:
        """How much there has been, with what is five minutes ago counting as a third."""
        return _left(*self._seen.get(key, (0.0, now)), now)

    def rate(self, key: str, now: float) -> float:
        """How much there is in a second."""
        return self.total(key, now) / _FORGOTTEN_S

    def forget(self, key: str) -> None:
        """As if there had been none."""
        self._seen.pop(key, None)


def _left(amount: float, at: float, now: float) -> float:
    """What still counts of so much."""
    return amount * exp((at - now) / _FORGOTTEN_S)
