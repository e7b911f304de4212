"""The official Python client of Ollama is told the same by the router as by a node."""

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import ollama
import pytest

from tests.clients.asked import ASKED, IMAGE, LOOKED, SCHEMA, TOOL, TOOLED
from tests.clients.pair import EMBED, pair
from tests.clients.transcript import Step, play, step
from tests.rig import MODEL

Run = Callable[[str, Sequence[Step]], Awaitable[list[Any]]]

CHAT = (
    step("chat", model=MODEL, messages=ASKED),
    step("chat", model=MODEL, messages=ASKED, stream=True),
    step("chat", model=MODEL, messages=TOOLED, tools=[TOOL]),
    step("chat", model=MODEL, messages=TOOLED, tools=[TOOL], stream=True),
    step("chat", model=MODEL, messages=LOOKED),
    step("chat", model=MODEL, messages=ASKED, think=True),
    step("chat", model=MODEL, messages=ASKED, think=True, stream=True),
    step("chat", model=MODEL, messages=ASKED, format=SCHEMA),
    step("chat", model=MODEL, messages=ASKED, format="json", stream=True),
    step("chat", model=MODEL, messages=ASKED, options={"num_predict": 3}),
    step("chat", model=MODEL.upper(), messages=ASKED, keep_alive="5m"),
    step("chat", model=MODEL, messages=[]),
)
GENERATE = (
    step("generate", model=MODEL, prompt="Why?"),
    step("generate", model=MODEL, prompt="Why?", stream=True),
    step("generate", model=MODEL, prompt="Why?", system="Be brief.", think=True, stream=True),
    step("generate", model=MODEL, prompt="What?", images=[IMAGE]),
    step("generate", model=MODEL, prompt="Why?", raw=True, options={"seed": 1}),
    step("generate", model=MODEL, prompt="Why?", format=SCHEMA),
    step("generate", model=MODEL, prompt="And?", context=[1, 2, 3]),
    step("generate", model=MODEL),
    step("generate", model=MODEL, keep_alive=0),
)
EMBEDDING = (
    step("embed", model=EMBED, input="sky"),
    step("embed", model=EMBED, input=["sky", "sea"], truncate=True),
    step("embed", model=EMBED, input=[]),
    step("embeddings", model=EMBED, prompt="sky"),
)
SHOWN = (step("list"), step("show", model=MODEL), step("show", model=EMBED))
LISTING = (*SHOWN, step("ps"))
_ERROR = "ResponseError"
REFUSED = (
    step("chat", raises=_ERROR, model="none", messages=ASKED),
    step("chat", raises=_ERROR, model="none", messages=ASKED, stream=True),
    step("chat", raises=_ERROR, model=" ", messages=ASKED),
    step("chat", raises=_ERROR, model="no such:name", messages=ASKED),
    step("chat", raises=_ERROR, model=EMBED, messages=ASKED),
    step("chat", raises=_ERROR, model=MODEL, messages=ASKED, options={"num_ctx": "many"}),
    step("chat", raises=_ERROR, model=MODEL, messages=ASKED, keep_alive="10"),
    step("generate", raises=_ERROR, model="none", prompt="Why?"),
    step("generate", raises=_ERROR, model=" ", prompt="Why?", stream=True),
    step("embed", raises=_ERROR, model="none", input="sky"),
    step("embeddings", raises=_ERROR, model=EMBED.upper(), prompt="sky"),
    step("show", raises=_ERROR, model="none"),
)


_GGUF = b"GGUF" + bytes(range(256)) * 400
_DIGEST = f"sha256:{hashlib.sha256(_GGUF).hexdigest()}"
_SMALL, _MIDDLE = "qwen2.5:0.5b", "llama3.2:3b"

PULL = (
    step("pull", model=_SMALL),
    step("pull", model=_MIDDLE, stream=True),
    step("list"),
    step("show", model=_MIDDLE),
    step("chat", model=_SMALL, messages=ASKED),
    step("pull", model=_MIDDLE, stream=True),
    step("pull", raises=_ERROR, model="none"),
    step("pull", raises=_ERROR, model="none", stream=True),
    step("pull", raises=_ERROR, model="no such:name"),
)
COPY_DELETE = (
    step("copy", source=MODEL, destination="mine"),
    step("list"),
    step("show", model="mine"),
    step("chat", model="mine", messages=ASKED),
    step("copy", raises=_ERROR, source="none", destination="other"),
    step("copy", raises=_ERROR, source=MODEL, destination="no such:name"),
    step("delete", model="mine"),
    step("list"),
    step("delete", raises=_ERROR, model="mine"),
    step("show", raises=_ERROR, model="mine"),
)


def creation(path: Path) -> Sequence[Step]:
    """Make models from another one and from a file."""
    path.write_bytes(_GGUF)
    rhymes: dict[str, Any] = {
        "from_": MODEL,
        "system": "Rhyme.",
        "parameters": {"temperature": 0.5},
    }
    return (
        step("create", model="poet", **rhymes),
        step("create", model="bard", stream=True, **rhymes),
        step("show", model="poet"),
        step("chat", model="poet", messages=ASKED, stream=True),
        step("create_blob", path=path),
        step("create_blob", path=path),
        step("create", model="grown", files={"grown.gguf": _DIGEST}, stream=True),
        step("generate", model="grown", prompt="Why?"),
        step("list"),
        step("create", raises=_ERROR, model="no such:name", from_=MODEL),
        step("create", raises=_ERROR, model="bare"),
    )


async def synchronous(url: str, steps: Sequence[Step]) -> list[Any]:
    with ollama.Client(host=url) as client:
        return await play(client, steps, threaded=True)


async def asynchronous(url: str, steps: Sequence[Step]) -> list[Any]:
    async with ollama.AsyncClient(host=url) as client:
        return await play(client, steps, threaded=False)


both = pytest.mark.parametrize("run", [synchronous, asynchronous])


@both
@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(CHAT, id="chat"),
        pytest.param(GENERATE, id="generate"),
        pytest.param(EMBEDDING, id="embedding"),
        pytest.param(LISTING, id="listing"),
        pytest.param(REFUSED, id="refused"),
        pytest.param(PULL, id="pull"),
        pytest.param(COPY_DELETE, id="copy and delete"),
    ],
)
async def test_ollama_is_told_the_same_by_router_and_node(run: Run, steps: Sequence[Step]) -> None:
    async with pair() as (node, router):
        expected = await run(node, steps)
        assert await run(router, steps) == expected


@both
async def test_ollama_creates_through_the_router_as_on_a_node(run: Run, tmp_path: Path) -> None:
    steps = creation(tmp_path / "grown.gguf")
    async with pair() as (node, router):
        expected = await run(node, steps)
        assert await run(router, steps) == expected
