"""The pool: eight unequal nodes and twelve models. Speeds are plausible settings for cards of
such sizes, not measurements."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from bench.routing.routers import FleetView, ModelView, NodeView
from bench.routing.trace import BLOCK_TOKENS
from router.sim.models import GB, SimModel, SimSpec

NUM_CTX = 16_384
COPIES = 3
_CONTENTION = 0.7
_USABLE_BANDWIDTH = 0.75
_ATTENTION_BYTES = 0.4 * GB  # read for every token beside the weights
_LOAD_START_S = 1.0


class Layout(StrEnum):
    """Which nodes have a model on disk."""

    EVERYWHERE = "everywhere"  # all that it fits on
    THREE = "three"  # three of these


@dataclass(frozen=True, slots=True)
class Card:
    """A node's hardware. `bandwidth` is of the memory, `load_bandwidth` of what is read from disk
    or page cache into it, both GB/s; `prefill` is thousands of tokens of a 1 B model per second."""

    name: str
    gpus: tuple[int, ...]  # GB
    bandwidth: float
    prefill: float
    load_bandwidth: float
    num_parallel: int
    max_loaded: int

    @property
    def memory_bytes(self) -> int:
        return sum(self.gpus) * GB


@dataclass(frozen=True, slots=True)
class Weights:
    """A model, and how many billions of parameters it has."""

    name: str
    gb: float
    billions: float
    context_length: int = 131_072


CARDS = (
    Card("a-96", (48, 48), 960, 90, 1.5, 2, 4),
    Card("b-80", (80,), 1900, 90, 1.5, 2, 3),
    Card("c-48", (24, 24), 1000, 56, 1.0, 2, 4),
    Card("d-48", (48,), 770, 45, 1.0, 2, 3),
    Card("e-24", (24,), 1000, 60, 1.0, 4, 3),
    Card("f-24", (24,), 930, 36, 0.75, 2, 3),
    Card("g-16", (16,), 720, 40, 0.75, 1, 3),
    Card("h-12", (12,), 360, 18, 0.5, 1, 3),
)
MODELS = (
    Weights("llama3.2:3b", 2.0, 3.2),
    Weights("qwen3:4b", 2.6, 4.0),
    Weights("mistral:7b", 4.1, 7.2),
    Weights("qwen2.5:7b", 4.7, 7.6),
    Weights("llama3.1:8b", 4.9, 8.0),
    Weights("gemma3:12b", 8.1, 12.2),
    Weights("qwen2.5:14b", 9.0, 14.8),
    Weights("gpt-oss:20b", 13.0, 20.9),
    Weights("mistral-small:24b", 14.0, 23.6),
    Weights("gemma3:27b", 17.0, 27.4),
    Weights("qwen2.5:32b", 20.0, 32.8),
    Weights("llama3.3:70b", 40.0, 70.6),
)
_BILLIONS = {model.name: model.billions for model in MODELS}
CLASSES: Sequence[tuple[str, float]] = (("to 8B", 8.0), ("to 34B", 34.0), ("70B", 71.0))


def class_of(model: str) -> str:
    """The class of a model by its size, for reports."""
    return next(name for name, most in CLASSES if _BILLIONS[model] <= most)


def fleet(layout: Layout, seed: int, models: Sequence[Weights] = MODELS) -> Sequence[SimSpec]:
    """The nodes, with nothing loaded. `seed` chooses the copies of `Layout.THREE`."""
    chance = random.Random(seed)
    held: dict[str, set[str]] = {}
    for model in models:
        fits = [card.name for card in CARDS if _fits(card, model)]
        if layout is Layout.THREE:
            fits = chance.sample(fits, min(COPIES, len(fits)))
        held[model.name] = set(fits)
    return [_node(card, [m for m in models if card.name in held[m.name]]) for card in CARDS]


def view(specs: Sequence[SimSpec], cards: Sequence[Card] = CARDS) -> FleetView:
    """What a router is told of the nodes before anything is sent."""
    order = sorted(cards, key=lambda card: -card.prefill * card.bandwidth)
    return [
        NodeView(
            card.name,
            spec.num_parallel,
            tuple(size * GB for size in card.gpus),
            order.index(card) + 1,
            tuple(
                ModelView(one.name, one.size_bytes, one.parameter_size, one.digest)
                for one in spec.models
            ),
        )
        for card, spec in zip(cards, specs, strict=True)
    ]


def _node(card: Card, models: Collection[Weights]) -> SimSpec:
    bare = _limits(card)
    return replace(bare, models=tuple(_timed(card, model) for model in models))


def _limits(card: Card) -> SimSpec:
    return SimSpec(
        num_parallel=card.num_parallel,
        max_loaded=card.max_loaded,
        memory_bytes=card.memory_bytes,
        default_num_ctx=NUM_CTX,
        block_tokens=BLOCK_TOKENS,
        contention=_CONTENTION,
        gpus=len(card.gpus),
    )


def _timed(card: Card, model: Weights) -> SimModel:
    read_bytes = model.gb * GB + _ATTENTION_BYTES
    return SimModel(
        model.name,
        size_bytes=int(model.gb * GB),
        parameter_size=f"{model.billions}B",
        context_length=model.context_length,
        load_s=_LOAD_START_S + model.gb / card.load_bandwidth,
        prefill_tps=card.prefill * 1000 / model.billions,
        decode_tps=card.bandwidth * GB * _USABLE_BANDWIDTH / read_bytes,
    )


def _fits(card: Card, model: Weights) -> bool:
    spec = _limits(card)
    timed = _timed(card, model)
    return spec.reserved_bytes(timed, spec.num_ctx(timed, None)) <= card.memory_bytes
