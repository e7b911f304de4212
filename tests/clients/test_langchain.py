"""LangChain's Ollama package is told the same by the router as by a node."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from langchain_core.messages import AIMessage
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM

from tests.clients.asked import ASKED, SCHEMA, TOOL, TOOLED
from tests.clients.pair import EMBED, pair
from tests.clients.transcript import play, step
from tests.rig import MODEL

_TURNS: Any = [("system", ASKED[0]["content"]), ("user", ASKED[1]["content"])]
_ERROR = "ResponseError"


@asynccontextmanager
async def _made(kind: Callable[..., Any], **settings: Any) -> AsyncIterator[Any]:
    """Build one of LangChain's clients where it may wait, and close what it leaves open."""
    client = await asyncio.to_thread(lambda: kind(**settings))
    try:
        yield client
    finally:
        client._client.close()
        await client._async_client.close()


async def _chatting(url: str) -> list[Any]:
    told = []
    for settings in ({"validate_model_on_init": True}, {"reasoning": True}, {"format": SCHEMA}):
        async with _made(ChatOllama, model=MODEL, base_url=url, **settings) as client:
            for asker in (client, client.bind_tools([TOOL])):
                steps = (step("invoke", input=_TURNS), step("stream", input=TOOLED))
                told += await play(asker, steps, threaded=True)
                steps = (step("ainvoke", input=TOOLED), step("astream", input=_TURNS))
                told += await play(asker, steps, threaded=False)
    async with _made(ChatOllama, model="none", base_url=url) as client:
        told += await play(client, [step("invoke", raises=_ERROR, input="?")], threaded=True)
        told += await play(client, [step("astream", raises=_ERROR, input="?")], threaded=False)
    return told


async def test_chat_ollama_is_told_the_same_by_router_and_node() -> None:
    async with pair() as (node, router):
        expected = await _chatting(node)
        assert await _chatting(router) == expected


async def _embedding(url: str) -> list[Any]:
    async with _made(OllamaEmbeddings, model=EMBED, base_url=url) as client:
        steps = (step("embed_documents", texts=["sky", "sea"]), step("embed_query", text="sky"))
        told = await play(client, steps, threaded=True)
        return told + await play(client, [step("aembed_query", text="sky")], threaded=False)


async def _completing(url: str) -> list[Any]:
    async with _made(OllamaLLM, model=MODEL, base_url=url) as client:
        steps = (step("invoke", input="Why?"), step("stream", input="Why?"))
        told = await play(client, steps, threaded=True)
        return told + await play(client, [step("ainvoke", input="Why?")], threaded=False)


async def test_ollama_embeddings_is_told_the_same_by_router_and_node() -> None:
    async with pair() as (node, router):
        expected = await _embedding(node)
        assert await _embedding(router) == expected


async def test_ollama_llm_is_told_the_same_by_router_and_node() -> None:
    async with pair() as (node, router):
        expected = await _completing(node)
        assert await _completing(router) == expected


async def test_chat_ollama_calls_tools_through_the_router() -> None:
    async with (
        pair() as (_, router),
        _made(ChatOllama, model=MODEL, base_url=router) as client,
    ):
        answer = await client.bind_tools([TOOL]).ainvoke(TOOLED)
        assert isinstance(answer, AIMessage)
        assert [call["name"] for call in answer.tool_calls] == ["weather"]
