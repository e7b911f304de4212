"""What one model on one node has shown of its speed, and how long it may be silent for that."""

import msgspec

from router.core.usage import Usage

_ANSWERS = 3  # so many have to be seen before a limit relies on them
_TIMES = 3.0  # how often the expected time may pass: a limit is no estimate
_COLD_S = 0.1  # a model that is in memory is found in a few milliseconds
_LONG_TOKENS = 64  # prefill of fewer says more of what each request costs at least
_FOLLOWED = 8  # answers that a mean follows
_SLOWER, _FASTER, _FAR_FASTER = 1 / 2, 1 / 8, 1 / 256
_EASED = 31 / 32  # what an answer in time leaves of the room that a late one was given
_ROOM = 64.0


class Waits(msgspec.Struct, frozen=True):
    """How long a node may be silent, as configured for a model, in seconds.

    `first_byte_s`: before an answer, until its speed is known, and at least before one that is
    not streamed. `first_byte_min_s`: at least before a stream. `between_s`: between two records.
    `silent_down_s`: at most in either place, for a node that fails its probes.
    """

    first_byte_s: float
    first_byte_min_s: float
    between_s: float
    silent_down_s: float


class Speed(msgspec.Struct, frozen=True):
    """What a model on a node has shown: tokens per second, and seconds to load it; None for what it
    has not."""

    prefill_tps: float | None
    decode_tps: float | None
    load_s: float | None


class Rates:
    """What the answers of one model on one node have told; None for what none has told yet.

    `load_s` is of cold loads alone; `prefill_tps` errs on the slow side. A mean follows the last
    dozen answers or so.
    """

    __slots__ = ("_room", "answers", "eval_s", "load_s", "out_tokens", "prefill_s", "prompt_s")

    def __init__(self) -> None:
        self.answers = 0
        self.load_s: float | None = None
        self.prompt_s = 0.0  # mean of an answer: what was cached took none
        self.eval_s = 0.0  # mean of an answer
        self.out_tokens = 0.0  # mean of an answer
        self.prefill_s: float | None = None  # of one token that was not cached
        self._room = 1.0  # how much longer the least is, for answers that were late

    def __repr__(self) -> str:
        known = {"load": self.load_s, "in/s": self.prefill_tps, "out/s": self.decode_tps}
        told = "".join(f" {key} {value:.4g}" for key, value in known.items() if value is not None)
        return f"<Rates of {self.answers}{told}>"

    @property
    def learned(self) -> bool:
        """Enough answers were seen to rely on their means."""
        return self.answers >= _ANSWERS

    @property
    def prefill_tps(self) -> float | None:
        return None if self.prefill_s is None else 1 / self.prefill_s

    @property
    def decode_tps(self) -> float | None:
        return self.out_tokens / self.eval_s if self.answers else None

    @property
    def speed(self) -> Speed:
        return Speed(self.prefill_tps, self.decode_tps, self.load_s)

    def learn(self, told: Usage) -> None:
        """Take what the final record of a whole answer told; what it did not tell stays as it is.

        `prompt_tokens` counts those in the node's prompt cache too, `prompt_s` does not: a hit
        looks like a fast node.
        """
        load_s, prompt_s, prompt_tokens = told.load_s, told.prompt_s, told.prompt_tokens
        if load_s is not None and load_s >= _COLD_S:
            self.load_s = _slow_to_forget(self.load_s, load_s)
        if prompt_s and prompt_tokens and prompt_tokens >= _LONG_TOKENS:
            self.prefill_s = _slow_to_forget(self.prefill_s, prompt_s / prompt_tokens)
        if told.eval_s and told.completion_tokens:
            self.answers += 1
            # The first ones count in full, or nothing would count for long.
            weight = 1 / min(self.answers, _FOLLOWED)
            self.prompt_s += weight * ((prompt_s or 0.0) - self.prompt_s)
            self.eval_s += weight * (told.eval_s - self.eval_s)
            self.out_tokens += weight * (told.completion_tokens - self.out_tokens)
            self._room = max(1.0, self._room * _EASED)

    def late(self) -> None:
        """An answer was given up before its first byte: the limit was perhaps too short, and a
        model must not fail for ever because of what it was once seen to need."""
        self._room = min(_ROOM, self._room * 2)

    def first_byte_limit_s(
        self, waits: Waits, prompt_tokens: int, ahead: int, *, streams: bool, warm: bool
    ) -> float:
        """How long the first byte of an answer may take.

        `ahead`: requests that this model has to answer before on this node. `streams` is false
        for whatever is sent only when whole. `warm`, of streams: it is in memory, as far as known;
        a load that was ever seen counts nevertheless, since it may be evicted or asked for
        otherwise.
        """
        expected_s = (self.load_s or 0.0) + ahead * (self.prompt_s + self.eval_s)
        expected_s += prompt_tokens * (self.prefill_s or 0.0)
        least_s = waits.first_byte_s
        if not streams:
            expected_s += self.eval_s
        elif self._tells(prompt_tokens, warm=warm):
            least_s = min(least_s, waits.first_byte_min_s * self._room)
        return max(least_s, _TIMES * expected_s)

    def _tells(self, prompt_tokens: int, *, warm: bool) -> bool:
        """Whether all is known that such a request may take before its first byte."""
        load = warm or self.load_s is not None
        prefill = prompt_tokens < _LONG_TOKENS or self.prefill_s is not None
        return self.learned and load and prefill


def _slow_to_forget(known: float | None, seen: float) -> float:
    """The new estimate of a cost of which some samples are far too small: a prompt that was
    cached, a model that was half loaded. One that is higher is believed sooner."""
    if known is None:
        return seen
    if seen > known:
        return known + _SLOWER * (seen - known)
    weight = _FASTER if seen > known / 2 else _FAR_FASTER
    return known + weight * (seen - known)
