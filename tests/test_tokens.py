"""Tokens at every endpoint: who counted them, what it cost the client to have them counted."""

import json
from collections.abc import Mapping
from typing import Any

import openai
import pytest
from backports import zstd

from router.core import usage
from tests.rig import MODEL, Peer, Rig, model, parsed, rig, scripted, spec, talk
from tests.test_metrics import scrape, total

CHAT = "/v1/chat/completions"
EMBED = "nomic-embed-text"
ASKED: Any = [{"role": "user", "content": "Why is the sky blue?"}]
OPTION = {"stream_options": {"include_usage": True}}
GENERATING = [
    "/api/chat", "/api/generate", CHAT, "/v1/completions", "/v1/responses", "/v1/messages",
]  # fmt: skip


def body(**fields: Any) -> dict[str, Any]:
    """What every generating endpoint can read."""
    texts = {"prompt": "Why?", "input": "Why?", "messages": ASKED}
    return {"model": MODEL, "max_tokens": 64, **texts, **fields}


async def post(r: Rig, path: str, sent: Any, **headers: str) -> bytes:
    """An answer's bytes, once it is counted and logged."""
    before = len(r.requests)
    data = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    async with r.session.post(r.url + path, data=data, headers=headers) as answer:
        assert answer.status == 200
        got: bytes = await answer.read()
    await r.until(lambda: len(r.requests) == before + 1)
    return got


def tokens(r: Rig) -> tuple[int | None, int | None]:
    line = r.requests[-1]
    return line["prompt_tokens"], line["completion_tokens"]


# Exact


@pytest.mark.parametrize("path", [path for path in GENERATING if path != "/v1/completions"])
async def test_a_stream_is_counted_as_the_whole_answer_is(path: str) -> None:
    async with rig() as r:
        whole = await post(r, path, body(stream=False))
        told = tokens(r)
        assert usage.read(whole) == usage.Usage(*told, **durations(whole))
        assert None not in told
        await post(r, path, body(stream=True))
        assert tokens(r) == told
        assert "tokens_from" not in r.requests[-1]
        samples = await scrape(r)
        assert total(samples, "ollamux_completion_tokens_total", source="node") == 2 * (
            told[1] or 0
        )
        assert total(samples, "ollamux_completion_tokens_total", source="chunks") == 0
        assert total(samples, "ollamux_time_to_first_token_seconds_count", endpoint=path) == 2


def durations(whole: bytes) -> dict[str, Any]:
    """In seconds, where it tells them."""
    told = json.loads(whole)
    names = {"load_s": "load", "eval_s": "eval", "prompt_s": "prompt_eval", "total_s": "total"}
    spent = {name: told.get(f"{what}_duration") for name, what in names.items()}
    return {name: None if one is None else one / 1e9 for name, one in spent.items()}


@pytest.mark.parametrize(
    ("path", "prompt"), [("/api/embed", 1), ("/api/embeddings", None), ("/v1/embeddings", 1)]
)
async def test_embeddings_have_prompt_tokens_at_most(path: str, prompt: int | None) -> None:
    async with rig(spec(model(EMBED, embedding=True))) as r:
        whole = await post(r, path, {"model": EMBED, "input": "Why", "prompt": "Why"})
        assert tokens(r) == (usage.read(whole).prompt_tokens, None)
        assert (tokens(r)[0] is None) is (prompt is None)
        assert "tokens_from" not in r.requests[-1]


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_the_pace_of_an_answer_in_one_piece_is_the_nodes(path: str) -> None:
    async with rig(spec(model(decode_tps=1000.0))) as r:
        told = json.loads(await post(r, path, body(stream=False, options={"num_predict": 5})))
        samples = await scrape(r)
        pace = told["eval_duration"] / 1e9 / told["eval_count"]
        name = "ollamux_time_per_output_token_seconds"
        assert total(samples, f"{name}_sum") == pytest.approx(pace)
        assert total(samples, f"{name}_count") == 1


async def test_the_pace_of_a_stream_is_the_clocks() -> None:
    async with rig() as r:
        for path in GENERATING:
            await post(r, path, body(stream=True))
        samples = await scrape(r)
        for path in GENERATING:
            name = "ollamux_time_per_output_token_seconds_count"
            assert total(samples, name, endpoint=path) == 1, path


# Asked of the node, unseen by the client


async def openai_stream(r: Rig, **options: Any) -> list[Any]:
    async with openai.AsyncOpenAI(base_url=f"{r.url}/v1", api_key="k", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=ASKED, stream=True, **options
        )
        return [part async for part in stream]


async def test_a_client_that_did_not_ask_gets_what_a_node_sends_to_one_that_did_not() -> None:
    async with rig() as r:
        parts = await openai_stream(r)
        assert all(part.choices and part.usage is None for part in parts)
        await r.until(lambda: r.requests != [])
        assert tokens(r) > (0, 0)
        told = tokens(r)
        parts = await openai_stream(r, **OPTION)
        assert (parts[-1].choices, parts[-1].usage.completion_tokens) == ([], told[1])


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("size", [10, 300_000])
async def test_a_node_is_asked_by_the_option_and_no_other_byte(size: int, *, exact: bool) -> None:
    seen: list[Peer] = []

    async def act(peer: Peer) -> None:
        seen.append(Peer(peer.reader, peer.writer, peer.head, peer.body))
        await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    text = f'{{ "model":"{MODEL}@n1", "a":1.50, "stream":true, "b":"{"x" * size}" }} '.encode()
    sections: Any = {"metrics": {"exact_usage": exact}}
    async with scripted(act) as url, rig(entries=[{"url": url}], **sections) as r:
        await post(r, CHAT, text)
        (peer,) = seen
        added = b',"stream_options":{"include_usage":true}' if exact else b""
        expected = text.replace(b"@n1", b"").replace(b'" } ', b'"' + added + b" } ")
        assert peer.body == expected
        assert b"Content-Length: %d\r\n" % len(expected) in peer.head


async def test_an_unstreamed_request_and_other_endpoints_go_on_as_they_came() -> None:
    seen: list[bytes] = []

    async def act(peer: Peer) -> None:
        seen.append(peer.body)
        await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    sent = [json.dumps(body(stream=path != CHAT)).encode() for path in GENERATING]
    async with scripted(act) as url, rig(entries=[{"url": url}]) as r:
        for path, data in zip(GENERATING, sent, strict=True):
            await post(r, path, data)
        assert seen == sent


async def test_another_node_is_asked_too_where_the_first_cannot_be() -> None:
    async with rig(spec(), spec()) as r:
        await r.nodes[0].refuse()
        shown = await post(r, CHAT, body(stream=True))
        assert b'"usage"' not in shown
        assert r.requests[0]["attempts"] == 2
        assert None not in tokens(r)


async def test_a_reload_decides_for_the_requests_that_come_then() -> None:
    async with rig() as r:
        await post(r, CHAT, body(stream=True))
        exact = tokens(r)
        r.app.reconfigure(parsed({**r.settings, "metrics": {"exact_usage": False}}))
        await post(r, CHAT, body(stream=True))
        assert tokens(r) == (None, exact[1])
        assert r.requests[-1]["tokens_from"] == "chunks"


# By chunks


@pytest.mark.parametrize(
    ("path", "sections"),
    [("/v1/completions", {}), (CHAT, {"metrics": {"exact_usage": False}})],
)
async def test_a_stream_that_tells_no_counts_is_counted_by_its_chunks(
    path: str, sections: Mapping[str, Any]
) -> None:
    async with rig(**sections) as r:
        await post(r, path, body(stream=False))
        _, exact = tokens(r)
        await post(r, path, body(stream=True))
        assert tokens(r) == (None, exact), "a simulated node sends one token in each"
        assert r.requests[-1]["tokens_from"] == "chunks"
        samples = await scrape(r)
        name = "ollamux_completion_tokens_total"
        for source in ("node", "chunks"):
            assert total(samples, name, endpoint=path, source=source) == exact
        assert total(samples, "ollamux_prompt_tokens_total", source="chunks") == 0


async def test_completions_that_are_asked_by_the_client_are_exact() -> None:
    async with rig() as r:
        await post(r, "/v1/completions", body(stream=False))
        told = tokens(r)
        shown = await post(r, "/v1/completions", body(stream=True, **OPTION))
        assert tokens(r) == told
        assert shown.count(b'"usage"') > 1
        assert "tokens_from" not in r.requests[-1]


async def test_a_compressed_body_goes_on_as_it_came_and_is_counted_by_chunks() -> None:
    async with rig() as r:
        packed = zstd.compress(json.dumps(body(stream=True)).encode())
        shown = await post(r, CHAT, packed, **{"Content-Encoding": "zstd"})
        assert b'"usage"' not in shown
        assert tokens(r)[1]
        assert r.requests[-1]["tokens_from"] == "chunks"


@pytest.mark.parametrize("path", GENERATING[:4])
async def test_what_a_client_had_before_it_left_is_counted(path: str) -> None:
    slow = model(decode_tps=1e-6)  # one token, and no second one
    async with rig(spec(slow)) as r, talk(r.url) as client:
        await client.post(path, json.dumps(body(stream=True)).encode())
        await client.head()
        await client.chunk()
        client.leave()
        await r.until(lambda: r.requests != [])
        line = r.requests[0]
        assert (line["outcome"], line["tokens_from"]) == ("cancelled", "chunks")
        assert tokens(r) == (None, 1)
        samples = await scrape(r)
        assert total(samples, "ollamux_completion_tokens_total", source="node") == 0
        assert total(samples, "ollamux_time_per_output_token_seconds_count") == 0
