"""The OpenAI Responses endpoint."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from router.sim import gojson
from router.sim.answer import Answer, Ask, Call, Metrics, Piece, PieceKind
from router.sim.exchange import Exchange
from router.sim.infer import infer
from router.sim.native import find, require
from router.sim.openai import content_text
from router.sim.prompt import Message, of_messages
from router.sim.request import Fields, Refused, parse


async def responses(exchange: Exchange) -> None:
    """POST /v1/responses."""
    fields = parse(exchange.body)
    if not fields.text("model"):
        raise Refused(400, "model is required")
    model = find(exchange, fields, "model '{}' not found")
    require(model, fields.text("model"), "completion", "chat")
    tools = fields.objects("tools")
    ask = Ask(
        name=fields.text("model"),
        model=model,
        prompt=of_messages(_turns(fields)),
        stream=fields.flag("stream", default=False),
        cap=fields.number("max_output_tokens"),
        think="effort" in fields.part("reasoning"),
        tools={tool.text("name"): tool.get("parameters") or {} for tool in tools},
    )
    await infer(exchange, ask, _Events(ask))


def _turns(fields: Fields) -> list[Message]:
    system = fields.text("instructions")
    turns = [Message("system", system)] if system else []
    if isinstance(fields.get("input"), str):
        return [*turns, Message("user", fields.text("input"))]
    return turns + [_turn(item) for item in fields.objects("input")]


def _turn(item: Fields) -> Message:
    match item.text("type"):
        case "function_call":
            return Message("assistant", calls=item.text("name") + item.text("arguments"))
        case "function_call_output":
            return Message("tool", item.text("output"))
        case _:
            content, images = content_text(item.get("content"))
            return Message(item.text("role"), content, images=images)


@dataclass(slots=True)
class _Events:
    """The events of a response. An output item is opened, filled and closed before the next."""

    ask: Ask
    identity: str = field(default_factory=lambda: f"resp_{secrets.token_hex(12)}")
    stream_type: str = "text/event-stream"
    whole_type: str = "application/json"
    sequence: int = 0
    output: list[dict[str, object]] = field(default_factory=list)
    open: PieceKind | None = None
    said: str = ""

    @property
    def stream_headers(self) -> dict[str, str]:
        return {"Cache-Control": "no-cache", "Connection": "keep-alive"}

    def opening(self) -> Sequence[bytes]:
        begun = self._response("in_progress", [], None)
        names = ("response.created", "response.in_progress")
        return [self._event(name, response=begun) for name in names]

    def piece(self, piece: Piece) -> Sequence[bytes]:
        if piece.call is not None:
            item = _call_item(piece.call)
            return [*self._close(), *self._call(item)]
        records: list[bytes] = []
        if self.open is not piece.kind:
            records += [*self._close(), *self._open(piece.kind)]
        self.said += piece.text
        kind = "output_text" if piece.kind is PieceKind.CONTENT else "reasoning_summary_text"
        place = self._place(piece.kind)
        records.append(self._event(f"response.{kind}.delta", **place, delta=piece.text))
        return records

    def closing(self, answer: Answer, metrics: Metrics) -> Sequence[bytes]:
        records = self._close()
        done = self._response(_status(answer), self.output, metrics)
        return [*records, self._event("response.completed", response=done)]

    def failure(self, message: str) -> bytes:
        return b""

    def whole(self, answer: Answer, metrics: Metrics) -> object:
        output: list[dict[str, object]] = []
        if thinking := answer.joined(PieceKind.THINKING):
            output.append(self._item(PieceKind.THINKING, thinking))
        if content := answer.joined(PieceKind.CONTENT):
            output.append(self._item(PieceKind.CONTENT, content))
        output += [_call_item(call) for call in answer.calls]
        return self._response(_status(answer), output, metrics)

    def _event(self, name: str, **fields: object) -> bytes:
        value = {"type": name, "sequence_number": self.sequence, **fields}
        self.sequence += 1
        return gojson.event(value, name)

    def _response(
        self, status: str, output: Sequence[object], metrics: Metrics | None
    ) -> dict[str, object]:
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.identity,
            "object": "response",
            "created_at": int(time.time()),
            "status": status,
            "model": self.ask.name,
            "error": None,
            "incomplete_details": incomplete,
            "output": list(output),
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "usage": _usage(metrics) if metrics else None,
        }

    def _item(self, kind: PieceKind, said: str) -> dict[str, object]:
        if kind is PieceKind.THINKING:
            summary = [{"type": "summary_text", "text": said}]
            return {"id": f"rs_{self.identity}", "type": "reasoning", "summary": summary}
        content = [{"type": "output_text", "text": said, "annotations": []}]
        head = {"id": f"msg_{self.identity}", "type": "message", "status": "completed"}
        return {**head, "role": "assistant", "content": content}

    def _place(self, kind: PieceKind) -> dict[str, object]:
        prefix, part = (
            ("msg", "content_index")
            if kind is PieceKind.CONTENT
            else (
                "rs",
                "summary_index",
            )
        )
        index = len(self.output)
        return {"item_id": f"{prefix}_{self.identity}", "output_index": index, part: 0}

    def _open(self, kind: PieceKind) -> list[bytes]:
        self.open, self.said = kind, ""
        item = self._item(kind, "")
        item["summary" if kind is PieceKind.THINKING else "content"] = []
        added = self._event("response.output_item.added", output_index=len(self.output), item=item)
        if kind is PieceKind.THINKING:
            return [added]
        part = {"type": "output_text", "text": "", "annotations": []}
        return [added, self._event("response.content_part.added", **self._place(kind), part=part)]

    def _close(self) -> list[bytes]:
        if self.open is None:
            return []
        kind, self.open = self.open, None
        item = self._item(kind, self.said)
        place = self._place(kind)
        records = []
        if kind is PieceKind.CONTENT:
            part = {"type": "output_text", "text": self.said, "annotations": []}
            records.append(self._event("response.output_text.done", **place, text=self.said))
            records.append(self._event("response.content_part.done", **place, part=part))
        else:
            done = "response.reasoning_summary_text.done"
            records.append(self._event(done, **place, text=self.said))
        return [*records, *self._finish(item)]

    def _call(self, item: dict[str, object]) -> list[bytes]:
        index = len(self.output)
        place = {"item_id": item["id"], "output_index": index}
        added = self._event(
            "response.output_item.added", output_index=index, item={**item, "arguments": ""}
        )
        arguments = item["arguments"]
        name = "response.function_call_arguments"
        delta = self._event(f"{name}.delta", **place, delta=arguments)
        done = self._event(f"{name}.done", **place, arguments=arguments)
        return [added, delta, done, *self._finish(item)]

    def _finish(self, item: dict[str, object]) -> list[bytes]:
        name = "response.output_item.done"
        record = self._event(name, output_index=len(self.output), item=item)
        self.output.append(item)
        return [record]


def _call_item(call: Call) -> dict[str, object]:
    return {
        "id": f"fc_{call.identity}",
        "type": "function_call",
        "status": "completed",
        "call_id": call.identity,
        "name": call.name,
        "arguments": gojson.dumps(call.arguments).decode(),
    }


def _status(answer: Answer) -> str:
    return "incomplete" if answer.done_reason == "length" else "completed"


def _usage(metrics: Metrics) -> dict[str, object]:
    prompt, answer = metrics.prompt_tokens, metrics.answer_tokens
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": answer,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + answer,
    }
