"""The official clients, unmodified, on nodes that die under them: the same text, and no error."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import ollama
import openai
import pytest

from router.sim import Fault, FaultKind, SimNode
from tests.clients import test_javascript as javascript
from tests.clients import test_ollama_python as native
from tests.clients import test_openai_python as foreign
from tests.clients.asked import ASKED, TOOL
from tests.clients.pair import CHANGED
from tests.clients.transcript import Step, play, step
from tests.rig import LEAST, MODEL, Rig, model, rig, spec

K = FaultKind
Run = Callable[[str, Sequence[Step]], Awaitable[list[Any]]]
CHAT, GENERATE, OPENAI = "/api/chat", "/api/generate", "/v1/chat/completions"
TOKENS = 8
_SPEC = spec(model(modified_at=CHANGED[0]), answer_tokens=(TOKENS, TOKENS), warm=(MODEL,))
# A simulated node does not count a text as it says it.
_UNSURE = ("prompt_eval_count", "prompt_tokens", "total_tokens")
_CREATE = "chat.completions.create"
_USAGE = {"include_usage": True}


@asynccontextmanager
async def pool(**sections: Any) -> AsyncIterator[tuple[str, Rig]]:
    """The address of a node that lives, and a router over three of its kind."""
    async with SimNode(_SPEC) as node, rig(_SPEC, _SPEC, _SPEC, **sections) as r:
        yield node.url, r


def surely(value: Any) -> Any:
    """A transcript without the counts that no simulated node can add up."""
    if isinstance(value, dict):
        return {key: surely(one) for key, one in value.items() if key not in _UNSURE}
    return [surely(one) for one in value] if isinstance(value, list) else value


async def continued(r: Rig) -> list[str]:
    """What became of the answers that broke, one after the other."""
    await r.until(lambda: r.app.pool.in_flight == 0 and r.requests != [])
    return [result for line in r.requests for result in line.get("continuations", ())]


NATIVE = (
    pytest.param(CHAT, step("chat", model=MODEL, messages=ASKED, stream=True), 3, id="chat"),
    pytest.param(
        CHAT,
        step("chat", model=MODEL, messages=ASKED, stream=True, options={"num_predict": 5}),
        3,
        id="chat with a limit",
    ),
    pytest.param(
        CHAT,
        step("chat", model=MODEL, messages=ASKED, stream=True, think=True),
        TOKENS + 2,
        id="chat that thinks",
    ),
    pytest.param(
        GENERATE,
        step("generate", model=MODEL, prompt="[INST] Why? [/INST]", raw=True, stream=True),
        3,
        id="generate",
    ),
)
FOREIGN = (
    pytest.param(step(_CREATE, model=MODEL, messages=ASKED, stream=True), 3, id="chat"),
    pytest.param(
        step(_CREATE, model=MODEL, messages=ASKED, stream=True, stream_options=_USAGE),
        3,
        id="chat with counts",
    ),
    pytest.param(
        step(_CREATE, model=MODEL, messages=ASKED, stream=True, max_tokens=5), 5, id="all said"
    ),
    pytest.param(
        step(_CREATE, model=MODEL, messages=ASKED, stream=True, reasoning_effort="low"),
        TOKENS + 2,
        id="chat that thinks",
    ),
    pytest.param(step("chat.completions.stream", model=MODEL, messages=ASKED), 3, id="stream"),
)


@pytest.mark.parametrize("run", [native.synchronous, native.asynchronous])
@pytest.mark.parametrize(("path", "asked", "after"), NATIVE)
async def test_ollama_does_not_notice_that_a_node_dies(
    run: Run, path: str, asked: Step, after: int
) -> None:
    async with pool() as (node, r):
        r.nodes[0].fault = Fault(K.DIE, path=path, after=after, partial=True)
        expected = await run(node, [asked])
        assert surely(await run(r.url, [asked])) == surely(expected)
        assert await continued(r) == ["continued"]


@pytest.mark.parametrize("run", [foreign.synchronous, foreign.asynchronous])
@pytest.mark.parametrize(("asked", "after"), FOREIGN)
async def test_openai_does_not_notice_that_a_node_dies(run: Run, asked: Step, after: int) -> None:
    async with pool() as (node, r):
        r.nodes[0].fault = Fault(K.DIE, path=OPENAI, after=after, partial=True)
        expected = await run(node, [asked])
        assert surely(await run(r.url, [asked])) == surely(expected)
        assert await continued(r) == (
            ["ended"] if asked.fields.get("max_tokens") else ["continued"]
        )


@pytest.mark.parametrize("run", [native.synchronous, native.asynchronous])
async def test_ollama_does_not_notice_that_two_nodes_die(run: Run) -> None:
    asked = step("chat", model=MODEL, messages=ASKED, stream=True)
    async with pool() as (node, r):
        for dying in r.nodes[:2]:
            dying.fault = Fault(K.DIE, after=2)
        expected = await run(node, [asked])
        assert surely(await run(r.url, [asked])) == surely(expected)
        assert await continued(r) == ["continued", "continued"]


FAULTS = (
    Fault(K.DIE, partial=True), Fault(K.GARBAGE), Fault(K.STATUS, status=500),
    Fault(K.STATUS, status=503), Fault(K.STATUS, status=404),
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kind} {fault.status}")
async def test_no_client_notices_a_node_that_fails_before_it_says_anything(fault: Fault) -> None:
    calls: Sequence[tuple[Run, Sequence[Step]]] = (
        (
            native.asynchronous,
            (
                step("chat", model=MODEL, messages=ASKED),
                step("chat", model=MODEL, messages=ASKED, stream=True, tools=[TOOL]),
                step("generate", model=MODEL, prompt="Why?"),
                step("embed", model=MODEL, input=["sky", "sea"]),
            ),
        ),
        (
            foreign.asynchronous,
            (
                step(_CREATE, model=MODEL, messages=ASKED),
                step("responses.create", model=MODEL, input="Why?", stream=True),
                step("completions.create", model=MODEL, prompt="Why?", stream=True),
            ),
        ),
    )
    async with pool(retry={"budget_least": 100}) as (node, r):
        for run, steps in calls:
            expected = await run(node, steps)
            r.nodes[0].fault = fault
            assert surely(await run(r.url, steps)) == surely(expected)


@javascript.pytestmark
@pytest.mark.parametrize(("script", "path"), [("ollama.mjs", CHAT), ("openai.mjs", OPENAI)])
async def test_the_javascript_clients_do_not_notice_that_a_node_dies(
    script: str, path: str
) -> None:
    """Their first call is no stream and goes to the first node, their second is one."""
    embed = model("nomic-embed-text", embedding=True, context_length=2048, modified_at=CHANGED[1])
    whole = spec(model(modified_at=CHANGED[0]), embed, warm=(MODEL, embed.name))
    async with SimNode(whole) as node, rig(whole, whole, routing=LEAST) as r:
        expected = await javascript.told(script, node.url)
        r.nodes[1].fault = Fault(K.DIE, path=path, after=3, times=1)
        got = await javascript.told(script, r.url)
        first = slice(0, 2)
        assert [name for name, _, failure in got[first] if failure] == []
        assert surely(got[first]) == surely(expected[first])
        assert (await continued(r))[:1] == ["continued"]


# Where nobody can go on


async def _taken(stream: AsyncIterator[Any], into: list[Any]) -> None:
    async for part in stream:
        into.append(part)  # noqa: PERF401 - what came before an error counts


async def test_each_client_raises_where_an_answer_cannot_be_finished() -> None:
    async with pool() as (_, r):
        for node in r.nodes:
            node.fault = Fault(K.DIE, after=3)
        got: list[Any] = []
        async with ollama.AsyncClient(host=r.url) as client:
            with pytest.raises(ollama.ResponseError, match=r"^node n\d: connection "):
                await _taken(await client.generate(MODEL, "Why?", stream=True), got)
        async with openai.AsyncOpenAI(base_url=f"{r.url}/v1", api_key="x", max_retries=0) as other:
            texts = await other.completions.create(model=MODEL, prompt="Why?", stream=True)
            with pytest.raises(openai.APIError, match=r"^node n\d: connection "):
                await _taken(texts, got)
            made = await other.responses.create(model=MODEL, input="Why?", stream=True)
            with pytest.raises(openai.APIError, match=r"^node n\d: connection "):
                await _taken(made, got)
        async with anthropic.AsyncAnthropic(base_url=r.url, api_key="x", max_retries=0) as third:
            with pytest.raises(anthropic.APIStatusError, match=r"node n\d: connection "):
                await _taken(
                    await third.messages.create(
                        model=MODEL, messages=ASKED[1:], max_tokens=9, stream=True
                    ),
                    got,
                )
        assert len(got) >= 3 * 4 - 1
        assert await continued(r) == ["unable"] * 4


async def test_each_client_is_told_the_status_and_the_nodes_where_all_fail() -> None:
    async with pool() as (_, r):
        r.nodes[0].fault = Fault(K.GARBAGE)
        r.nodes[1].fault = r.nodes[2].fault = Fault(K.STATUS, status=500, message="no memory")
        told = r"node n1: .*; node n2: no memory; node n3: no memory"
        async with ollama.AsyncClient(host=r.url) as client:
            with pytest.raises(ollama.ResponseError, match=told) as raised:
                await client.chat(MODEL, ASKED, stream=False)
            assert raised.value.status_code == 500
        async with openai.AsyncOpenAI(base_url=f"{r.url}/v1", api_key="x", max_retries=0) as other:
            with pytest.raises(openai.InternalServerError, match="no memory"):
                await other.chat.completions.create(model=MODEL, messages=ASKED)


async def test_openai_is_told_when_to_come_back_to_nodes_that_are_all_full() -> None:
    async with pool(timeouts={"busy_s": 0.01}) as (_, r):
        for node in r.nodes:
            node.fault = Fault(K.STATUS, status=503, message="server busy, please try again.")
        async with openai.AsyncOpenAI(base_url=f"{r.url}/v1", api_key="x", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError, match="server busy") as raised:
                await client.chat.completions.create(model=MODEL, messages=ASKED)
            assert raised.value.status_code == 503
            assert raised.value.response.headers["Retry-After"] == "1"


async def test_a_client_that_tries_again_meets_nodes_that_have_come_back() -> None:
    """OpenAI's SDK waits as long as it is told, and asks once more."""
    async with pool(breaker={"resets": 100}) as (node, r):
        for dying in r.nodes:
            dying.fault = Fault(K.DIE, partial=True, times=1)
        asked = [step(_CREATE, model=MODEL, messages=ASKED)]
        expected = await foreign.asynchronous(node, asked)
        async with openai.AsyncOpenAI(base_url=f"{r.url}/v1", api_key="x", max_retries=1) as client:
            assert surely(await play(client, asked, threaded=False)) == surely(expected)
