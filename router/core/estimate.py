"""How long things take on a node: learned, and guessed from sizes where nothing was learned."""

from collections.abc import Callable, Iterable
from math import exp, log
from typing import TypeVar

import msgspec

from router.core.rates import Rates
from router.core.types import UNTOLD_BYTES

# A 24 GB GPU of 2022 decodes a model of 4.7 GB at 75 tokens a second. Only guesses rest on these.
_DECODE_BYTES_PER_S = 350e9
_PREFILL_PER_DECODE = 30.0
_LOAD_S, _LOAD_BYTES_PER_S = 1.0, 2e9
_TOKENS = 300.0  # of an answer
_MEAN = 1 / 16
_MEANS_MAX = 4096

_K = TypeVar("_K")


class Cost(msgspec.Struct, frozen=True, eq=False):
    """Seconds: `load_s` to load a model, `prefill_s` and `decode_s` for one token."""

    load_s: float
    prefill_s: float
    decode_s: float


def guess(size_bytes: float, pace: float = 1.0) -> Cost:
    """What a model of this size costs, as far as that tells; `pace` is how much slower than
    guessed its node is."""
    decode_s = _decode_s(size_bytes, pace)
    return Cost(_load_s(size_bytes, pace), decode_s / _PREFILL_PER_DECODE, decode_s)


def _load_s(size_bytes: float, pace: float) -> float:
    return (_LOAD_S + (size_bytes or UNTOLD_BYTES) / _LOAD_BYTES_PER_S) * pace


def _decode_s(size_bytes: float, pace: float) -> float:
    return (size_bytes or UNTOLD_BYTES) / _DECODE_BYTES_PER_S * pace


def cost(size_bytes: float, rates: Rates | None, pace: Callable[[], float]) -> Cost:
    """What a model costs: what was learned of it, and what nobody has told guessed."""
    if rates is None:
        return guess(size_bytes, pace())
    load_s = rates.load_s
    if load_s is None:
        load_s = _load_s(size_bytes, pace())
    if rates.answers:
        return learned(load_s, rates)
    decode_s = _decode_s(size_bytes, pace())
    return Cost(load_s, rates.prefill_s or decode_s / _PREFILL_PER_DECODE, decode_s)


def learned(load_s: float, rates: Rates) -> Cost:
    """What a model costs that has answered, and takes so long to load."""
    decode_s = rates.eval_s / rates.out_tokens
    return Cost(load_s, rates.prefill_s or decode_s / _PREFILL_PER_DECODE, decode_s)


def pace(known: Iterable[tuple[float, Rates]], weight: float) -> float:
    """How much slower than guessed a node is, told by its models' sizes and rates; by its
    configured weight where none was learned."""
    ratios = [
        _DECODE_BYTES_PER_S / (rates.decode_tps * (size or UNTOLD_BYTES))
        for size, rates in known
        if rates.decode_tps
    ]
    if not ratios:
        return 1 / weight
    return exp(sum(map(log, ratios)) / len(ratios))


class Lengths:
    """How long answers are, by model and flow, in tokens."""

    __slots__ = ("_by_flow", "_by_model")

    def __init__(self) -> None:
        self._by_model: dict[str, float] = {}
        self._by_flow: dict[tuple[str, str], float] = {}

    def expected(self, key: str, flow: str, max_tokens: int | None) -> float:
        found = self._by_flow.get((key, flow)) or self._by_model.get(key, _TOKENS)
        return found if max_tokens is None else min(found, float(max_tokens))

    def learn(self, key: str, flow: str, tokens: int) -> None:
        """Take the length of one answer."""
        mean = _follow(self._by_model, key, tokens, tokens)
        _follow(self._by_flow, (key, flow), mean, tokens)


def _follow(means: dict[_K, float], key: _K, first: float, seen: float) -> float:
    """Move a mean towards what was seen, from `first` on; the one that moved longest ago makes
    room."""
    before = means.pop(key, first)
    mean = means[key] = before + _MEAN * (seen - before)
    if len(means) > _MEANS_MAX:
        del means[next(iter(means))]
    return mean
