"""What a router is asked and told in virtual time: what HTTP would tell it, and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Ask:
    """A request as the router reads it at `at`. `flow` is its team.

    `prompt_tokens` is an estimate from the number of characters, so it is wrong by some tens of
    percent. `blocks` are chained hashes of the prompt's pieces of 512 tokens, of its first 256 KiB
    at most. `max_tokens` and `num_ctx` are None where the client sent none.
    """

    number: int
    at: float
    flow: str
    model: str
    prompt_tokens: int
    blocks: tuple[int, ...]
    max_tokens: int | None = None
    num_ctx: int | None = None


@dataclass(frozen=True, slots=True)
class Final:
    """The numbers of Ollama's final record: `prompt_tokens` counts cached ones too, `prompt_s` is
    the time of the others, `load_s` runs from entry to runner ready. What `total_s` has beyond
    the rest was waited for a slot. All zero for one that the node refused as busy."""

    prompt_tokens: int = 0
    prompt_s: float = 0.0
    tokens: int = 0
    decode_s: float = 0.0
    load_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """One model of a node's `/api/ps`. `expires_in_s` may be infinite."""

    model: str
    size_bytes: int
    num_ctx: int
    expires_in_s: float
    digest: str


@dataclass(frozen=True, slots=True)
class Decision:
    """Send it to that node (an index into the fleet), or, with None, refuse it."""

    ask: Ask
    node: int | None


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model on a node's disk, as `/api/tags` tells it."""

    name: str
    size_bytes: int
    parameter_size: str
    digest: str


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as the YAML and `/api/tags` tell it. `slots` is its OLLAMA_NUM_PARALLEL, `gpus` the
    memory of each in bytes, `priority` where an operator would put it: 1 is the fastest."""

    name: str
    slots: int
    gpus: tuple[int, ...]
    priority: int
    models: tuple[ModelView, ...]


FleetView = Sequence[NodeView]


class Router(Protocol):
    """Decides which node gets what, and when. `now` is in seconds and never goes back.

    `take` is asked after every other call and at `wake_at`, until it has nothing more to send.
    """

    def arrive(self, ask: Ask, now: float) -> None:
        """A request came in."""

    def first(self, ask: Ask, now: float) -> None:
        """Its first token came."""

    def ended(self, ask: Ask, final: Final, now: float) -> None:
        """Its last record came."""

    def looked(self, node: int, loaded: Sequence[Loaded], now: float) -> None:
        """A node answered `/api/ps`."""

    def take(self, now: float) -> Sequence[Decision]:
        """What is to be sent now."""
        ...

    def wake_at(self) -> float | None:
        """When to ask again though nothing has happened; None: not before something does."""
        ...


class Make(Protocol):
    """Builds a router for one run."""

    def __call__(self, view: FleetView, seed: int) -> Router:
        """A router that has seen nothing yet. The same seed makes the same choices."""
        ...
