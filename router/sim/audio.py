"""POST /v1/audio/transcriptions: a form with a file in, the text of an answer out."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import Message as Headers

from router.sim import gojson
from router.sim.answer import Answer, Ask, Metrics, Piece, PieceKind
from router.sim.exchange import Exchange
from router.sim.infer import infer
from router.sim.native import find, require
from router.sim.prompt import Prompt
from router.sim.request import Fields, Refused


async def transcriptions(exchange: Exchange) -> None:
    """The text depends on the model and the bytes of the file, and on nothing else."""
    form = parts(exchange.body, exchange.seen.header("Content-Type") or "")
    if "file" not in form:
        raise Refused(400, "file is required")
    fields = Fields({name: value.decode("utf-8", "replace") for name, value in form.items()})
    name = fields.text("model")
    if not name:
        raise Refused(400, "model is required")
    model = find(exchange, fields, "model '{}' not found")
    require(model, name, "completion", "transcription")
    heard = hashlib.sha256(form["file"]).hexdigest()
    # Streamed inside: the head leaves with the first token, with the type that a stream has.
    ask = Ask(name=name, model=model, prompt=Prompt(heard), stream=True)
    await infer(exchange, ask, _Transcript(plain=fields.text("response_format") == "text"))


def parts(body: bytes, content_type: str) -> dict[str, bytes]:
    """The fields of a form by name, the last of equal ones. Raises Refused(400)."""
    head = Headers()
    head["Content-Type"] = content_type
    boundary = head.get_param("boundary")
    if head.get_content_type() != "multipart/form-data" or not isinstance(boundary, str):
        raise Refused(400, "request Content-Type isn't multipart/form-data")
    mark = b"\r\n--" + boundary.encode()
    pieces = (b"\r\n" + body).split(mark)
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise Refused(400, "multipart: NextPart: EOF")
    found = {}
    for piece in pieces[1:-1]:
        lines, _, value = piece.partition(b"\r\n\r\n")
        found[_field(lines)] = value
    return found


def _field(lines: bytes) -> str:
    """The name that a part's Content-Disposition gives it."""
    for line in lines.decode("utf-8", "replace").split("\r\n"):
        key, _, value = line.partition(":")
        if key.strip().lower() == "content-disposition":
            head = Headers()
            head["Content-Disposition"] = value.strip()
            return str(head.get_param("name", "", "content-disposition"))
    return ""


@dataclass(frozen=True, slots=True)
class _Transcript:
    """One record at the end: JSON, or the text alone."""

    plain: bool
    stream_type: str = "application/x-ndjson"
    whole_type: str = "application/json"

    @property
    def stream_headers(self) -> dict[str, str]:
        return {}

    def opening(self) -> Sequence[bytes]:
        return ()

    def piece(self, piece: Piece) -> Sequence[bytes]:
        return ()

    def closing(self, answer: Answer, metrics: Metrics) -> Sequence[bytes]:
        text = answer.joined(PieceKind.CONTENT)
        return (text.encode() if self.plain else gojson.dumps({"text": text}),)

    def failure(self, message: str) -> bytes:
        return b""

    def whole(self, answer: Answer, metrics: Metrics) -> object:
        return {"text": answer.joined(PieceKind.CONTENT)}
