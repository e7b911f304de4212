"""Arrivals made up with the statistics of the public traces, for those who have none at hand.

The constants were read off the two traces once (see `TRACES`): quantiles of lengths, of turns per
conversation, of the time between turns, and how the rate moves from minute to minute.
"""

import bisect
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.routing.trace import Row, Trace, own

_MINUTE_S = 60.0
_LONGEST = 126_000  # tokens; the longest prompt of both traces
_AT = (0.0, 0.01, 0.10, 0.25, 0.50, 0.75, 0.90, 0.99, 1.0)
Quantiles = Sequence[float]  # the values at `_AT`


@dataclass(frozen=True, slots=True)
class Statistics:
    """What one trace looks like.

    `first` and `answer` are tokens, `grows` is what a turn's prompt is longer than the one before
    it, `turns` counts the requests of a conversation, `gap_s` lies between two of them. `swing` is
    the standard deviation of the logarithm of the rate, `memory` its correlation from one minute
    to the next. `shared_block`: all prompts begin with the same 512 tokens.
    """

    first: Quantiles
    answer: Quantiles
    swing: float
    memory: float
    turns: Quantiles = (1,) * 9
    gap_s: Quantiles = (1,) * 9
    grows: Quantiles = (0,) * 9
    shared_block: bool = False


MOONCAKE = Statistics(
    first=(891, 894, 905, 1336, 5264, 13_056, 25_561, 89_869, 126_195),
    answer=(1, 3, 24, 156, 350, 472, 597, 1120, 2000),
    swing=0.10,
    memory=0.5,
    # A whole number is its own half-open step: 69 % have one turn, 18 % two.
    turns=(1, 1, 1, 1, 1.4, 2.3, 3.3, 8, 43),
    gap_s=(6, 12, 42, 66, 123, 264, 480, 1482, 3030),
    grows=(0, 0, 0, 188, 455, 908, 4633, 17_472, 91_918),
    shared_block=True,
)
AZURE = Statistics(
    first=(2, 29, 207, 396, 1020, 1189, 2735, 4142, 14_050),
    answer=(7, 16, 54, 85, 129, 395, 424, 601, 1000),
    swing=0.22,
    memory=0.81,
)
TRACES = {"mooncake": MOONCAKE, "azure": AZURE}


def generate(look: Statistics, per_hour: float, seed: int, seconds: float = 3600.0) -> Trace:
    """About `per_hour` requests an hour for so many seconds."""
    chance = random.Random(seed)
    turns = sum(math.floor(value(look.turns, (n + 0.5) / 1000)) for n in range(1000)) / 1000
    rows: list[Row] = []
    for session, start in enumerate(_starts(look, per_hour / turns, chance, seconds)):
        rows += [row for row in _conversation(look, session, start, chance) if row.at < seconds]
    return sorted(rows, key=lambda row: row.at)


def value(quantiles: Quantiles, share: float) -> float:
    """The value that a `share` of all lies below. Between two known ones it grows by a constant
    factor, as the long tails of such lengths do."""
    right = min(max(bisect.bisect_right(_AT, share), 1), len(_AT) - 1)
    low, high = quantiles[right - 1], quantiles[right]
    part = (share - _AT[right - 1]) / (_AT[right] - _AT[right - 1])
    return low * (high / low) ** part if low > 0 else low + (high - low) * part


def _starts(
    look: Statistics, per_hour: float, chance: random.Random, seconds: float
) -> Iterator[float]:
    """Random arrivals at a rate that wanders from minute to minute around its mean."""
    log_rate = chance.gauss(0, look.swing)
    now = minute = 0.0
    while now < seconds:
        rate = per_hour / 3600 * math.exp(log_rate - look.swing**2 / 2)
        minute += _MINUTE_S
        # Without memory of the last arrival, a new draw at each change of the rate is exact.
        while (now := now + chance.expovariate(rate)) < min(minute, seconds):
            yield now
        now = minute
        left = math.sqrt(1 - look.memory**2) * look.swing
        log_rate = look.memory * log_rate + chance.gauss(0, left)


def _conversation(
    look: Statistics, session: int, start: float, chance: random.Random
) -> Iterator[Row]:
    """Each turn repeats the whole blocks of the one before it."""
    roll = chance.random
    prompt = value(look.first, roll())
    for _ in range(math.floor(value(look.turns, roll()))):
        tokens = min(max(int(prompt), 1), _LONGEST)
        blocks = own(session + 1, tokens)
        if look.shared_block:
            blocks = (0, *blocks[1:]) if blocks else blocks
        yield Row(start, session, tokens, max(int(value(look.answer, roll())), 1), blocks)
        start += value(look.gap_s, roll())
        prompt += value(look.grows, roll())
