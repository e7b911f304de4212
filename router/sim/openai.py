"""The OpenAI-compatible endpoints: chat completions, completions, embeddings."""

import base64
import secrets
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from router.sim import gojson
from router.sim.answer import Answer, Ask, Call, Metrics, Piece, PieceKind
from router.sim.exchange import Exchange
from router.sim.infer import infer, load, read
from router.sim.native import embedding_ask, find, require, tool_schemas, vector
from router.sim.prompt import Message, of_messages
from router.sim.request import Fields, Refused, parse

_MISSING = "model '{}' not found"
_SSE = "text/event-stream"
_DONE = b"data: [DONE]\n\n"


async def chat_completions(exchange: Exchange) -> None:
    """POST /v1/chat/completions."""
    fields = parse(exchange.body)
    if not fields.objects("messages"):
        raise Refused(400, "[] is too short - 'messages'")
    if not fields.text("model"):
        raise Refused(400, "model is required")
    model = find(exchange, fields, _MISSING)
    require(model, fields.text("model"), "completion", "chat")
    cap = fields.number("max_tokens") or fields.number("max_completion_tokens")
    wanted = fields.part("response_format")
    ask = Ask(
        name=fields.text("model"),
        model=model,
        prompt=of_messages([_message(one) for one in fields.objects("messages")]),
        stream=fields.flag("stream", default=False),
        cap=cap,
        think=fields.get("reasoning_effort") not in (None, "none"),
        schema=_schema(wanted),
        tools=tool_schemas(fields.objects("tools")),
    )
    await infer(exchange, ask, _ChatChunks(ask, usage=_wants_usage(fields)))


async def completions(exchange: Exchange) -> None:
    """POST /v1/completions."""
    fields = parse(exchange.body)
    model = find(exchange, fields, _MISSING)
    if "prompt" in fields and not isinstance(fields.get("prompt"), str):
        raise Refused(400, "the prompt has to be one string")
    require(model, fields.text("model"), "completion", "generate")
    ask = Ask(
        name=fields.text("model"),
        model=model,
        prompt=of_messages([Message("user", fields.text("prompt"))]),
        stream=fields.flag("stream", default=False),
        cap=fields.number("max_tokens"),
    )
    surface = _TextChunks(ask, usage=_wants_usage(fields))
    if fields.text("prompt"):
        await infer(exchange, ask, surface)
        return
    metrics = await load(exchange, ask)
    await exchange.whole(surface.whole(Answer((), "load"), metrics))


async def embeddings(exchange: Exchange) -> None:
    """POST /v1/embeddings."""
    fields = parse(exchange.body)
    ask, texts = embedding_ask(exchange, fields)
    if not texts:
        raise Refused(400, "invalid input")
    form = fields.text("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise Refused(400, f"invalid encoding_format: {form}")
    metrics = await read(exchange, ask, texts)
    found = [vector(ask.model, one) for one in texts]
    data = [
        {"object": "embedding", "embedding": _packed(one) if form == "base64" else one, "index": at}
        for at, one in enumerate(found)
    ]
    count = metrics.prompt_tokens
    usage = {"prompt_tokens": count, "total_tokens": count}
    await exchange.whole({"object": "list", "data": data, "model": ask.name, "usage": usage})


def content_text(content: object) -> tuple[str, tuple[str, ...]]:
    """The text and the base64 images of a message's content, a string or a list of parts."""
    if not isinstance(content, list):
        return (content if isinstance(content, str) else ""), ()
    parts = [Fields(gojson.fold(part)) for part in content if isinstance(part, dict)]
    images = [part.part("image_url").text("url").partition(",")[2] for part in parts]
    return "".join(part.text("text") for part in parts), tuple(one for one in images if one)


def _message(fields: Fields) -> Message:
    content, images = content_text(fields.get("content"))
    calls = fields.get("tool_calls")
    return Message(
        role=fields.text("role"),
        content=content,
        thinking=fields.text("reasoning"),
        calls=gojson.dumps(calls).decode() if calls else "",
        images=images,
    )


def _schema(wanted: Fields) -> object:
    if wanted.text("type") == "json_schema":
        return wanted.part("json_schema").get("schema")
    return "json" if wanted.text("type") == "json_object" else None


def _wants_usage(fields: Fields) -> bool:
    return fields.part("stream_options").flag("include_usage", default=False)


def _packed(values: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def _usage(metrics: Metrics | None) -> dict[str, int]:
    prompt = metrics.prompt_tokens if metrics else 0
    answer = metrics.answer_tokens if metrics else 0
    total = prompt + answer
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": total}


def _calls(calls: Sequence[Call]) -> list[dict[str, object]]:
    return [
        {
            "id": call.identity,
            "index": at,
            "type": "function",
            "function": {"name": call.name, "arguments": gojson.dumps(call.arguments).decode()},
        }
        for at, call in enumerate(calls)
    ]


@dataclass(slots=True)
class _Chunks:
    """What the chunks of both APIs share."""

    ask: Ask
    usage: bool
    identity: int = field(default_factory=lambda: secrets.randbelow(1000))
    stream_type: str = _SSE
    whole_type: str = "application/json"
    sent: int = 0
    calls: int = 0

    @property
    def stream_headers(self) -> dict[str, str]:
        return {}

    def opening(self) -> Sequence[bytes]:
        return ()

    def head(self, prefix: str, kind: str) -> dict[str, object]:
        """The fields every object begins with."""
        return {
            "id": f"{prefix}-{self.identity}",
            "object": kind,
            "created": int(time.time()),
            "model": self.ask.name,
            "system_fingerprint": "fp_ollama",
        }


class _ChatChunks(_Chunks):
    """chat.completion and its chunks."""

    def piece(self, piece: Piece) -> Sequence[bytes]:
        delta: dict[str, object] = {} if self.sent else {"role": "assistant"}
        self.sent += 1
        if piece.call is not None:
            delta["tool_calls"] = [{**_calls([piece.call])[0], "index": self.calls}]
            self.calls += 1
        else:
            delta["content"] = piece.text if piece.kind is PieceKind.CONTENT else ""
            if piece.kind is PieceKind.THINKING:
                delta["reasoning"] = piece.text
        return (gojson.event(self._chunk(delta, None)),)

    def closing(self, answer: Answer, metrics: Metrics) -> Sequence[bytes]:
        records = [gojson.event(self._chunk({}, _finish(answer)))]
        if self.usage:
            chunk = {**self.head("chatcmpl", "chat.completion.chunk"), "choices": []}
            records.append(gojson.event({**chunk, "usage": _usage(metrics)}))
        return [*records, _DONE]

    def failure(self, message: str) -> bytes:
        chunk = self._chunk({"role": "assistant", "content": ""}, None)
        return gojson.event({**chunk, "model": ""})

    def whole(self, answer: Answer, metrics: Metrics) -> object:
        content = answer.joined(PieceKind.CONTENT)
        message: dict[str, object] = {"role": "assistant", "content": content}
        if thinking := answer.joined(PieceKind.THINKING):
            message["reasoning"] = thinking
        if answer.calls:
            message["tool_calls"] = _calls(answer.calls)
        choice = {"index": 0, "message": message, "finish_reason": _finish(answer)}
        head = self.head("chatcmpl", "chat.completion")
        return {**head, "choices": [choice], "usage": _usage(metrics)}

    def _chunk(self, delta: dict[str, object], finish: str | None) -> dict[str, object]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return {**self.head("chatcmpl", "chat.completion.chunk"), "choices": [choice]}


class _TextChunks(_Chunks):
    """text_completion and its chunks."""

    def piece(self, piece: Piece) -> Sequence[bytes]:
        return (gojson.event(self._chunk(piece.text, None, None)),)

    def closing(self, answer: Answer, metrics: Metrics) -> Sequence[bytes]:
        return gojson.event(self._chunk("", answer.done_reason, metrics)), _DONE

    def failure(self, message: str) -> bytes:
        return gojson.event({**self._chunk("", None, None), "model": ""})

    def whole(self, answer: Answer, metrics: Metrics) -> object:
        said = answer.joined(PieceKind.CONTENT)
        choice = {"text": said, "index": 0, "finish_reason": answer.done_reason}
        head = self.head("cmpl", "text_completion")
        return {**head, "choices": [choice], "usage": _usage(metrics)}

    def _chunk(self, said: str, finish: str | None, metrics: Metrics | None) -> dict[str, object]:
        choice = {"text": said, "index": 0, "finish_reason": finish}
        chunk = {**self.head("cmpl", "text_completion"), "choices": [choice]}
        return {**chunk, "usage": _usage(metrics)} if self.usage else chunk


def _finish(answer: Answer) -> str:
    return "tool_calls" if answer.calls else answer.done_reason
