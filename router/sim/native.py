"""The inference endpoints of Ollama's own API: generate, chat, embed, embeddings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from router.sim import gojson, text
from router.sim.answer import Answer, Ask, Metrics, Piece, PieceKind
from router.sim.exchange import Exchange
from router.sim.infer import infer, load, read
from router.sim.models import SimModel
from router.sim.prompt import Message, Prompt, of_messages, of_raw
from router.sim.request import Fields, Refused, parse

JSON = "application/json; charset=utf-8"
# Options whose change makes a node load the model again; num_ctx is handled by itself.
_RELOADING = ("num_batch", "num_thread", "main_gpu", "use_mmap", "draft_num_predict")


async def chat(exchange: Exchange) -> None:
    """POST /api/chat."""
    fields = parse(exchange.body)
    if not fields.text("model"):
        raise Refused(400, "model is required")
    model = find(exchange, fields, "model '{}' not found")
    messages = [_message(one) for one in fields.objects("messages")]
    ask = _ask(fields, model, of_messages(messages))
    if messages or ask.keep_alive_s != 0:  # any model can be unloaded
        require(model, fields.text("model"), "completion", "chat")
    if not messages:
        await _load_or_unload(exchange, ask, _chat_record)
        return
    await infer(exchange, ask, _Records(ask, _chat_record))


async def generate(exchange: Exchange) -> None:
    """POST /api/generate."""
    fields = parse(exchange.body)
    if not fields.text("model").strip():
        raise Refused(404, "model '' not found")
    model = find(exchange, fields, "model '{}' not found")
    prompt = fields.text("prompt")
    ask = _ask(fields, model, _generate_prompt(fields))
    if prompt or ask.keep_alive_s != 0:
        require(model, fields.text("model"), "completion", "generate")
    if not prompt:
        await _load_or_unload(exchange, ask, _generate_record)
        return
    context = "" if fields.flag("raw", default=False) else ask.prompt.text
    await infer(exchange, ask, _Records(ask, _generate_record, context))


async def embed(exchange: Exchange) -> None:
    """POST /api/embed."""
    fields = parse(exchange.body)
    ask, texts = embedding_ask(exchange, fields)
    if not texts:
        metrics = await load(exchange, ask)
    else:
        metrics = await read(exchange, ask, texts)
    vectors = [vector(ask.model, one) for one in texts]
    value = {"model": ask.name, "embeddings": vectors, **metrics.native()}
    await exchange.whole(value, content_type=JSON)


async def embeddings(exchange: Exchange) -> None:
    """POST /api/embeddings, the old form: one text, no counts, names with exact case."""
    fields = parse(exchange.body)
    ask, _ = embedding_ask(exchange, fields, exact_case=True)
    prompt = fields.text("prompt")
    if not prompt:
        await load(exchange, ask)
        await exchange.whole({"embedding": []}, content_type=JSON)
        return
    await read(exchange, ask, [prompt])
    await exchange.whole({"embedding": vector(ask.model, prompt)}, content_type=JSON)


def embedding_ask(
    exchange: Exchange, fields: Fields, *, exact_case: bool = False
) -> tuple[Ask, list[str]]:
    """The model and the texts of `input`. Raises Refused."""
    missing = 'model "{}" not found, try pulling it first'
    model = find(exchange, fields, missing, exact_case=exact_case)
    if not model.can_embed:
        raise Refused(501, "this model does not support embeddings")
    given = fields.get("input")
    texts = [given] if isinstance(given, str) and given else given or []
    if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
        raise Refused(400, "invalid input type")
    return _ask(fields, model, Prompt("")), [str(one) for one in texts]


def find(exchange: Exchange, fields: Fields, missing: str, *, exact_case: bool = False) -> SimModel:
    """The model that the field `model` names; `missing` is the 404's text around the name."""
    name = fields.text("model")
    model = exchange.machine.shelf.find(name, exact_case=exact_case) if name.strip() else None
    if model is None:
        raise Refused(404, missing.format(name))
    return model


def require(model: SimModel, name: str, capability: str, verb: str) -> None:
    """Raise Refused when a model cannot do what is asked."""
    if capability not in model.capabilities:
        raise Refused(400, f'"{name}" does not support {verb}')


def vector(model: SimModel, one: str) -> list[float]:
    """The embedding of a text."""
    return text.vector(model.name, one, model.embedding_length)


def now() -> str:
    """The time a record was made."""
    return gojson.timestamp(datetime.now(UTC))


def tool_schemas(tools: Sequence[Fields]) -> dict[str, object]:
    """Names and argument schemas of tools in the form `{"function": {"name", "parameters"}}`."""
    functions = [tool.part("function") for tool in tools]
    return {one.text("name"): one.get("parameters") or {} for one in functions}


def _ask(fields: Fields, model: SimModel, prompt: Prompt) -> Ask:
    options = fields.part("options")
    cap = options.number("num_predict", 500) or 0
    wanted = fields.get("format")
    think = fields.get("think") not in (None, False, "")
    if think:
        require(model, fields.text("model"), "thinking", "thinking")
    tools = tool_schemas(fields.objects("tools"))
    if tools:
        require(model, fields.text("model"), "tools", "tools")
    reloading = [(name, str(options.get(name))) for name in _RELOADING if name in options]
    if "shift" in fields:
        reloading.append(("shift", str(fields.get("shift"))))
    return Ask(
        name=fields.text("model"),
        model=model,
        prompt=prompt,
        stream=fields.flag("stream", default=True),
        cap=cap if cap > 0 else None,
        think=think,
        schema=wanted if wanted != "" else None,
        tools=tools,
        num_ctx=options.number("num_ctx", 500),
        options=tuple(reloading),
        keep_alive_s=fields.keep_alive_s(),
    )


def _message(fields: Fields) -> Message:
    calls = fields.get("tool_calls")
    return Message(
        role=fields.text("role"),
        content=fields.text("content"),
        thinking=fields.text("thinking"),
        calls=gojson.dumps(calls).decode() if calls else "",
        images=tuple(str(one) for one in fields.items("images")),
    )


def _generate_prompt(fields: Fields) -> Prompt:
    prompt = fields.text("prompt")
    images = tuple(str(one) for one in fields.items("images"))
    if fields.flag("raw", default=False):
        return of_raw(prompt, images=len(images))
    system = fields.text("system")
    messages = [Message("system", system)] if system else []
    messages.append(Message("user", prompt, images=images))
    return of_messages(messages, context=fields.items("context"))


async def _load_or_unload(
    exchange: Exchange, ask: Ask, record: "Callable[[Ask, str, Piece | None], dict[str, object]]"
) -> None:
    if ask.keep_alive_s == 0:
        exchange.machine.driver_of(ask.model).unload(ask.model)
        reason = "unload"
    else:
        await load(exchange, ask)
        reason = "load"
    await exchange.whole(record(ask, reason, None), content_type=JSON)


def _chat_record(ask: Ask, done_reason: str, piece: Piece | None) -> dict[str, object]:
    """A record of chat; `done_reason` is empty for all but the last."""
    message: dict[str, object] = {"role": "assistant", "content": ""}
    if piece is not None and piece.call is not None:
        message["tool_calls"] = [_call(piece)]
    elif piece is not None:
        field = "content" if piece.kind is PieceKind.CONTENT else "thinking"
        message[field] = piece.text
    record: dict[str, object] = {"model": ask.name, "created_at": now(), "message": message}
    if done_reason:
        return {**record, "done_reason": done_reason, "done": True}
    return {**record, "done": False}


def _generate_record(ask: Ask, done_reason: str, piece: Piece | None) -> dict[str, object]:
    """A record of generate."""
    record: dict[str, object] = {"model": ask.name, "created_at": now(), "response": ""}
    if piece is not None:
        field = "response" if piece.kind is PieceKind.CONTENT else "thinking"
        record[field] = piece.text
    if done_reason:
        return {**record, "done": True, "done_reason": done_reason}
    return {**record, "done": False}


def _call(piece: Piece) -> dict[str, object]:
    assert piece.call is not None
    function = {"name": piece.call.name, "arguments": piece.call.arguments}
    return {"id": piece.call.identity, "function": function}


@dataclass(frozen=True, slots=True)
class _Records:
    """NDJSON records of chat or generate. `context` is the text generate tells as numbers."""

    ask: Ask
    record: Callable[[Ask, str, Piece | None], dict[str, object]]
    context: str = ""
    stream_type: str = "application/x-ndjson"
    whole_type: str = JSON

    @property
    def stream_headers(self) -> dict[str, str]:
        return {}

    def opening(self) -> Sequence[bytes]:
        return ()

    def piece(self, piece: Piece) -> Sequence[bytes]:
        return (gojson.line(self.record(self.ask, "", piece)),)

    def closing(self, answer: Answer, metrics: Metrics) -> Sequence[bytes]:
        return (gojson.line(self._last(answer, metrics)),)

    def failure(self, message: str) -> bytes:
        return gojson.line({"error": message})

    def whole(self, answer: Answer, metrics: Metrics) -> object:
        value = self._last(answer, metrics)
        message = value.get("message", value)
        assert isinstance(message, dict)
        message["content" if "message" in value else "response"] = answer.joined(PieceKind.CONTENT)
        if thinking := answer.joined(PieceKind.THINKING):
            message["thinking"] = thinking
        if answer.calls:
            message["tool_calls"] = [_call(piece) for piece in answer.pieces if piece.call]
        return value

    def _last(self, answer: Answer, metrics: Metrics) -> dict[str, object]:
        value = self.record(self.ask, answer.done_reason, None)
        if self.context:
            value["context"] = text.context_ids(self.context + answer.joined(PieceKind.CONTENT))
        return {**value, **metrics.native()}
