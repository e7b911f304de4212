"""The contract's traps 7 to 11, 36 to 39 and 54: answers while they come, and when they break."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import anthropic
import ollama
import openai
import pytest

from router.core import dialect, wording
from router.sim import Fault, FaultKind
from tests.rig import LEAST, MODEL, Peer, Rig, parsed, rig, scripted, spec, talk
from tests.test_metrics import scrape, total
from tests.traps.asking import (
    ASKING,
    FOREIGN,
    GENERATING,
    HELLO,
    NATIVE,
    answer,
    ask,
    bodies,
    family,
    posts,
    send,
)

K = FaultKind
NDJSON, SSE = "application/x-ndjson", "text/event-stream"
LINE_BYTES = 7_900_000  # Go's client accepts lines of 8,000,000


async def test_trap_07_a_line_of_8_mb_passes_whole_in_a_stream() -> None:
    context = b'{"done":true,"context":[%b1]}\n' % (b"1234," * (LINE_BYTES // 5 - 10))
    lines = b'{"response":"a","done":false}\n' + context

    async def script(peer: Peer) -> None:
        await answer(peer, lines, NDJSON)

    async with scripted(script) as url, rig(entries=[{"url": url}]) as r:
        told = await ask(r, "/api/generate")
        assert told.status == 200
        assert told.body == lines
        assert len(context) > 7_800_000


async def test_trap_07_a_whole_answer_of_many_megabytes_passes() -> None:
    body = b'{"embeddings":[[%b1]]}' % (b"0.25," * 4_000_000)

    async def script(peer: Peer) -> None:
        await answer(peer, body)

    async with scripted(script) as url, rig(entries=[{"url": url}]) as r:
        assert (await ask(r, "/api/embed")).body == body


def test_trap_08_no_limit_cuts_a_load_of_minutes_short() -> None:
    timeouts = parsed({"nodes": ["http://n:1"]}).timeouts
    assert timeouts.first_byte_s >= 600
    assert timeouts.between_records_s >= 600
    # Of a request as a whole there is none: nothing else bounds an answer.
    assert {name for name in type(timeouts).model_fields if name.endswith("_s")} == {
        "connect_s", "first_byte_s", "first_byte_min_s", "between_records_s", "silent_down_s",
        "busy_s", "drain_timeout_s", "stalled_body_s", "head_timeout_s",
    }  # fmt: skip


@pytest.mark.parametrize("path", GENERATING)
async def test_trap_08_silence_longer_than_other_limits_is_waited_out(path: str) -> None:
    short = {"head_timeout_s": 0.05, "stalled_body_s": 0.05}
    async with rig(timeouts=short) as r:
        node = r.nodes[0]
        node.fault = Fault(K.HANG, path=path)
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(ask(r, path))
            await node.until(lambda: node.held == 1)
            # Another request meets each of these limits, so all of them have passed by then.
            async with talk(r.url) as slow:
                await slow.send(
                    b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
                )
                assert (await slow.answer()).status == 408
            async with talk(r.url) as slow:
                await slow.send(b"GET")
                assert await slow.rest() == b""
            node.release()
        assert asked.result().status == 200


@pytest.mark.parametrize("status", [400, 404, 499, 500, 501, 503])
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
async def test_trap_09_the_status_is_the_nodes_however_late(path: str, status: int) -> None:
    decided = asyncio.Event()

    async def script(peer: Peer) -> None:
        asked.set()
        await decided.wait()
        await answer(peer, b'{"error":"late"}', status=status)

    asked = asyncio.Event()
    body = json.dumps({"model": MODEL, "stream": True, **GENERATING[path]}).encode()
    async with (
        scripted(script) as url,
        rig(entries=[{"url": url}], timeouts={"busy_s": 0.01}) as r,
        talk(r.url) as client,
    ):
        await client.post(path, body)
        await asked.wait()
        # A whole other request is answered meanwhile: had a status been sent early, it is here.
        assert (await send(r, "/api/version", method="GET")).status == 200
        decided.set()
        told = await client.answer()
        assert (told.status, told.body) == (status, b'{"error":"late"}')


@pytest.mark.parametrize("path", NATIVE)
async def test_trap_10_nothing_is_added_to_a_stream_that_pauses(path: str) -> None:
    async with rig() as r:
        node = r.nodes[0]
        node.fault = Fault(K.STALL, after=2)
        async with talk(r.url) as client:
            body = json.dumps({"model": MODEL, **GENERATING[path]}).encode()
            await client.post(path, body)
            await client.head()
            got = [await client.chunk(), await client.chunk()]
            await node.until(lambda: node.held == 1)
            await r.look()
            node.release()
            while piece := await client.chunk():
                got.append(piece)
        lines = b"".join(got).splitlines(keepends=True)
        assert all(json.loads(line) for line in lines)
        assert len(lines) == node.calls(path)[0].records
        assert json.loads(lines[-1])["done"] is True


def fields(path: str, *, stream: bool) -> Mapping[str, Any]:
    """What a request for a stream has to say besides the rest."""
    return {"stream": stream} if path in GENERATING else {}


@pytest.mark.parametrize("path", ASKING)
@pytest.mark.parametrize("partial", [False, True])
async def test_trap_11_what_a_node_has_read_is_asked_of_each_other_only_once(
    path: str, *, partial: bool
) -> None:
    """Nothing of an answer has been shown, and what a node answers changes nothing outside it."""
    async with rig(spec(), spec()) as r:
        for node in r.nodes:
            node.fault = Fault(K.DIE, path=path, partial=partial)
        told = await ask(r, path, **fields(path, stream=False))
        assert told.status == 502
        few, many = sorted(len(bodies(node)) for node in r.nodes)
        # A kept connection that ends without a byte counts as stale: the same node, once more.
        assert few >= 1
        assert many <= (1 if partial else 2)


@pytest.mark.parametrize("path", GENERATING)
async def test_trap_11_nothing_is_asked_again_after_the_first_record(path: str) -> None:
    async with rig(spec(), spec(), continuation={"enabled": False}) as r:
        for node in r.nodes:
            node.fault = Fault(K.DIE, after=1)
        told = await ask(r, path, stream=True)
        assert (told.status, posts(r)) == (200, 1)
        assert b"error" in told.body.splitlines()[-1 if path in NATIVE else -2]


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("after", [1, 3])
async def test_trap_36_a_stream_that_broke_does_not_look_complete(path: str, after: int) -> None:
    async with rig() as r:
        r.nodes[0].fault = Fault(K.DIE, after=after, partial=True)
        told = await ask(r, path, stream=True)
        records = told.body.rstrip(b"\n").split(b"\n" if path in NATIVE else b"\n\n")
        route = dialect.find(path)
        assert route is not None
        assert not dialect.is_final(route, told.body)
        data = records[-1].rpartition(b"data: ")[2]
        shape = json.loads(wording.error_body(family(path), 502, "", "")).keys()
        assert json.loads(data).keys() == shape
        # What an official client's parser meets before it is whole records only.
        for record in records[:-1]:
            json.loads(record.rpartition(b"data: ")[2])


async def test_trap_36_each_official_client_raises_when_a_stream_breaks() -> None:
    async with rig() as r:
        r.nodes[0].fault = Fault(K.DIE, after=2)
        with pytest.raises(ollama.ResponseError):
            async for _ in await ollama.AsyncClient(r.url).chat(MODEL, HELLO, stream=True):
                pass
        async with openai.AsyncOpenAI(base_url=f"{r.url}/v1", api_key="x", max_retries=0) as client:
            with pytest.raises(openai.APIError):
                async for _ in await client.completions.create(
                    model=MODEL, prompt="hello", stream=True
                ):
                    pass
        async with anthropic.AsyncAnthropic(base_url=r.url, api_key="x", max_retries=0) as client2:
            with pytest.raises(anthropic.APIStatusError):
                async for _ in await client2.messages.create(
                    model=MODEL,
                    messages=[{"role": "user", "content": "hello"}],
                    max_tokens=64,
                    stream=True,
                ):
                    pass


@pytest.mark.parametrize("path", GENERATING)
async def test_trap_37_a_slot_is_free_although_no_final_record_came(path: str) -> None:
    async with rig(spec(), spec(), routing=LEAST) as r:
        for node in r.nodes:
            node.fault = Fault(K.END, after=3)
        for _ in range(4):
            assert (await ask(r, path, stream=True)).status == 200
        await r.until(lambda: r.app.pool.in_flight == 0)
        # None of them is thought to be busy: they still take turns.
        assert [len(bodies(node)) for node in r.nodes] == [2, 2]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", GENERATING)
async def test_trap_38_tokens_are_counted_once_and_truly(path: str, *, stream: bool) -> None:
    async with rig() as r:
        asked: dict[str, Any] = {"stream": stream}
        if stream and path == "/v1/completions":
            asked |= {"stream_options": {"include_usage": True}}  # zero in each chunk but the last
        told = await ask(r, path, **asked)
        assert told.status == 200
        assert await counted(r) == await truly(r, path)


async def counted(r: Rig) -> tuple[float, float]:
    """The tokens that the router's metrics know of."""
    await r.until(lambda: r.requests != [])
    samples = await scrape(r)
    return (
        total(samples, "ollamux_prompt_tokens_total"),
        total(samples, "ollamux_completion_tokens_total"),
    )


async def truly(r: Rig, path: str) -> tuple[int, int]:
    """What the node itself says, unstreamed, of the request that `ask` makes."""
    body = {"model": MODEL, **GENERATING[path], "stream": False}
    value = (await send(r, r.nodes[0].url + path, body)).value
    if path in NATIVE:
        return value["prompt_eval_count"], value["eval_count"]
    usage = value["usage"]
    if "input_tokens" in usage:
        return usage["input_tokens"], usage["output_tokens"]
    return usage["prompt_tokens"], usage["completion_tokens"]


async def test_trap_38_a_client_that_asked_for_no_usage_gets_none() -> None:
    async with rig() as r:
        told = await ask(r, "/v1/chat/completions", stream=True)
        assert b'"usage":{' not in told.body
        assert told.body.endswith(b"data: [DONE]\n\n")
        asked = await ask(
            r, "/v1/chat/completions", stream=True, stream_options={"include_usage": True}
        )
        assert asked.body.count(b'"usage":{') == 1


async def test_trap_38_the_estimate_of_message_start_is_never_counted() -> None:
    async with rig() as r:
        r.nodes[0].fault = Fault(K.DIE, after=2)
        told = await ask(r, "/v1/messages", stream=True)
        assert b"message_start" in told.body
        assert b"message_delta" not in told.body
        assert (await counted(r))[0] == 0


async def test_trap_39_durations_are_nanoseconds() -> None:
    final = {
        "model": MODEL, "done": True, "load_duration": 3_000_000_000, "prompt_eval_count": 908,
        "prompt_eval_duration": 3_000_000, "eval_count": 4, "eval_duration": 2_000_000_000,
    }  # fmt: skip

    async def script(peer: Peer) -> None:
        await answer(peer, json.dumps(final).encode())

    async with scripted(script) as url, rig(entries=[{"url": url}]) as r:
        await ask(r, "/api/generate", stream=False)
        await r.until(lambda: r.requests != [])
        samples = await scrape(r)
        assert total(samples, "ollamux_time_per_output_token_seconds_sum") == 0.5
        assert total(samples, "ollamux_model_load_seconds_sum") == 3
        assert total(samples, "ollamux_prompt_tokens_total") == 908


async def test_trap_39_a_prompt_from_the_cache_is_not_taken_for_speed() -> None:
    async with rig() as r:
        for _ in range(2):
            await ask(r, "/api/chat", stream=False)
        await r.until(lambda: len(r.requests) == 2)
        assert total(await scrape(r), "ollamux_node_model_prefill_tokens_per_second") == 0
        first, second = (line["prompt_tokens"] for line in r.requests)
        assert first == second > 0


@pytest.mark.parametrize("path", FOREIGN)
async def test_trap_54_a_node_that_is_silent_over_one_answer_is_well(path: str) -> None:
    two = spec(num_parallel=2, warm=(MODEL,))
    async with rig(two, probe={"down_after": 1}) as r:
        node = r.nodes[0]
        node.fault = Fault(K.HANG, path=path)
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(ask(r, path, stream=False))
            await node.until(lambda: node.held == 1)
            for _ in range(3):
                await r.look()
            assert r.app.pool.registry.any_up
            assert (await ask(r, "/api/embed")).status == 200
            assert not asked.done()
            node.release()
        assert asked.result().status == 200
