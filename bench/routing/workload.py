"""A trace made into requests to the pool: who sends them, for which model, and what they say."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from bench.routing.fleet import MODELS, Weights
from bench.routing.routers import Ask
from bench.routing.trace import BLOCK_TOKENS, Row, Trace

USERS = 20
_POPULARITY = 1.1  # the exponent of Zipf's law
_ACTIVITY = 0.7  # the same for users
_ESTIMATE_ERROR = 0.25  # standard deviation of the logarithm
_SAY_MAX_TOKENS = 0.4
# The first 256 KiB of a request are hashed, at four characters a token.
_HASHED_BLOCKS = 256 * 1024 // 4 // BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Request:
    """What arrives, and what nobody but the node will know: the true lengths."""

    ask: Ask
    row: Row


def workload(trace: Trace, seed: int, models: Sequence[Weights] = MODELS) -> Sequence[Request]:
    """One request for each row, numbered from 0, in its order."""
    source = Source(seed, models)
    return [source.request(number, row) for number, row in enumerate(trace)]


class Source:
    """Draws what a trace does not tell. A session keeps its user and its model."""

    def __init__(self, seed: int, models: Sequence[Weights]) -> None:
        self._chance = random.Random(seed)
        self._models = self._chance.sample(list(models), len(models))  # by popularity
        self._model_odds = _zipf(len(models), _POPULARITY)
        self._user_odds = _zipf(USERS, _ACTIVITY)
        self._sessions: dict[int, tuple[str, str]] = {}

    def model(self) -> str:
        """One by popularity."""
        return self._chance.choices(self._models, cum_weights=self._model_odds)[0].name

    def request(self, number: int, row: Row) -> Request:
        """The next request of the row's session."""
        if row.session not in self._sessions:
            self._sessions[row.session] = (self._user(), self.model())
        flow, model = self._sessions[row.session]
        return self.of(number, row, flow, model)

    def of(self, number: int, row: Row, flow: str, model: str) -> Request:
        """A request of that team for that model."""
        estimate = row.prompt_tokens * self._chance.lognormvariate(0, _ESTIMATE_ERROR)
        says = self._chance.random() < _SAY_MAX_TOKENS
        ask = Ask(
            number,
            row.at,
            flow,
            model,
            max(round(estimate), 1),
            _chained(row.blocks[:_HASHED_BLOCKS]),
            _power_of_two(row.answer_tokens) if says else None,
        )
        return Request(ask, row)

    def _user(self) -> str:
        return f"team-{self._chance.choices(range(USERS), cum_weights=self._user_odds)[0]}"


def _zipf(count: int, exponent: float) -> Sequence[float]:
    return list(accumulate((rank + 1) ** -exponent for rank in range(count)))


def _chained(blocks: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(blocks, lambda key, block: hash((key, block)), initial=0))[1:]


def _power_of_two(tokens: int) -> int:
    return 1 << (tokens - 1).bit_length()
