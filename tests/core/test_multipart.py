"""The model in a form: found where every client's writer puts it, and never anywhere else."""

import asyncio
import email.policy
from email.parser import BytesParser
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from router.core.multipart import boundary, find

B = b"bound"


def form(*parts: tuple[str, bytes], end: bytes = b"--bound--\r\n") -> bytes:
    """A form of parts, each with its head and its body."""
    lines = [b"--bound\r\n%b\r\n\r\n%b\r\n" % (head.encode(), body) for head, body in parts]
    return b"".join(lines) + end


def field(name: str) -> str:
    return f'Content-Disposition: form-data; name="{name}"'


FILE = 'Content-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav'
MODEL = (field("model"), b"whisper")


def found(body: bytes, between: bytes = B) -> bytes | None:
    span = find(body, between, "model")
    return None if span is None else body[span[0] : span[1]]


FOUND = {
    "alone": form(MODEL),
    "first": form(MODEL, (FILE, b"data")),
    "last": form((FILE, b"data"), MODEL),
    "behind a preamble": b"This is a form.\r\n" + form(MODEL),
    "in a buffer": bytes(bytearray(form(MODEL))),
    "before no end": form(MODEL, end=b"--bound"),
    "blanks behind a delimiter": form(MODEL).replace(b"--bound\r\n", b"--bound \t\r\n", 1),
    "no quotes": form(("Content-Disposition: form-data; name=model", b"whisper")),
    "other case": form(('content-disposition:FORM-DATA;NAME="model"', b"whisper")),
    "escapes": form(('Content-Disposition: form-data; name="m\\odel"', b"whisper")),
    "other headers": form((f"Content-Type: text/plain\r\n{MODEL[0]}\r\nX: y", b"whisper")),
    "not encoded": form((f"{MODEL[0]}\r\nContent-Transfer-Encoding: 8bit", b"whisper")),
    "the first of two": form(MODEL, (field("model"), b"other")),
    "behind a part without a head": b"--bound\r\n\r\nx\r\n" + form(MODEL),
    "behind an empty part": b"--bound\r\n" + FILE.encode() + b"\r\n\r\n" + form(MODEL),
    "behind a file of the same name": form(
        ('Content-Disposition: form-data; name="model"; filename="m"', b"no"), MODEL
    ),
    "behind a file that looks like one": form((FILE, MODEL[0].encode() + b"\r\n\r\nno"), MODEL),
    "behind half a delimiter": form((FILE, b"\r\n--boun\r\n-bound\n--bound"), MODEL),
}  # fmt: skip


@pytest.mark.parametrize("body", FOUND.values(), ids=FOUND.keys())
def test_is_found(body: bytes) -> None:
    assert found(body) == b"whisper"


NOT_FOUND = {
    "nothing": b"",
    "no delimiter": b"model=whisper",
    "another delimiter": form(MODEL).replace(b"--bound", b"--other"),
    "a delimiter inside a line": b"x" + form(MODEL),
    "another field": form((field("Model"), b"whisper")),
    "no such field": form((FILE, b"data")),
    "no end": form(MODEL, end=b"")[:-2],
    "a head that never ends": b"--bound\r\n" + MODEL[0].encode(),
    "a head too long": form((f"X: {'y' * 9000}\r\n{MODEL[0]}", b"whisper")),
    "a value too long": form((field("model"), b"w" * 5000)),
    "an empty part, at once": b"--bound\r\n%b\r\n\r\n--bound--\r\n" % MODEL[0].encode(),
    "not a field": form(('Content-Disposition: attachment; name="model"', b"whisper")),
    "no name": form(("Content-Disposition: form-data", b"whisper")),
    "an encoded value": form((f"{MODEL[0]}\r\nContent-Transfer-Encoding: base64", b"whisper")),
    "bare line feeds": form(MODEL).replace(b"\r\n", b"\n"),
    "behind the end": form() + form(MODEL),
    "behind a longer delimiter": form((FILE, b"x\r\n--boundless\r\n")) + form(MODEL),
    "behind too many parts": form(*[("X: y", b"")] * 1001, MODEL),
}


@pytest.mark.parametrize("body", NOT_FOUND.values(), ids=NOT_FOUND.keys())
def test_is_not_found(body: bytes) -> None:
    assert found(body) is None


@pytest.mark.parametrize(
    ("content_type", "between"),
    [
        ("multipart/form-data; boundary=bound", B),
        ('Multipart/Form-Data;charset=utf-8 ; Boundary="bound"', B),
        ('multipart/form-data; boundary="b\\ound"', B),
        ("multipart/form-data; boundary=" + "b" * 70, b"b" * 70),
        ("multipart/form-data; boundary=" + "b" * 71, b""),
        ("multipart/form-data; boundary=b\u00f6und", b""),
        ('multipart/form-data; boundary="b\x01"', b""),
        ("multipart/form-data; boundary=", b""),
        ("multipart/form-data", b""),
        ("multipart/form-database; boundary=bound", b""),
        ("application/json; boundary=bound", b""),
        ("", b""),
    ],
)
def test_the_boundary_is_read_from_the_type(content_type: str, between: bytes) -> None:
    assert boundary(content_type) == between


async def written(fields: list[tuple[str, bytes, str | None]]) -> tuple[str, bytes]:
    """(Content-Type, body) of a form as aiohttp's client writes it."""
    form = aiohttp.MultipartWriter("form-data")
    for name, value, filename in fields:
        named: Any = {"name": name} if filename is None else {"name": name, "filename": filename}
        form.append(value).set_content_disposition("form-data", **named)
    whole = bytearray()

    async def write(piece: bytes) -> None:
        whole.extend(piece)

    await form.write(SimpleNamespace(write=write))  # type: ignore[arg-type]
    return form.headers["Content-Type"], bytes(whole)


_VALUES = st.binary(max_size=60) | st.sampled_from([b"\r\n--", b"\r\n", b"--", b"\r\n\r\n"])
_NAMES = st.sampled_from(["model", "file", "language", "mod el", "models"])
_FILES = st.none() | st.sampled_from(["a.wav", 'a "b".wav', "\u00e4.wav"])


@given(st.lists(st.tuples(_NAMES, _VALUES, _FILES), min_size=1, max_size=6))
@example([("file", b"\r\n--x\r\n" * 20, "a.wav"), ("model", b"whisper", None)])
def test_what_a_client_writes_is_read_as_the_standard_library_reads_it(
    fields: list[tuple[str, bytes, str | None]],
) -> None:
    content_type, body = asyncio.run(written(fields))
    span = find(body, boundary(content_type), "model")
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    message = BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    parts = [(p.get_param("name", header="content-disposition"), p) for p in message.iter_parts()]
    models = [p for name, p in parts if name == "model" and p.get_filename() is None]
    wanted = [value for name, value, file in fields if name == "model" and file is None]
    assert len(models) == len(wanted)
    assert (None if span is None else body[span[0] : span[1]]) == next(iter(wanted), None)


@given(st.binary(max_size=200), st.integers(0, 300), st.integers(0, 300))
def test_any_bytes_are_searched_without_an_error_and_in_bounds(
    noise: bytes, start: int, end: int
) -> None:
    body = form((FILE, b"data"), MODEL)
    for mangled in (noise, body[:start] + noise + body[end:]):
        span = find(mangled, B, "model")
        assert span is None or 0 < span[0] <= span[1] < len(mangled)
