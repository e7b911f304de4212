"""What the Python clients ask, asked again on bare sockets: the bytes are a node's own."""

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from router.sim import SimNode
from router.sim.exchange import Seen
from tests.clients import test_anthropic_python as anthropic
from tests.clients import test_ollama_python as ollama
from tests.clients import test_openai_python as openai
from tests.clients.pair import WHOLE, pair
from tests.clients.transcript import TIMES, Step, comparable
from tests.rig import Answer, talk

Run = Callable[[str, Sequence[Step]], Awaitable[list[Any]]]
_TIME = re.compile(rf'"({"|".join(sorted(TIMES))})":("[^"]*"|\d+)')
# A client's own connection; `talk` frames its request itself.
_OWN = frozenset({"host", "connection", "content-length", "transfer-encoding"})
# `Connection` is told by each hop for itself. The length is that of a body which holds times.
_HOP = frozenset({"date", "connection", "content-length"})


async def again(url: str, seen: Seen) -> Answer:
    """Send a request that a node has seen once more."""
    headers = [f"{name}: {value}" for name, value in seen.headers if name.lower() not in _OWN]
    head = (
        f"{seen.method} {seen.raw_path} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Content-Length: {len(seen.body)}",
        *headers,
    )
    async with talk(url) as t:
        await t.send("\r\n".join(head).encode() + b"\r\n\r\n" + seen.body)
        return await t.answer(bodiless=seen.method == "HEAD")


def wired(answer: Answer) -> tuple[object, ...]:
    """What must be the same of an answer: all of it but times, identities and our own headers."""
    headers = sorted(
        (name.lower(), value)
        for name, value in answer.headers
        if name.lower() not in _HOP and not name.lower().startswith("x-ollamux-")
    )
    framed = answer.header("Content-Length") is not None
    body = comparable(_TIME.sub(r'"\1":0', answer.body.decode()))
    return answer.version, answer.status, headers, framed, answer.whole, body


@pytest.mark.parametrize(
    ("run", "scripts"),
    [
        pytest.param(
            ollama.asynchronous,
            (ollama.CHAT, ollama.GENERATE, ollama.EMBEDDING, ollama.SHOWN, ollama.REFUSED),
            id="ollama",
        ),
        pytest.param(
            openai.asynchronous,
            (openai.CHAT, openai.COMPLETIONS, openai.EMBEDDINGS, openai.RESPONSES, openai.REFUSED),
            id="openai",
        ),
        pytest.param(
            anthropic.asynchronous, (anthropic.MESSAGES, anthropic.REFUSED), id="anthropic"
        ),
    ],
)
async def test_the_bytes_of_an_answer_are_a_nodes_own(
    run: Run, scripts: Sequence[Sequence[Step]]
) -> None:
    async with SimNode(WHOLE) as recorded:
        for steps in scripts:
            await run(recorded.url, steps)
        asked = list(recorded.seen)
    async with pair() as (node, router):
        for seen in asked:
            expected = wired(await again(node, seen))
            assert wired(await again(router, seen)) == expected, (seen.raw_path, seen.body)
