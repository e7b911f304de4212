"""Anthropic's Python SDK is told the same by the router as by a node."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anthropic
import pytest

from tests.clients.asked import ASKED, PARAMETERS, PNG, TOOLED
from tests.clients.pair import EMBED, pair
from tests.clients.transcript import Step, play, step
from tests.rig import MODEL

Run = Callable[[str, Sequence[Step]], Awaitable[list[Any]]]
_CREATE = "messages.create"
_TOOL = {"name": "weather", "description": "The weather", "input_schema": PARAMETERS}
_USE = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Mainz"}}
_RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "17 degrees"}
_PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
_LOOKED = [{"role": "user", "content": [_PICTURE, {"type": "text", "text": "What is this?"}]}]
_CALLED = [
    *TOOLED,
    {"role": "assistant", "content": [_USE]},
    {"role": "user", "content": [_RESULT]},
]


def _ask(method: str = _CREATE, raises: str = "", **fields: Any) -> Step:
    usual = {"model": MODEL, "max_tokens": 100, "messages": ASKED[1:]}
    return step(method, raises=raises, **{**usual, **fields})


MESSAGES = (
    _ask(system="Be brief."),
    _ask(max_tokens=3),
    _ask(stream=True),
    _ask(stream=True, system=[{"type": "text", "text": "Be brief."}]),
    _ask("messages.stream"),
    _ask("beta.messages.create", stream=True),
    _ask(messages=TOOLED, tools=[_TOOL]),
    _ask(messages=TOOLED, tools=[_TOOL], stream=True),
    _ask("messages.stream", messages=TOOLED, tools=[_TOOL]),
    _ask(messages=_CALLED, tools=[_TOOL]),
    _ask(thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2048),
    _ask(thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2048, stream=True),
    _ask(messages=_LOOKED),
    step("models.list"),
)
_MISSING, _BAD = "NotFoundError", "BadRequestError"
REFUSED = (
    _ask(raises=_MISSING, model="none"),
    _ask(raises=_MISSING, model="none", stream=True),
    _ask(raises=_BAD, model=EMBED),
    _ask(raises=_BAD, max_tokens=0),
    _ask(raises=_BAD, messages=[]),
    step("messages.count_tokens", raises=_MISSING, model=MODEL, messages=ASKED[1:]),
)


async def synchronous(url: str, steps: Sequence[Step]) -> list[Any]:
    with anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0) as client:
        return await play(client, steps, threaded=True)


async def asynchronous(url: str, steps: Sequence[Step]) -> list[Any]:
    async with anthropic.AsyncAnthropic(base_url=url, auth_token="unused", max_retries=0) as client:
        return await play(client, steps, threaded=False)


@pytest.mark.parametrize("run", [synchronous, asynchronous])
@pytest.mark.parametrize(
    "steps", [pytest.param(MESSAGES, id="messages"), pytest.param(REFUSED, id="refused")]
)
async def test_anthropic_is_told_the_same_by_router_and_node(
    run: Run, steps: Sequence[Step]
) -> None:
    async with pair() as (node, router):
        expected = await run(node, steps)
        assert await run(router, steps) == expected
