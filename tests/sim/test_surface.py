"""The simulated node's account, cloud models, zstd bodies, transcriptions, and its age."""

import io
import json
import sys
from collections.abc import Mapping

import openai
import pytest
from aiohttp import ClientSession, FormData

from router.sim import Fault, FaultKind, SimNode, SimSpec
from router.sim.versions import release
from tests.sim.nodes import CHAT, chat_body, records

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

AUDIO = b"RIFF\r\n--no boundary\r\n\x00\xff"
OPENAI_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
)
BODY: Mapping[str, object] = chat_body(prompt="hi", input="hi", max_tokens=5)


async def test_account_until_it_signs_out(web: ClientSession) -> None:
    async with web.post("/api/me") as response:
        assert (await response.json())["name"] == "sim"
    async with web.delete("/api/user/keys/a2V5") as response:
        assert (response.status, await response.text()) == (200, "null")
    for path in ("/api/me", "/api/signout"):
        async with web.post(path) as response:
            assert response.status == 401
            assert (await response.json()).keys() == {"error", "signin_url"}


async def test_sign_out_outlives_a_restart(node: SimNode, web: ClientSession) -> None:
    async with web.post("/api/signout") as response:
        assert (response.status, await response.json()) == (200, None)
    await node.stop()
    await node.start()
    async with ClientSession(node.url) as fresh, fresh.post("/api/me") as response:
        assert response.status == 401


@pytest.mark.parametrize(
    ("method", "path", "field"),
    [
        ("GET", "/api/experimental/model-recommendations", "recommendations"),
        ("POST", "/api/experimental/web_search", "results"),
        ("POST", "/api/experimental/web_fetch", "content"),
    ],
)
async def test_experimental_endpoints(
    node: SimNode, web: ClientSession, method: str, path: str, field: str
) -> None:
    async with web.request(method, path) as response:
        answer = await response.json()
    assert answer[field]
    assert (node.url in str(answer)) is (method == "POST")


@pytest.mark.parametrize(
    ("spec", "status", "message"),
    [
        (SimSpec(cloud_disabled=True), 403, "ollama cloud is disabled: "),
        (SimSpec(user=""), 401, "unauthorized"),
    ],
)
@pytest.mark.parametrize(
    "path", ["/api/chat", "/v1/chat/completions", "/api/experimental/web_search", "/api/show"]
)
async def test_cloud_that_is_not_to_be_had_is_told_natively(
    spec: SimSpec, status: int, message: str, path: str
) -> None:
    async with SimNode(spec) as node, ClientSession(node.url) as web:
        async with web.post(path, json=chat_body(model="kimi:cloud")) as response:
            assert response.status == status
            assert (await response.json())["error"].startswith(message)
        async with web.get("/api/status") as response:
            cloud = (await response.json())["cloud"]
    assert cloud["disabled"] is spec.cloud_disabled


@pytest.mark.parametrize("name", ["kimi:cloud", "gpt-oss:20b-cloud", "llama3:8b:cloud"])
async def test_cloud_model_answers_without_being_here(
    node: SimNode, web: ClientSession, name: str
) -> None:
    body = chat_body(model=name, stream=False)
    answers = []
    for _ in range(2):
        async with web.post("/api/chat", json=body) as response:
            answer = await response.json()
        assert answer["model"] == name
        answers.append(answer["message"]["content"])
    base = name.removesuffix(":cloud").removesuffix("-cloud")
    assert base in answers[0]
    assert answers[0] == answers[1]
    async with web.post("/v1/chat/completions", json=body) as response:
        assert base in (await response.json())["choices"][0]["message"]["content"]
    async with web.get("/api/ps") as response:
        assert await response.json() == {"models": []}
    async with web.get("/api/tags") as response:
        assert len((await response.json())["models"]) == 2
    assert node.scheduler.loads == 0


async def test_cloud_model_with_a_bad_name_is_refused(web: ClientSession) -> None:
    async with web.post("/api/chat", json=chat_body(model="a@b:cloud")) as response:
        assert (response.status, await response.json()) == (400, {"error": "invalid model name"})


async def test_cloud_model_on_an_old_node_has_to_be_pulled() -> None:
    async with (
        SimNode(SimSpec(version="0.17.5")) as node,
        ClientSession(node.url) as web,
    ):
        async with web.post("/api/chat", json=chat_body(model="kimi:cloud")) as response:
            assert response.status == 404
        async with web.post("/api/pull", json={"model": "kimi:cloud"}) as response:
            assert (await records(response))[-1] == {"status": "success"}
        body = chat_body(model="kimi:cloud", stream=False)
        async with web.post("/api/chat", json=body) as response:
            assert "kimi" in (await response.json())["message"]["content"]


def packed(body: object) -> bytes:
    return zstd.compress(json.dumps(body).encode())


ZSTD = {"Content-Encoding": "zstd"}


@pytest.mark.parametrize("path", OPENAI_PATHS)
async def test_zstd_body_is_read(node: SimNode, web: ClientSession, path: str) -> None:
    async with web.post(path, data=packed(BODY), headers=ZSTD) as response:
        assert response.status == 200
    assert node.seen[-1].body == packed(BODY)


async def test_zstd_body_of_several_frames_is_read(web: ClientSession) -> None:
    text = json.dumps(BODY).encode()
    data = zstd.compress(text[:20]) + zstd.compress(text[20:])
    async with web.post("/v1/chat/completions", data=data, headers=ZSTD) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    "data",
    [
        b"no zstd",
        packed(BODY)[:-3],
        packed("x" * (20 << 20)),
        zstd.compress(b" " * 9_000_000, options={zstd.CompressionParameter.window_log: 24}),
    ],
    ids=["garbage", "cut", "large", "window"],
)
async def test_bad_zstd_is_refused_natively(web: ClientSession, data: bytes) -> None:
    source = io.BytesIO(data)
    async with web.post("/v1/messages", data=source, headers=ZSTD) as response:
        assert response.status == 400
        assert isinstance((await response.json())["error"], str)


@pytest.mark.parametrize(
    ("path", "coding"),
    [("/api/chat", "zstd"), ("/api/chat", "gzip"), ("/v1/chat/completions", "gzip")],
)
async def test_compression_elsewhere_is_no_json(web: ClientSession, path: str, coding: str) -> None:
    headers = {"Content-Encoding": coding}
    async with web.post(path, data=packed(BODY), headers=headers) as response:
        assert response.status == 400


async def test_fault_meets_the_model_of_a_compressed_body(
    node: SimNode, web: ClientSession
) -> None:
    node.fault = Fault(FaultKind.STATUS, model=CHAT.name, status=503)
    async with web.post("/v1/messages", data=packed(BODY), headers=ZSTD) as response:
        assert response.status == 503


def form(**fields: str) -> FormData:
    data = FormData()
    for name, value in fields.items():
        data.add_field(name, value)
    data.add_field("file", AUDIO, filename="a.wav", content_type="audio/wav")
    return data


async def test_transcription(web: ClientSession) -> None:
    url = "/v1/audio/transcriptions"
    async with web.post(url, data=form(model=CHAT.name)) as response:
        assert response.headers["Content-Type"] == "application/x-ndjson"
        text = json.loads(await response.read())["text"]
    async with web.post(url, data=form(model=CHAT.name, response_format="text")) as response:
        assert await response.text() == text != ""


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"model": "nope"}, 404, "model 'nope' not found"),
        ({}, 400, "model is required"),
        ({"model": "nomic-embed-text"}, 400, '"nomic-embed-text" does not support transcription'),
    ],
)
async def test_transcription_refuses(
    web: ClientSession, fields: dict[str, str], status: int, message: str
) -> None:
    async with web.post("/v1/audio/transcriptions", data=form(**fields)) as response:
        assert (response.status, (await response.json())["error"]["message"]) == (status, message)


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"--x--"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\nhi"),
        ("multipart/form-data; boundary=x", b"--x\r\nA: b\r\n\r\nhi\r\n--x--\r\n"),
    ],
)
async def test_form_that_is_none_is_refused(
    web: ClientSession, content_type: str, body: bytes
) -> None:
    headers = {"Content-Type": content_type}
    async with web.post("/v1/audio/transcriptions", data=body, headers=headers) as response:
        assert response.status == 400
        assert (await response.json())["error"]["type"] == "invalid_request_error"


async def test_fault_meets_the_model_of_a_form(node: SimNode, web: ClientSession) -> None:
    node.fault = Fault(FaultKind.STATUS, model=CHAT.name, status=503)
    async with web.post("/v1/audio/transcriptions", data=form(model=CHAT.name)) as response:
        assert response.status == 503
    node.fault = Fault(FaultKind.END)
    async with web.post("/v1/audio/transcriptions", data=form(model=CHAT.name)) as response:
        assert (response.status, await response.read()) == (200, b"")


async def test_official_openai_client_transcribes(node: SimNode) -> None:
    async with openai.AsyncOpenAI(base_url=f"{node.url}/v1", api_key="x") as client:
        file = ("a.wav", AUDIO)
        said = await client.audio.transcriptions.create(
            model=CHAT.name, file=file, response_format="text"
        )
    assert said


@pytest.mark.parametrize(
    ("version", "method", "path"),
    [
        ("0.1.37", "GET", "/api/ps"),
        ("0.1.48", "GET", "/v1/models"),
        ("0.1.48", "GET", "/v1/models/llama3:8b"),
        ("0.2.5", "POST", "/api/embed"),
        ("0.6.8", "POST", "/api/tags"),
        ("0.11.11", "POST", "/api/me"),
        ("0.11.11", "POST", "/api/signout"),
        ("0.11.11", "DELETE", "/api/user/keys/x"),
        ("0.13.2", "POST", "/v1/responses"),
        ("0.13.5", "POST", "/v1/messages"),
        ("0.16.1", "GET", "/api/status"),
        ("0.17.7", "POST", "/api/experimental/web_search"),
        ("0.17.7", "POST", "/api/experimental/web_fetch"),
        ("0.19.0", "POST", "/v1/audio/transcriptions"),
        ("0.22.0", "GET", "/api/experimental/model-recommendations"),
    ],
)
async def test_node_does_not_know_what_came_after_it(version: str, method: str, path: str) -> None:
    async with (
        SimNode(SimSpec(models=(CHAT,), version=version)) as node,
        ClientSession(node.url) as web,
        web.request(method, path, json=BODY) as response,
    ):
        assert (response.status, await response.text()) == (404, "404 page not found")
        assert response.headers["Content-Type"] == "text/plain"


async def test_old_node_tells_less_and_reads_no_zstd() -> None:
    spec = SimSpec(models=(CHAT,), version="0.9.0", warm=(CHAT.name,))
    async with SimNode(spec) as node, ClientSession(node.url) as web:
        async with web.get("/api/tags") as response:
            (tag,) = (await response.json())["models"]
        async with web.get("/api/ps") as response:
            (running,) = (await response.json())["models"]
        async with web.post("/v1/completions", data=packed(BODY), headers=ZSTD) as response:
            assert response.status == 400
    assert "capabilities" not in tag
    assert "context_length" not in tag["details"]
    assert "context_length" not in running


@pytest.mark.parametrize(
    ("version", "wanted"),
    [("0.33.0-rc2", (0, 33, 0)), ("0.5", (0, 5, 0)), ("1.2.3.4", (1, 2, 3)), ("x", (0, 0, 0))],
)
def test_release_of_a_version(version: str, wanted: tuple[int, int, int]) -> None:
    assert release(version) == wanted


async def test_every_request_is_seen_whatever_comes_of_it(
    node: SimNode, web: ClientSession
) -> None:
    for method, path in (("POST", "/api/me"), ("GET", "/api/blobs/x"), ("POST", "/api/pull")):
        async with web.request(method, path) as response:
            await response.read()
    assert [one.status for one in node.seen] == [200, 405, 400]
