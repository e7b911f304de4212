"""What clients ask, and what the one right answer to it is, whichever nodes give it."""

import enum
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router.sim import text
from router.sim.models import PRESETS
from router.sim.prompt import Message, Prompt, of_messages, of_raw
from tests.chaos.fleet import EMBEDDER, OTHER
from tests.rig import MODEL


class Kind(enum.StrEnum):
    """Kinds of clients."""

    CHAT = "chat, streamed"
    OPENAI = "OpenAI chat, streamed"
    RAW = "raw generate, streamed"
    WHOLE = "chat, whole"
    OPENAI_WHOLE = "OpenAI chat, whole"
    EMBED = "embeddings"
    OTHER = "chat with another model"
    PINNED = "chat, pinned to a node"


# Those that any node may answer, and for which ollamux promises an answer.
SAFE = tuple(kind for kind in Kind if kind is not Kind.PINNED)
STREAMED = (Kind.CHAT, Kind.OPENAI, Kind.RAW)
_PATHS = {
    Kind.OPENAI: "/v1/chat/completions",
    Kind.OPENAI_WHOLE: "/v1/chat/completions",
    Kind.RAW: "/api/generate",
    Kind.EMBED: "/api/embed",
}
_WORDS = ("why", "is", "the", "sky", "blue", "größer", "漢字", '"quoted"', "<b>", "und", "dann")


@dataclass(frozen=True)
class Order:
    """One request and its right answer: `tokens` of text, or an embedding.

    `cap`: the client wants no more tokens than that. `usage`: it wants the token counts."""

    number: str
    kind: Kind
    model: str
    body: bytes
    tokens: Sequence[str] = ()
    embedding: Sequence[float] = ()
    capped: bool = False
    usage: bool = False

    @property
    def path(self) -> str:
        return _PATHS.get(self.kind, "/api/chat")

    @property
    def openai(self) -> bool:
        return self.path.startswith("/v1/")

    @property
    def streamed(self) -> bool:
        return self.kind not in (Kind.WHOLE, Kind.OPENAI_WHOLE, Kind.EMBED)

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    @property
    def reason(self) -> str:
        """Why the answer ends."""
        return "length" if self.capped else "stop"


@dataclass(frozen=True)
class Catalog:
    """Makes orders. `bounds` are those of the nodes' answers, `nodes` what pins may name; `capped`
    is the share of clients that limit the length of their answer."""

    bounds: tuple[int, int]
    nodes: Sequence[str] = ()
    capped: float = 0.2

    def order(self, number: str, kind: Kind, dice: random.Random) -> Order:
        """A new order, with a prompt that no other one has: `number` is part of it."""
        model = {Kind.OTHER: OTHER, Kind.EMBED: EMBEDDER}.get(kind, MODEL)
        prompt = f"{number} {' '.join(dice.choices(_WORDS, k=dice.randint(1, 12)))}"
        named = f"{model}@{dice.choice(self.nodes)}" if kind is Kind.PINNED else model
        if kind is Kind.EMBED:
            length = PRESETS[f"{model}:latest"].embedding_length
            vector = text.vector(f"{model}:latest", prompt, length)
            return Order(number, kind, model, _json(model=model, input=prompt), embedding=vector)
        usage = kind is Kind.OPENAI and dice.random() < 0.5
        tokens = text.words(model, _read(kind, prompt).text, self.bounds)
        cap = dice.randint(1, self.bounds[1]) if dice.random() < self.capped else None
        if cap == len(tokens):
            cap += 1  # whether such an answer has ended by itself is not to be known
        fields = _fields(kind, prompt, cap, usage=usage)
        capped = cap is not None and cap < len(tokens)
        body = _json(model=named, **fields)
        kept = tokens[:cap] if capped else tokens
        return Order(number, kind, model, body, kept, capped=capped, usage=usage)


def _raw(prompt: str) -> str:
    return f"[INST] {prompt} [/INST]"


def _read(kind: Kind, prompt: str) -> Prompt:
    """How a simulated model reads what is asked."""
    if kind is Kind.RAW:
        return of_raw(_raw(prompt))
    return of_messages([Message("user", prompt)])


def _fields(kind: Kind, prompt: str, cap: int | None, *, usage: bool) -> Mapping[str, Any]:
    openai = kind in (Kind.OPENAI, Kind.OPENAI_WHOLE)
    limit: dict[str, Any] = {}
    if cap is not None:
        limit = {"max_tokens": cap} if openai else {"options": {"num_predict": cap}}
    if kind is Kind.RAW:
        return {"prompt": _raw(prompt), "raw": True, **limit}
    stream = kind not in (Kind.WHOLE, Kind.OPENAI_WHOLE)
    options = {"stream_options": {"include_usage": True}} if usage else {}
    messages = [{"role": "user", "content": prompt}]
    return {"messages": messages, "stream": stream, **options, **limit}


def _json(**fields: Any) -> bytes:
    return json.dumps(fields).encode()
