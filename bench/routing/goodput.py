"""Goodput: the highest rate of requests at which enough of them begin to be answered soon."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from bench.routing.experiment import SOON_S, Case, requests, run
from bench.routing.scenario import FLOOD

SHARES = (0.9, 0.8)  # what is good enough, and what is nearly so
_LOWEST, _START, _HIGHEST = 200.0, 2000.0, 10_000.0  # an hour
_STEP = 1.1
_MISSES = 2
_HALVINGS = 2


def goodput(case: Case, seeds: Sequence[int], share: float = SHARES[0]) -> float:
    """The highest rate at which this share has its first token within 10 s, in requests an hour, to
    3 %: of all seeds together. 0 where no rate is good enough."""
    return highest(lambda rate: good(replace(case, per_hour=rate), seeds, share))


def good(case: Case, seeds: Sequence[int], share: float = SHARES[0]) -> bool:
    """Whether so many do. Stops at the first seed that settles it."""
    count = sum(one.ask.flow != FLOOD for seed in seeds for one in requests(case, seed))
    left = (1 - share) * count
    for seed in seeds:
        served = [one for one in run(case, seed, SOON_S).served if one.flow != FLOOD]
        left -= sum(one.first_s > SOON_S for one in served)
        if left < 0:
            return False
    return True


def highest(is_good: Callable[[float], bool]) -> float:
    """Searched in small steps, as it is no threshold: where few requests come models go cold
    between them. From the middle upwards, until two in a row are not good, and else downwards."""
    best, missed, rate = 0.0, 0, _START
    while missed < _MISSES and rate < _HIGHEST:
        best, missed = (rate, 0) if is_good(rate) else (best, missed + 1)
        rate *= _STEP
    rate = _START / _STEP
    while not best and rate > _LOWEST:
        best = rate if is_good(rate) else 0.0
        rate /= _STEP
    return _refined(is_good, best, best * _STEP) if best else 0.0


def _refined(is_good: Callable[[float], bool], low: float, high: float) -> float:
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if is_good(middle) else (low, middle)
    return low
