"""What a request comes down to on every API, and the answer to it before it is spelled out."""

import enum
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from router.sim import text
from router.sim.models import SimModel
from router.sim.prompt import Prompt
from router.sim.runner import Job


@dataclass(frozen=True, slots=True)
class Ask:
    """One inference request. `name` is the model as the client spelled it.

    `cap` is the most tokens to answer with, None for no limit. `schema` is what the answer must
    fit (any JSON for a plain "json"), None for prose. `tools` maps names to JSON schemas of their
    arguments. The last four settings are for the scheduler, see `Job`.
    """

    name: str
    model: SimModel
    prompt: Prompt
    stream: bool
    cap: int | None = None
    think: bool = False
    schema: object = None
    tools: Mapping[str, object] = field(default_factory=dict)
    num_ctx: int | None = None
    options: Hashable = ()
    keep_alive_s: float | None = None


class PieceKind(enum.StrEnum):
    """What a piece of an answer is."""

    THINKING = "thinking"
    CONTENT = "content"
    CALL = "call"


class Call(NamedTuple):
    """A call of one of the client's tools. `identity` is unique within a conversation."""

    identity: str
    name: str
    arguments: object


class Piece(NamedTuple):
    """What one record carries. A call comes whole, whatever number of tokens it took."""

    kind: PieceKind
    text: str
    tokens: int = 1
    call: Call | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A full answer. `done_reason` is "stop", or "length" when the cap cut it."""

    pieces: tuple[Piece, ...]
    done_reason: str

    @property
    def tokens(self) -> int:
        """Tokens the model generates for it."""
        return sum(piece.tokens for piece in self.pieces)

    def joined(self, kind: PieceKind) -> str:
        """All text of one kind."""
        return "".join(piece.text for piece in self.pieces if piece.kind is kind)

    @property
    def calls(self) -> list[Call]:
        """The tool calls in it."""
        return [piece.call for piece in self.pieces if piece.call is not None]


def compose(ask: Ask, bounds: tuple[int, int]) -> Answer:
    """The answer to `ask`. `bounds` are the fewest and the most tokens of one without a cap."""
    pieces = [*_thinking(ask, bounds), *(_calls(ask) or _content(ask, bounds))]
    if ask.cap is None:
        return Answer(tuple(pieces), "stop")
    kept: list[Piece] = []
    used = 0
    for piece in pieces:
        used += piece.tokens
        if used > ask.cap:
            return Answer(tuple(kept), "length")
        kept.append(piece)
    return Answer(tuple(kept), "stop")


def _thinking(ask: Ask, bounds: tuple[int, int]) -> list[Piece]:
    """A model that began to answer has done with thinking."""
    if not ask.think or ask.prompt.given:
        return []
    tokens = text.words(ask.model.name, ask.prompt.text, bounds, about="thinking")
    left = text.after(tokens, ask.prompt.given_thinking)
    return [Piece(PieceKind.THINKING, token) for token in left or []]


def _calls(ask: Ask) -> list[Piece]:
    """A user who writes "use the tool NAME" (or several) gets calls of these tools."""
    found: list[Piece] = []
    for name, schema in ask.tools.items():
        if f"use the tool {name}" not in ask.prompt.request:
            continue
        arguments = text.instance(schema, ask.prompt.request)
        call = Call(f"call_{len(ask.prompt.text)}_{len(found)}", name, arguments)
        tokens = text.token_count(json.dumps(arguments))
        found.append(Piece(PieceKind.CALL, "", tokens, call))
    return found


def _content(ask: Ask, bounds: tuple[int, int]) -> list[Piece]:
    prompt, given = ask.prompt.text, ask.prompt.given
    if ask.schema is None:
        tokens: Sequence[str] = text.words(ask.model.name, prompt, bounds)
    else:
        value = text.instance(ask.schema, prompt)
        tokens = text.pieces(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    if ask.model.remote_model and ask.schema is None:
        tokens = [f"{ask.model.remote_model} answers:", *(f" {one.strip()}" for one in tokens)]
    left = text.after(list(tokens), given)
    if left is None:
        left = text.words(ask.model.name, prompt + given, bounds, about="another beginning")
    return [Piece(PieceKind.CONTENT, token) for token in left]


@dataclass(frozen=True, slots=True)
class Metrics:
    """The counts and durations of a finished job, as the final records tell them."""

    load_ns: int
    queue_ns: int
    prompt_tokens: int
    prompt_ns: int
    answer_tokens: int
    answer_ns: int

    @property
    def total_ns(self) -> int:
        """From arrival to end."""
        return self.load_ns + self.queue_ns + self.prompt_ns + self.answer_ns

    def native(self) -> dict[str, int]:
        """The fields of a native final record; those that are zero are left out."""
        fields = {
            "total_duration": self.total_ns,
            "load_duration": self.load_ns,
            "prompt_eval_count": self.prompt_tokens,
            "prompt_eval_duration": self.prompt_ns,
            "eval_count": self.answer_tokens,
            "eval_duration": self.answer_ns,
        }
        return {name: value for name, value in fields.items() if value}


def measure(job: Job, handover_s: float) -> Metrics:
    """The metrics of a job that has started (or, load only, ended)."""
    load_ns = _ns(job.ready_at - job.arrived + handover_s)
    if job.load_only:
        return Metrics(load_ns, 0, 0, 0, 0, 0)
    return Metrics(
        load_ns=load_ns,
        queue_ns=_ns(job.started - job.ready_at),
        prompt_tokens=job.prompt_tokens,
        prompt_ns=_ns(job.first_token_at - job.started),
        answer_tokens=job.answer_tokens,
        answer_ns=_ns(job.finish_at - job.first_token_at),
    )


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
