"""Bodies that are no plain JSON: zstd and forms, from the client to the node that they name."""

import json
from collections.abc import AsyncIterator

import aiohttp
import pytest
from backports import zstd

from router.core import dialect
from tests.rig import MODEL, Rig, model, rig, spec

PACKED = (
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages",
)  # fmt: skip
ZSTD = {"Content-Encoding": "zstd", "Content-Type": "application/json"}
OTHER = "qwen3:4b"


@pytest.fixture
async def two() -> AsyncIterator[Rig]:
    """n1 has the usual model, n2 the other one: a body that could not be read may go to either."""
    async with rig(spec(), spec(model(OTHER))) as r:
        yield r


def asked(path: str, name: str = MODEL, text: str = "hi", **more: object) -> bytes:
    """A request that every endpoint of PACKED takes."""
    message = [{"role": "user", "content": text}]
    whole = {"model": name, "messages": message, "prompt": text, "input": text, "max_tokens": 3}
    return json.dumps({**whole, **more}).encode()


async def post(
    r: Rig, path: str, body: bytes, headers: dict[str, str] = ZSTD
) -> tuple[int, str | None, bytes]:
    """(status, node, body) of the answer."""
    async with r.session.post(f"{r.url}{path}", data=body, headers=headers) as answer:
        return answer.status, answer.headers.get("X-Ollamux-Node"), await answer.read()


# zstd


async def test_a_node_too_old_to_unpack_is_not_asked() -> None:
    async with rig(spec(version="0.17.4"), spec(version="0.18.0")) as r:
        body = zstd.compress(asked("/v1/chat/completions"), 1)
        for _ in range(3):
            assert (await post(r, "/v1/chat/completions", body))[:2] == (200, "n2")
        assert not r.nodes[0].calls("/v1/chat/completions")


@pytest.mark.parametrize("name", [MODEL, OTHER])
@pytest.mark.parametrize("path", PACKED)
async def test_a_compressed_body_goes_unchanged_to_a_node_that_has_its_model(
    two: Rig, path: str, name: str
) -> None:
    for level in (1, 9):
        body = zstd.compress(asked(path, name), level)
        status, node, _ = await post(two, path, body)
        assert (status, node) == (200, "n1" if name == MODEL else "n2")
        seen = two.nodes[name == OTHER].calls(path)[-1]
        assert seen.header("Content-Encoding") == "zstd"
        assert seen.header("Content-Length") == str(len(body))
        assert seen.body == body


@pytest.mark.parametrize("path", PACKED)
async def test_a_compressed_body_with_a_pin_goes_on_plain_with_its_own_length(
    two: Rig, path: str
) -> None:
    status, node, _ = await post(two, path, zstd.compress(asked(path, f"{OTHER}@n2")))
    assert (status, node) == (200, "n2")
    seen = two.nodes[1].calls(path)[0]
    assert seen.header("Content-Encoding") is None
    assert seen.header("Content-Type") == "application/json"
    assert seen.header("Content-Length") == str(len(seen.body))
    assert seen.body == asked(path, OTHER)


async def test_an_alias_and_a_stream_are_read_from_a_compressed_body() -> None:
    async with rig(aliases={"best": MODEL}) as r:
        body = zstd.compress(asked(PACKED[0], "best", stream=True))
        status, _, answer = await post(r, PACKED[0], body)
        assert status == 200
        assert answer.startswith(b"data: ")
        assert r.requests[0]["model"] == MODEL


@pytest.mark.parametrize("pin", ["", "@n2"])
@pytest.mark.parametrize("size", [dialect.QUICK_BYTES - 500, dialect.QUICK_BYTES, 3_000_000])
async def test_large_compressed_bodies_are_read_too(two: Rig, size: int, pin: str) -> None:
    plain = asked(PACKED[0], OTHER + pin, "x" * size)
    assert (await post(two, PACKED[0], zstd.compress(plain)))[:2] == (200, "n2")
    noise = "".join(map(chr, range(0x4E00, 0x8E00))) * 20  # compresses badly
    plain = asked(PACKED[0], OTHER + pin, noise[:size])
    assert (await post(two, PACKED[0], zstd.compress(plain, 1)))[:2] == (200, "n2")


def windowed(plain: bytes) -> bytes:
    """A frame whose window is wider than Ollama takes."""
    made = zstd.ZstdCompressor(options={int(zstd.CompressionParameter.window_log): 24})
    return made.compress(plain) + made.flush()


@pytest.mark.parametrize(
    "body",
    [
        b"no zstd at all",
        zstd.compress(asked("/"))[:-3],
        zstd.compress(b"x" * (20 * 1024 * 1024 + 1)),
        windowed(asked("/")),
    ],
    ids=["garbage", "cut", "too large", "too wide a window"],
)
@pytest.mark.parametrize("path", PACKED)
async def test_what_cannot_be_unpacked_is_a_native_400_and_reaches_no_node(
    two: Rig, path: str, body: bytes
) -> None:
    status, node, answer = await post(two, path, body)
    assert (status, node) == (400, None)
    assert [*json.loads(answer)] == ["error"]
    assert isinstance(json.loads(answer)["error"], str)
    assert not any(node.calls(path) for node in two.nodes)


async def test_an_empty_body_is_none_that_was_compressed() -> None:
    async with rig() as r:
        status, node, answer = await post(r, PACKED[0], b"")
        assert (status, node) == (400, "n1")
        assert isinstance(json.loads(answer)["error"], dict)


@pytest.mark.parametrize(
    ("path", "encoding"),
    [("/api/chat", "zstd"), ("/api/embed", "zstd"), (PACKED[0], "gzip"), (PACKED[0], "br, zstd")],
)
async def test_what_ollama_would_not_unpack_goes_as_it_is_to_any_node(
    path: str, encoding: str
) -> None:
    body = zstd.compress(asked(path, f"{MODEL}@nowhere"))
    async with rig() as r:
        status, node, _ = await post(r, path, body, {"Content-Encoding": encoding})
        assert (status, node) == (400, "n1")
        seen = r.nodes[0].calls(path)[0]
        assert seen.body == body
        assert seen.header("Content-Encoding") == encoding


async def test_a_plain_body_keeps_an_encoding_that_means_nothing() -> None:
    async with rig() as r:
        body = asked(PACKED[0], f"{MODEL}@n1")
        await post(r, PACKED[0], body, {"Content-Encoding": "identity"})
        seen = r.nodes[0].calls(PACKED[0])[0]
        assert (seen.header("Content-Encoding"), seen.body) == ("identity", asked(PACKED[0]))


# Forms

AUDIO = "/v1/audio/transcriptions"
SOUND = bytes(range(256)) * 40 + b"\r\n--\r\n--model\r\n"


def form(name: str | None, sound: bytes = SOUND) -> aiohttp.FormData:
    data = aiohttp.FormData()
    data.add_field("file", sound, filename="a.wav", content_type="audio/wav")
    if name is not None:
        data.add_field("model", name)
    data.add_field("response_format", "json")
    return data


async def transcribe(r: Rig, data: aiohttp.FormData) -> tuple[int, str | None]:
    async with r.session.post(f"{r.url}{AUDIO}", data=data) as answer:
        await answer.read()
        return answer.status, answer.headers.get("X-Ollamux-Node")


@pytest.fixture
async def hearing() -> AsyncIterator[Rig]:
    """n1 has the usual model, n2 another one that hears."""
    able = ("completion", "transcription")
    async with rig(spec(), spec(model(OTHER, capabilities=able))) as r:
        yield r


@pytest.mark.parametrize("pin", ["", "@n2"])
@pytest.mark.parametrize("size", [1, 100])
async def test_a_form_goes_to_the_node_that_has_its_model(
    hearing: Rig, size: int, pin: str
) -> None:
    assert await transcribe(hearing, form(OTHER + pin, SOUND * size)) == (200, "n2")
    seen = hearing.nodes[1].calls(AUDIO)[0]
    assert SOUND * size in seen.body
    assert seen.body.count(OTHER.encode()) == 1
    assert b"@n2" not in seen.body
    assert seen.header("Content-Length") == str(len(seen.body))


async def test_a_form_whose_model_no_node_has_is_a_404(hearing: Rig) -> None:
    assert (await transcribe(hearing, form("nope")))[0] == 404
    assert not any(node.calls(AUDIO) for node in hearing.nodes)


async def test_a_form_without_a_model_is_answered_by_a_node(hearing: Rig) -> None:
    assert (await transcribe(hearing, form(None)))[0] == 400
    assert sum(len(node.calls(AUDIO)) for node in hearing.nodes) == 1


@pytest.mark.parametrize(
    "content_type", ["application/json", "multipart/form-data", "multipart/form-data; boundary=x"]
)
async def test_what_is_no_form_goes_unchanged_to_any_node(hearing: Rig, content_type: str) -> None:
    body = asked(AUDIO, f"{OTHER}@n2")
    status, node, _ = await post(hearing, AUDIO, body, {"Content-Type": content_type})
    assert (status, node in ("n1", "n2")) == (400, True)
    (seen,) = [seen for node in hearing.nodes for seen in node.calls(AUDIO)]
    assert seen.body == body
