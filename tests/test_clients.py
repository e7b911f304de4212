"""The official clients, unmodified: what the router adds to one Ollama reaches them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import ollama
import openai
import pytest

from router.sim import Fault, FaultKind
from tests.rig import MODEL, Rig, model, rig, spec

EMBED = "nomic-embed-text"
ASKED: Any = [{"role": "user", "content": "Why is the sky blue?"}]
PINNED = f"{MODEL}@n2"


def specs() -> Any:
    """Two nodes: both can chat, the second one embeds, too."""
    embed = model(EMBED, embedding=True, context_length=2048)
    return spec(model(), warm=(MODEL,)), spec(model(), embed)


@asynccontextmanager
async def pool(
    **sections: Any,
) -> AsyncIterator[tuple[Rig, ollama.AsyncClient, openai.AsyncOpenAI]]:
    async with rig(*specs(), **sections) as r:
        native = ollama.AsyncClient(host=r.url)
        async with openai.AsyncOpenAI(
            base_url=f"{r.url}/v1", api_key="unused", max_retries=0
        ) as foreign:
            try:
                yield r, native, foreign
            finally:
                await native._client.aclose()


async def expected(r: Rig) -> str:
    """What a node itself answers."""
    client = ollama.AsyncClient(host=r.nodes[0].url)
    try:
        answer = await client.chat(MODEL, ASKED)
    finally:
        await client._client.aclose()
    return answer.message.content or ""


async def collect(stream: AsyncIterator[object], into: list[object]) -> None:
    async for part in stream:
        into.append(part)  # noqa: PERF401 - what came before an error counts


# ollama, asynchronous


async def test_ollama_chats_and_streams() -> None:
    async with pool() as (r, client, _):
        text = await expected(r)
        whole = await client.chat(MODEL, ASKED)
        assert (whole.message.content, whole.done, whole.model) == (text, True, MODEL)
        parts = [part async for part in await client.chat(MODEL, ASKED, stream=True)]
        assert "".join(part.message.content or "" for part in parts) == text
        assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
        assert parts[-1].eval_count == whole.eval_count


async def test_ollama_generates() -> None:
    async with pool() as (_, client, _):
        whole = await client.generate(MODEL, "Why?")
        parts = [part async for part in await client.generate(MODEL, "Why?", stream=True)]
        assert whole.response
        assert "".join(part.response or "" for part in parts) == whole.response


async def test_ollama_embeds() -> None:
    async with pool() as (_, client, _):
        one = await client.embed(EMBED, "sky")
        two = await client.embed(EMBED, ["sky", "sea"])
        assert len(two.embeddings) == 2
        assert one.embeddings[0] == two.embeddings[0] != two.embeddings[1]
        old = await client.embeddings(EMBED, "sky")
        assert len(old.embedding) == len(one.embeddings[0])


async def test_ollama_lists_what_all_nodes_have() -> None:
    async with pool() as (r, client, _):
        listed = await client.list()
        assert sorted(entry.model or "" for entry in listed.models) == [MODEL, f"{EMBED}:latest"]
        assert [entry.model for entry in (await client.ps()).models] == [MODEL]
        shown = await client.show(EMBED)
        assert shown.capabilities == ["embedding"]
        assert [len(node.calls("/api/show")) for node in r.nodes] == [0, 1]


async def test_ollama_reaches_the_node_that_is_pinned() -> None:
    async with pool() as (r, client, _):
        for _ in range(3):
            answer = await client.chat(PINNED, ASKED)
            assert answer.model == MODEL
        assert [len(node.calls("/api/chat")) for node in r.nodes] == [0, 3]
        port = r.nodes[0].url.rpartition(":")[2]
        await client.chat(f"{MODEL}@127.0.0.1:{port}", ASKED)
        assert len(r.nodes[0].calls("/api/chat")) == 1


@pytest.mark.parametrize(
    ("name", "status", "text"),
    [
        ("none", 404, "model 'none' not found"),
        (f"{MODEL}@nowhere", 400, "no such node; the nodes are: n1 ("),
        (f"{EMBED}@n1", 404, f"model '{EMBED}' not found on http://127.0.0.1:"),
    ],
)
async def test_ollama_raises_what_the_router_refuses(name: str, status: int, text: str) -> None:
    async with pool() as (_, client, _):
        with pytest.raises(ollama.ResponseError) as raised:
            await client.chat(name, ASKED)
        assert raised.value.status_code == status
        assert raised.value.error.startswith(text)


async def test_ollama_raises_when_a_node_dies_in_mid_stream_and_none_may_go_on() -> None:
    async with pool(continuation={"enabled": False}) as (r, client, _):
        for node in r.nodes:
            node.fault = Fault(FaultKind.DIE, after=3, partial=True)
        parts: list[object] = []
        stream = await client.chat(MODEL, ASKED, stream=True)
        with pytest.raises(ollama.ResponseError, match=r"^node n[12]: "):
            await collect(stream, parts)
        assert len(parts) == 3


async def test_ollama_pulls_to_every_node_and_is_told_of_one_success() -> None:
    async with pool() as (r, client, _):
        told = [part.status async for part in await client.pull("qwen2.5:0.5b", stream=True)]
        assert (told.count("success"), told[-1]) == (1, "success")
        assert [len(node.calls("/api/pull")) for node in r.nodes] == [1, 1]
        assert "qwen2.5:0.5b" in [entry.model for entry in (await client.list()).models]


# ollama, synchronous


async def test_the_synchronous_ollama_client_works_too() -> None:
    def session(url: str, text: str) -> None:
        client = ollama.Client(host=url)
        try:
            assert client.chat(MODEL, ASKED).message.content == text
            parts = list(client.chat(MODEL, ASKED, stream=True))
            assert "".join(part.message.content or "" for part in parts) == text
            assert client.generate(MODEL, "Why?").response
            assert client.embed(EMBED, "sky").embeddings
            assert len(client.list().models) == 2
            assert len(client.ps().models) == 2
            assert client.show(MODEL).details is not None
            assert client.chat(PINNED, ASKED).message.content == text
            with pytest.raises(ollama.ResponseError) as raised:
                client.chat("none", ASKED)
            assert raised.value.status_code == 404
        finally:
            client._client.close()

    async with rig(*specs()) as r:
        await r.app.prober.look(r.app.pool.registry.specs()[0], ("ps",))
        await _warm(r)
        await asyncio.to_thread(session, r.url, await expected(r))


async def _warm(r: Rig) -> None:
    """Have the second node load its embedding model, and the router see it."""
    async with r.session.post(f"{r.url}/api/embed", json={"model": EMBED, "input": "x"}) as answer:
        assert answer.status == 200
    await r.look()


async def test_the_synchronous_ollama_client_raises_when_a_node_dies_in_mid_stream() -> None:
    def session(url: str) -> int:
        client = ollama.Client(host=url)
        parts: list[object] = []
        stream = client.chat(MODEL, ASKED, stream=True)
        try:
            # `extend` keeps what came before the error.
            with pytest.raises(ollama.ResponseError, match=r"^node n1: "):
                parts.extend(stream)
        finally:
            client._client.close()
        return len(parts)

    async with rig() as r:
        r.nodes[0].fault = Fault(FaultKind.DIE, after=2)
        assert await asyncio.to_thread(session, r.url) == 2


# openai


async def test_openai_chats_and_streams() -> None:
    async with pool() as (r, _, client):
        text = await expected(r)
        whole = await client.chat.completions.create(model=MODEL, messages=ASKED)
        assert whole.choices[0].message.content == text
        assert whole.usage is not None
        stream = await client.chat.completions.create(
            model=MODEL, messages=ASKED, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(deltas) == text
        assert chunks[-1].usage == whole.usage


async def test_openai_completes_embeds_and_responds() -> None:
    async with pool() as (_, _, client):
        completed = await client.completions.create(model=MODEL, prompt="Why?")
        assert completed.choices[0].text
        embedded = await client.embeddings.create(model=EMBED, input=["sky", "sea"])
        assert len(embedded.data) == 2
        responded = await client.responses.create(model=MODEL, input="Why?")
        assert responded.output_text
        events = await client.responses.create(model=MODEL, input="Why?", stream=True)
        assert [event.type async for event in events][-1] == "response.completed"


async def test_openai_lists_models() -> None:
    async with pool() as (_, _, client):
        listed = [one.id async for one in client.models.list()]
        assert sorted(listed) == [MODEL, f"{EMBED}:latest"]
        assert (await client.models.retrieve(MODEL)).owned_by == "library"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("none")


async def test_openai_reaches_the_node_that_is_pinned() -> None:
    async with pool() as (r, _, client):
        for _ in range(3):
            answer = await client.chat.completions.create(model=PINNED, messages=ASKED)
            assert answer.model == MODEL
        assert [len(node.calls("/v1/chat/completions")) for node in r.nodes] == [0, 3]


async def test_openai_raises_what_the_router_refuses() -> None:
    async with pool() as (r, _, client):
        with pytest.raises(openai.NotFoundError, match="model 'none' not found"):
            await client.chat.completions.create(model="none", messages=ASKED)
        with pytest.raises(openai.BadRequestError, match="no such node"):
            await client.chat.completions.create(model=f"{MODEL}@nowhere", messages=ASKED)
        await r.nodes[1].refuse()
        await r.look()
        with pytest.raises(openai.InternalServerError, match="cannot connect") as raised:
            await client.chat.completions.create(model=PINNED, messages=ASKED)
        assert raised.value.status_code == 503


async def test_openai_raises_when_a_node_dies_in_mid_stream_and_none_may_go_on() -> None:
    async with pool(continuation={"enabled": False}) as (r, _, client):
        for node in r.nodes:
            node.fault = Fault(FaultKind.DIE, after=3, partial=True)
        stream = await client.chat.completions.create(model=MODEL, messages=ASKED, stream=True)
        chunks: list[object] = []
        with pytest.raises(openai.APIError, match=r"^node n[12]: "):
            await collect(stream, chunks)
        assert len(chunks) == 3


# a node in the address


async def test_every_client_reaches_the_node_that_its_address_names() -> None:
    async with (
        rig(*specs()) as r,
        ollama.AsyncClient(host=f"{r.url}/@n2") as native,
        openai.AsyncOpenAI(base_url=f"{r.url}/@n2/v1", api_key="unused") as foreign,
        anthropic.AsyncAnthropic(base_url=f"{r.url}/@n2", api_key="unused") as other,
    ):
        for _ in range(3):
            await native.chat(MODEL, ASKED)
            await foreign.chat.completions.create(model=MODEL, messages=ASKED)
            await other.messages.create(model=MODEL, messages=ASKED, max_tokens=9)
        paths = ("/api/chat", "/v1/chat/completions", "/v1/messages")
        assert [len(r.nodes[0].calls(path)) for path in paths] == [0, 0, 0]
        assert [len(r.nodes[1].calls(path)) for path in paths] == [3, 3, 3]
        listed = await native.list()
        assert sorted(entry.model or "" for entry in listed.models) == [MODEL, f"{EMBED}:latest"]
    async with rig(*specs()) as r, ollama.AsyncClient(host=f"{r.url}/@n1") as native:
        assert [entry.model for entry in (await native.list()).models] == [MODEL]


async def test_the_ollama_client_takes_a_node_from_its_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with rig(*specs()) as r:
        monkeypatch.setenv("OLLAMA_HOST", f"{r.url}/@n1")
        async with ollama.AsyncClient() as client:
            await client.chat(MODEL, ASKED)
            await client.pull("qwen2.5:0.5b")
        assert len(r.nodes[0].calls("/api/chat")) == len(r.nodes[0].calls("/api/pull")) == 1
        assert not r.nodes[1].calls("/api/chat") + r.nodes[1].calls("/api/pull")
