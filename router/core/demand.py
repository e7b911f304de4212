"""How often each model is asked for."""

from math import exp

_FORGOTTEN_S = 300.0  # what is this long ago counts as a third
_MODELS_MAX = 4096


class Demand:
    """Requests per second, by model: the recent ones count most."""

    __slots__ = ("_seen",)

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float]] = {}  # how many, as of when

    def count(self, key: str, now: float) -> None:
        """One more request for this model."""
        many, at = self._seen.pop(key, (0.0, now))
        self._seen[key] = many * exp((at - now) / _FORGOTTEN_S) + 1.0, now
        if len(self._seen) > _MODELS_MAX:
            del self._seen[next(iter(self._seen))]

    def rate(self, key: str, now: float) -> float:
        """Requests per second."""
        many, at = self._seen.get(key, (0.0, now))
        return many * exp((at - now) / _FORGOTTEN_S) / _FORGOTTEN_S
