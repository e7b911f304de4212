"""OpenAI's Python SDK is told the same by the router as by a node."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import openai
import pytest

from tests.clients.asked import ASKED, FUNCTION, PNG, SCHEMA, TOOL, TOOLED
from tests.clients.pair import EMBED, pair
from tests.clients.transcript import Step, play, step
from tests.rig import MODEL

Run = Callable[[str, Sequence[Step]], Awaitable[list[Any]]]
_CHAT = "chat.completions.create"
_USAGE = {"include_usage": True}
_PICTURE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
_LOOKED = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, _PICTURE]}]
_NAMED = {"name": "answer", "schema": SCHEMA, "strict": True}
_CALLED = [
    *TOOLED,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city":"Mainz"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "17 degrees"},
]
_PLAIN = {"type": "function", **FUNCTION, "strict": False}

CHAT = (
    step(_CHAT, model=MODEL, messages=ASKED),
    step(_CHAT, model=MODEL, messages=ASKED, stream=True),
    step(_CHAT, model=MODEL, messages=ASKED, stream=True, stream_options=_USAGE),
    step(_CHAT, model=MODEL, messages=ASKED, stream=True, stream_options={"include_usage": False}),
    step(_CHAT, model=MODEL, messages=TOOLED, tools=[TOOL]),
    step(_CHAT, model=MODEL, messages=TOOLED, tools=[TOOL], stream=True),
    step(_CHAT, model=MODEL, messages=_CALLED, tools=[TOOL]),
    step(_CHAT, model=MODEL, messages=_LOOKED),
    step(_CHAT, model=MODEL, messages=ASKED, reasoning_effort="low"),
    step(_CHAT, model=MODEL, messages=ASKED, reasoning_effort="low", stream=True),
    step(_CHAT, model=MODEL, messages=ASKED, max_tokens=3, stream=True, stream_options=_USAGE),
    step(
        _CHAT,
        model=MODEL,
        messages=ASKED,
        response_format={"type": "json_schema", "json_schema": _NAMED},
    ),
    step(_CHAT, model=MODEL, messages=ASKED, response_format={"type": "json_object"}, stream=True),
    step("chat.completions.stream", model=MODEL, messages=ASKED),
)
COMPLETIONS = (
    step("completions.create", model=MODEL, prompt="Why?"),
    step("completions.create", model=MODEL, prompt="Why?", stream=True),
    step("completions.create", model=MODEL, prompt="Why?", stream=True, stream_options=_USAGE),
    step("completions.create", model=MODEL, prompt=""),
)
# Without a form the SDK asks for base64 and unpacks it.
EMBEDDINGS = (
    step("embeddings.create", model=EMBED, input="sky"),
    step("embeddings.create", model=EMBED, input=["sky", "sea"], encoding_format="base64"),
    step("embeddings.create", model=EMBED, input=["sky", "sea"], encoding_format="float"),
)
RESPONSES = (
    step("responses.create", model=MODEL, input="Why?"),
    step("responses.create", model=MODEL, input="Why?", stream=True),
    step("responses.create", model=MODEL, input=ASKED[1:], instructions="Be brief.", stream=True),
    step("responses.create", model=MODEL, input=TOOLED, tools=[_PLAIN]),
    step("responses.create", model=MODEL, input=TOOLED, tools=[_PLAIN], stream=True),
    step("responses.create", model=MODEL, input="Why?", reasoning={"effort": "low"}, stream=True),
    step("responses.create", model=MODEL, input="Why?", max_output_tokens=3),
    step("responses.stream", model=MODEL, input="Why?"),
)
MODELS = (
    step("models.list"),
    step("models.retrieve", model=MODEL),
    step("models.retrieve", model=EMBED),
)
_MISSING, _BAD = "NotFoundError", "BadRequestError"
REFUSED = (
    step(_CHAT, raises=_MISSING, model="none", messages=ASKED),
    step(_CHAT, raises=_MISSING, model="none", messages=ASKED, stream=True),
    step(_CHAT, raises=_BAD, model=MODEL, messages=[]),
    step(_CHAT, raises=_BAD, model="", messages=ASKED),
    step(_CHAT, raises=_BAD, model=EMBED, messages=ASKED),
    step("completions.create", raises=_MISSING, model="none", prompt="Why?"),
    step("completions.create", raises=_BAD, model=MODEL, prompt=["Why?", "How?"]),
    step("embeddings.create", raises=_MISSING, model="none", input="sky"),
    step("embeddings.create", raises=_BAD, model=EMBED, input="sky", encoding_format="octal"),
    step("responses.create", raises=_MISSING, model="none", input="Why?"),
    step("responses.create", raises=_MISSING, model="none", input="Why?", stream=True),
    step("models.retrieve", raises=_MISSING, model="none:latest"),
    step("models.retrieve", raises=_MISSING, model="some/name"),
    step("images.generate", raises=_MISSING, model=MODEL, prompt="A node"),
)


async def synchronous(url: str, steps: Sequence[Step]) -> list[Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        return await play(client, steps, threaded=True)


async def asynchronous(url: str, steps: Sequence[Step]) -> list[Any]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        return await play(client, steps, threaded=False)


@pytest.mark.parametrize("run", [synchronous, asynchronous])
@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(CHAT, id="chat"),
        pytest.param(COMPLETIONS, id="completions"),
        pytest.param(EMBEDDINGS, id="embeddings"),
        pytest.param(RESPONSES, id="responses"),
        pytest.param(MODELS, id="models"),
        pytest.param(REFUSED, id="refused"),
    ],
)
async def test_openai_is_told_the_same_by_router_and_node(run: Run, steps: Sequence[Step]) -> None:
    async with pair() as (node, router):
        expected = await run(node, steps)
        assert await run(router, steps) == expected
