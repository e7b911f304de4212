"""The contract's traps 1 to 6: how a request is read, and that it goes on as it came."""

import asyncio
import io
import json
from typing import Any

import pytest

from router.core.dialect import Framing
from router.sim import Fault, FaultKind
from tests.rig import MODEL, Peer, model, rig, scripted, spec
from tests.traps.asking import (
    ASKING,
    FOREIGN,
    GENERATING,
    NATIVE,
    answer,
    ask,
    bodies,
    send,
)

SILENT: tuple[dict[str, Any], ...] = ({}, {"stream": None})


@pytest.mark.parametrize("fields", SILENT, ids=["absent", "null"])
@pytest.mark.parametrize("path", GENERATING)
async def test_trap_01_silence_about_stream_means_on_under_api_and_off_under_v1(
    path: str, fields: dict[str, Any]
) -> None:
    async with rig() as r:
        told = await ask(r, path, **fields)
        expected = Framing.NDJSON if path in NATIVE else Framing.WHOLE
        assert (told.status, told.framing) == (200, expected)
        # A node that dies tells what the router took it for: a stream is broken off by a record,
        # what is no stream has a true status.
        r.nodes[0].fault = Fault(FaultKind.DIE, after=1 if path in NATIVE else 0)
        broken = await ask(r, path, **fields)
        assert broken.status == (200 if path in NATIVE else 502)
        assert b'"error"' in broken.body.splitlines()[-1]


@pytest.mark.parametrize("path", FOREIGN)
async def test_trap_01_a_v1_stream_that_was_asked_for_is_one(path: str) -> None:
    async with rig() as r:
        assert (await ask(r, path, stream=True)).framing is Framing.SSE
        assert (await ask(r, path, stream=False)).framing is Framing.WHOLE


@pytest.mark.parametrize("key", ["model", "Model", "MODEL", "mOdEl"])
@pytest.mark.parametrize("path", ASKING)
async def test_trap_02_the_model_is_found_however_its_key_is_spelled(path: str, key: str) -> None:
    async with rig(spec(), spec(model("other"))) as r:
        told = await send(r, path, {key: "other", **ASKING[path], "stream": False})
        assert (told.status, told.node) == (200, "n2")


@pytest.mark.parametrize(
    "body", [{"name": "other"}, {"NAME": "other"}, {"model": "", "name": "other"}]
)
async def test_trap_02_show_takes_a_name_where_there_is_no_model(body: dict[str, str]) -> None:
    async with rig(spec(), spec(model("other"))) as r:
        told = await send(r, "/api/show", body)
        assert (told.status, told.node) == (200, "n2")


async def test_trap_02_a_name_is_no_model_where_ollama_reads_none() -> None:
    async with rig(spec(), spec(model("other"))) as r:
        told = await send(r, "/api/chat", {"name": "other", "messages": []})
        assert (told.status, told.error) == (400, "model is required")


async def test_trap_02_the_model_is_found_in_the_path() -> None:
    async with rig(spec(), spec(model("other"))) as r:
        assert (await send(r, "/v1/models/other", method="GET")).status == 200
        assert (await send(r, "/v1/models/other@n2", method="GET")).status == 200
        assert (await send(r, "/v1/models/other@n1", method="GET")).status == 404


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"\\u006fther","messages":[]}',
        b'{"mode\\u006c":"other","messages":[]}',
        b'{"model":"llama3:8b","model":"other","messages":[]}',
        b'{"model":"llama3:8b","MODEL":"other","messages":[]}',
        b'{"messages":[{"role":"user","content":"\\"model\\":\\"llama3:8b\\""}],"model":"other"}',
        b'{"model":"other","messages":[{"model":"llama3:8b","content":"x"}]}',
        b'{"options":{"model":"llama3:8b"},"model":"other","tools":[{"model":"llama3:8b"}]}',
        b'{"model":"other","messages":[]}{"model":"llama3:8b"}',
    ],
)
async def test_trap_03_only_the_last_key_of_the_top_level_names_the_model(body: bytes) -> None:
    async with rig(spec(), spec(model("other"))) as r:
        told = await send(r, "/api/chat", body)
        assert (told.status, told.node) == (200, "n2")
        assert bodies(r.nodes[1]) == [body]


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"llama3:8b","messages":[]} and more',
        b'{"model":"llama3:8b","messages":[]}\x00\xff',
        b'{"model":"llama3:8b","messages":[{"role":"user","content":"\xff\xfe\xed\xa0\x80"}]}',
        b'\r\n\t {"model":"llama3:8b","messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"model":" llama3:8b ","messages":[],"no such field":{"a":[1,2]}}',
    ],
)
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "x"])
async def test_trap_04_what_ollama_accepts_is_accepted(body: bytes, kind: str) -> None:
    async with rig() as r:
        told = await send(r, "/api/chat", body, Content_Type=kind)
        alone = await send(r, f"{r.nodes[0].url}/api/chat", body, Content_Type=kind)
        assert told.status == alone.status == 200
        assert told.framing is alone.framing
        assert bodies(r.nodes[0]) == [body, body]


@pytest.mark.parametrize("body", [b"", b"\xef\xbb\xbf{}", b"[]", b"nonsense", b'{"model":5}'])
async def test_trap_04_what_ollama_refuses_is_refused_in_its_own_words(body: bytes) -> None:
    async with rig() as r:
        told = await send(r, "/api/chat", body)
        alone = await send(r, f"{r.nodes[0].url}/api/chat", body)
        assert (told.status, told.body) == (alone.status, alone.body)
        assert told.status == 400


ODD = (
    b'{ "z":1.50,"model":"llama3:8b" , "a":1e400, "seed":12345678901234567890123,'
    b'"content":"\xe2\x80\xa8 \xc2\x85 \\u00e9 \xc3\xa9 \\/ <&>", "z":-0.0 }'
)


async def test_trap_05_bytes_pass_both_ways_as_they_came() -> None:
    got: list[bytes] = []

    async def script(peer: Peer) -> None:
        got.append(peer.body)
        await answer(peer, ODD)

    async with scripted(script) as url, rig(entries=[{"url": url}]) as r:
        for path in ASKING:
            told = await send(r, path, ODD)
            assert (told.status, told.body) == (200, ODD)
        assert got == [ODD] * len(ASKING)


async def test_trap_05_records_pass_as_they_came() -> None:
    lines = ODD + b"\n" + b'{"model":"llama3:8b","done":true,"total_duration":1.0e3}\n'

    async def script(peer: Peer) -> None:
        await answer(peer, lines, "application/x-ndjson")

    async with scripted(script) as url, rig(entries=[{"url": url}]) as r:
        assert (await ask(r, "/api/chat")).body == lines


async def test_trap_06_a_chat_with_60_mb_of_images_passes() -> None:
    sizes: list[int] = []

    async def script(peer: Peer) -> None:
        sizes.append(len(peer.body))
        await answer(peer, b'{"done":true}')

    image = "QUJD" * 15_000_000
    message = {"role": "user", "content": "what is this?", "images": [image]}
    body = json.dumps({"model": MODEL, "messages": [message], "stream": False}).encode()
    async with scripted(script) as url, rig(entries=[{"url": url}]) as r:
        async with asyncio.timeout(60):
            async with r.session.post(f"{r.url}/api/chat", data=io.BytesIO(body)) as told:
                assert told.status == 200
        assert sizes == [len(body)]
        assert len(body) > 60_000_000
