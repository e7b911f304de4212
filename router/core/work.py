"""What a request asks of a node, as far as that can be told before it is answered."""

import enum
from collections.abc import Sequence
from math import inf

import msgspec


class Priority(enum.IntEnum):
    """Who goes first. One that has waited for long enough goes with those before it."""

    INTERACTIVE = 0
    NORMAL = 1
    BATCH = 2

    @property
    def word(self) -> str:
        """As headers and metrics say it."""
        return self.name.lower()


_NORMAL = Priority.NORMAL


class FlowRule(msgspec.Struct, frozen=True):
    """What a flow is given beside others: its weight, and the priority of its requests that do
    not say theirs."""

    weight: float = 1.0
    priority: Priority = _NORMAL


USUAL = FlowRule()


class Work(msgspec.Struct, frozen=True, eq=False):
    """What is known of one request's size, and of who sent it.

    `prompt_tokens`: an estimate. `blocks`: hashes of the prompt's beginnings, each of one block
    more than the one before. `max_tokens`, `num_ctx`: as the client asks, None where it does not.
    `weight`: how much of the nodes its flow is to have, beside others. `deadline`: until when it
    has to have a node, on the clock of the pool. `body_bytes`: what is held while it waits.
    `at_least`: what it asks for may be raised to the context that the model is loaded for.
    `infers`: the model has to run for it; what only asks about a model takes no slot, and waits
    for none.
    """

    flow: str = ""
    prompt_tokens: int = 0
    blocks: Sequence[int] = ()
    max_tokens: int | None = None
    num_ctx: int | None = None
    priority: Priority = _NORMAL
    deadline: float = inf
    weight: float = 1.0
    body_bytes: int = 0
    at_least: bool = False
    infers: bool = True


NO_WORK = Work()
NO_INFERENCE = Work(infers=False)
