"""The Anthropic-compatible endpoint: messages."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from router.sim import gojson
from router.sim.answer import Answer, Ask, Metrics, Piece, PieceKind
from router.sim.exchange import Exchange
from router.sim.infer import infer
from router.sim.native import find, require
from router.sim.prompt import Message, of_messages
from router.sim.request import Fields, Refused, parse

_STOPS = {"stop": "end_turn", "length": "max_tokens"}


async def messages(exchange: Exchange) -> None:
    """POST /v1/messages."""
    fields = parse(exchange.body)
    cap = fields.number("max_tokens") or 0
    if not fields.text("model"):
        raise Refused(400, "model is required")
    if cap <= 0:
        raise Refused(400, "max_tokens is required and must be positive")
    if not fields.items("messages"):
        raise Refused(400, "messages is required")
    model = find(exchange, fields, "model '{}' not found")
    require(model, fields.text("model"), "completion", "chat")
    tools = fields.objects("tools")
    ask = Ask(
        name=fields.text("model"),
        model=model,
        prompt=of_messages([*_system(fields), *_turns(fields)]),
        stream=fields.flag("stream", default=False),
        cap=cap,
        think=fields.part("thinking").text("type") in ("enabled", "adaptive"),
        tools={tool.text("name"): tool.get("input_schema") or {} for tool in tools},
    )
    await infer(exchange, ask, _Events(ask))


def _system(fields: Fields) -> list[Message]:
    content, _, _ = _content(fields.get("system"))
    return [Message("system", content)] if content else []


def _turns(fields: Fields) -> list[Message]:
    turns = []
    for one in fields.objects("messages"):
        content, calls, images = _content(one.get("content"))
        turns.append(Message(one.text("role"), content, calls=calls, images=images))
    return turns


def _content(value: object) -> tuple[str, str, tuple[str, ...]]:
    """Text, JSON of tool calls and images of a content: a string or a list of blocks."""
    if not isinstance(value, list):
        return (value if isinstance(value, str) else ""), "", ()
    blocks = [Fields(gojson.fold(block)) for block in value if isinstance(block, dict)]
    texts, calls, images = [], [], []
    for block in blocks:
        match block.text("type"):
            case "text":
                texts.append(block.text("text"))
            case "tool_use":
                calls.append({"name": block.get("name"), "input": block.get("input")})
            case "tool_result":
                texts.append(_content(block.get("content"))[0])
            case "image":
                images.append(block.part("source").text("data"))
            case _:
                pass
    return "".join(texts), gojson.dumps(calls).decode() if calls else "", tuple(images)


@dataclass(slots=True)
class _Events:
    """The events of a message: blocks one after another, each opened and closed."""

    ask: Ask
    identity: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")
    stream_type: str = "text/event-stream"
    whole_type: str = "application/json"
    index: int = -1
    open: PieceKind | None = None

    @property
    def stream_headers(self) -> dict[str, str]:
        return {"Cache-Control": "no-cache", "Connection": "keep-alive"}

    def opening(self) -> Sequence[bytes]:
        usage = {"input_tokens": len(self.ask.prompt.text) // 4, "output_tokens": 0}
        return (_event("message_start", message=self._message([], None, usage)),)

    def piece(self, piece: Piece) -> Sequence[bytes]:
        records: list[bytes] = []
        if self.open is not piece.kind or piece.call is not None:
            records += self._close()
            self.index += 1
            self.open = piece.kind
            start = _event("content_block_start", index=self.index, content_block=_empty(piece))
            records.append(start)
        records.append(_event("content_block_delta", index=self.index, delta=_delta(piece)))
        return records

    def closing(self, answer: Answer, metrics: Metrics) -> Sequence[bytes]:
        delta = {"stop_reason": _stop(answer), "stop_sequence": None}
        end = _event("message_delta", delta=delta, usage=_usage(metrics))
        return [*self._close(), end, _event("message_stop")]

    def failure(self, message: str) -> bytes:
        return b""

    def whole(self, answer: Answer, metrics: Metrics) -> object:
        blocks: list[object] = []
        if thinking := answer.joined(PieceKind.THINKING):
            blocks.append({"type": "thinking", "thinking": thinking})
        if content := answer.joined(PieceKind.CONTENT):
            blocks.append({"type": "text", "text": content})
        blocks += [
            {"type": "tool_use", "id": call.identity, "name": call.name, "input": call.arguments}
            for call in answer.calls
        ]
        return self._message(blocks, _stop(answer), _usage(metrics))

    def _message(
        self, content: Sequence[object], stop: str | None, usage: Mapping[str, int]
    ) -> dict[str, object]:
        return {
            "id": self.identity,
            "type": "message",
            "role": "assistant",
            "model": self.ask.name,
            "content": content,
            "stop_reason": stop,
            "stop_sequence": None,
            "usage": usage,
        }

    def _close(self) -> list[bytes]:
        if self.open is None:
            return []
        self.open = None
        return [_event("content_block_stop", index=self.index)]


def _event(name: str, **fields: object) -> bytes:
    return gojson.event({"type": name, **fields}, name)


def _empty(piece: Piece) -> dict[str, object]:
    if piece.call is not None:
        name = {"id": piece.call.identity, "name": piece.call.name}
        return {"type": "tool_use", **name, "input": {}}
    if piece.kind is PieceKind.THINKING:
        return {"type": "thinking", "thinking": ""}
    return {"type": "text", "text": ""}


def _delta(piece: Piece) -> dict[str, object]:
    if piece.call is not None:
        arguments = gojson.dumps(piece.call.arguments).decode()
        return {"type": "input_json_delta", "partial_json": arguments}
    if piece.kind is PieceKind.THINKING:
        return {"type": "thinking_delta", "thinking": piece.text}
    return {"type": "text_delta", "text": piece.text}


def _stop(answer: Answer) -> str:
    return "tool_use" if answer.calls else _STOPS[answer.done_reason]


def _usage(metrics: Metrics) -> dict[str, int]:
    return {"input_tokens": metrics.prompt_tokens, "output_tokens": metrics.answer_tokens}
