"""Streams whose node dies in the midst: finished by another node, or ended honestly."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from backports import zstd

from router.core.policy import Attempt
from router.sim import Fault, FaultKind, SimSpec
from tests.rig import MODEL, Answer, Rig, model, rig, spec, talk
from tests.test_metrics import scrape, total

K = FaultKind
CHAT, GENERATE, OPENAI = "/api/chat", "/api/generate", "/v1/chat/completions"
TOKENS = 5
_CLOCKED = {
    "created_at", "total_duration", "load_duration", "prompt_eval_duration", "eval_duration",
    "id", "created",
}  # fmt: skip
_NAMED = ("id", "system_fingerprint", "model")  # `created` is a clock, in seconds
Record = dict[str, Any]


def nodes(count: int = 2) -> list[SimSpec]:
    """Nodes that answer everything with as many tokens."""
    return [spec(answer_tokens=(TOKENS, TOKENS)) for _ in range(count)]


def asked(path: str, **fields: Any) -> Record:
    """A request for a stream."""
    if path == GENERATE:
        return {"model": MODEL, "prompt": "[INST] Why? [/INST]", "raw": True, **fields}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    return {"model": MODEL, "messages": messages, "stream": True, **fields}


async def post(url: str, path: str, sent: Record | bytes, *headers: str) -> Answer:
    async with talk(url) as client:
        data = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
        await client.post(path, data, *headers)
        return await client.answer()


def records(answer: Answer) -> list[Record]:
    """The records of a stream; those of events without the last, `[DONE]`."""
    assert (answer.status, answer.whole) == (200, True), answer
    if answer.header("Content-Type") == "text/event-stream":
        *events, done, end = answer.body.decode().split("\n\n")
        assert (done, end) == ("data: [DONE]", ""), answer.body
        return [json.loads(event.removeprefix("data: ")) for event in events]
    *lines, rest = answer.body.split(b"\n")
    assert rest == b""
    return [json.loads(line) for line in lines]


def told(answer: Answer) -> tuple[list[Record], str]:
    """The records of a stream that breaks off, and the message of its error record."""
    assert (answer.status, answer.whole) == (200, True), answer
    end = b"\n\n" if answer.header("Content-Type") == "text/event-stream" else b"\n"
    *found, last = answer.body.removesuffix(end).split(end)
    error = json.loads(last.removeprefix(b"event: error\n").removeprefix(b"data: "))["error"]
    whole = [json.loads(one.rpartition(b"data: ")[2]) for one in found]
    return whole, str(error if isinstance(error, str) else error["message"])


def parts(record: Record) -> Mapping[str, Any]:
    """Where a record carries the answer."""
    found: Mapping[str, Any] = record
    if "choices" in record:
        found = record["choices"][0]["delta"] if record["choices"] else {}
    elif "message" in record:
        found = record["message"]
    return found


def text(found: Sequence[Record], *names: str) -> str:
    """All that was said, of one kind."""
    kinds = names or ("content", "response")
    return "".join(parts(one).get(kind) or "" for one in found for kind in kinds)


def shape(found: Sequence[Record]) -> list[Record]:
    """Records without what two answers to the same may differ in."""
    return [{name: one for name, one in each.items() if name not in _CLOCKED} for each in found]


def dies(after: int, **fields: Any) -> Fault:
    return Fault(K.DIE, after=after, **fields)


@dataclass
class Told:
    """How the log line of the one request says that it went."""

    outcome: str
    continuations: Sequence[str]
    attempts: int


async def line(r: Rig) -> Told:
    await r.until(lambda: r.requests != [])
    (found,) = r.requests
    assert r.app.pool.in_flight == 0
    assert r.app._gate.proxy.means.keep.bytes == 0
    results = found.get("continuations", [])
    samples = await scrape(r)
    for result in ("continued", "ended", "unable", "no_node", "lost"):
        counted = total(samples, "ollamux_continuations_total", result=result)
        assert counted == results.count(result)
    return Told(found["outcome"], results, found["attempts"])


ASKED: Mapping[str, tuple[str, Record]] = {
    "chat": (CHAT, {}),
    "chat with a limit": (CHAT, {"options": {"num_predict": 4, "seed": 1}}),
    "raw": (GENERATE, {}),
    "raw with a limit": (GENERATE, {"options": {"num_predict": 4}}),
    "openai": (OPENAI, {}),
    "openai with counts": (OPENAI, {"stream_options": {"include_usage": True}}),
    "openai with a limit": (OPENAI, {"max_tokens": 4, "stream_options": {"include_usage": True}}),
}


# Any place


def counts(record: Record) -> tuple[int, int]:
    """(prompt, completion) of a final record."""
    if "usage" in record:
        used = record["usage"]
        assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]
        return used["prompt_tokens"], used["completion_tokens"]
    return record.get("prompt_eval_count", 0), record["eval_count"]


def alike(found: Sequence[Record], expected: Sequence[Record]) -> None:
    """Every record is as if nothing had happened, but for the time it took, and the count of the
    prompt: a simulated node does not count a text as it says it."""
    pairs = [json.loads(json.dumps(one)) for one in (found, expected)]
    for _, last in [(one, one[-1]) for one in pairs]:
        last.pop("prompt_eval_count", None)
        for name in ("prompt_tokens", "total_tokens"):
            last.get("usage", {}).pop(name, None)
    assert shape(pairs[0]) == shape(pairs[1])


async def uninterrupted(path: str, fields: Record) -> Sequence[Record]:
    async with rig(*nodes(1)) as r:
        return records(await post(r.url, path, asked(path, **fields)))


def uncounted(expected: Sequence[Record]) -> int:
    """How many records come before token counts that the client asked for; -1 for no such."""
    return len(expected) - 1 if "usage" in expected[-1] else -1


async def test_counts_that_only_the_dead_node_knew_are_missed() -> None:
    """The client asked for them, and nobody else can tell."""
    path, fields = ASKED["openai with counts"]
    expected = await uninterrupted(path, fields)
    async with rig(*nodes()) as r:
        r.nodes[0].fault = dies(uncounted(expected))
        found, why = told(await post(r.url, path, asked(path, **fields)))
        assert text(found) == text(expected)
        assert why.startswith("node n1: ")
        assert (await line(r)) == Told("broken", ["unable"], 1)


async def test_an_answer_that_kills_each_node_that_gives_it_is_not_tried_for_ever() -> None:
    async with rig(*[spec(answer_tokens=(40, 40)) for _ in range(2)]) as r:
        for node in r.nodes:
            node.fault = dies(1)
        found, why = told(await post(r.url, CHAT, asked(CHAT)))
        assert len(found) == 11
        assert why.startswith("node n")
        assert await line(r) == Told("broken", ["continued"] * 10 + ["no_node"], 11)


@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize("partial", [False, True])
async def test_a_death_at_any_record_is_not_noticed(kind: str, *, partial: bool) -> None:
    path, fields = ASKED[kind]
    expected = await uninterrupted(path, fields)
    for after in range(len(expected) + 2):
        if after == uncounted(expected):
            continue
        async with rig(*nodes()) as r:
            r.nodes[0].fault = dies(after, partial=partial)
            found = records(await post(r.url, path, asked(path, **fields)))
            alike(found, expected)
            if path == OPENAI:
                assert all(len({one.get(name) for one in found}) == 1 for name in _NAMED)
                assert ["role" in parts(one) for one in found].count(True) == 1
            assert (await line(r)).outcome == "ok"


@pytest.mark.parametrize("kind", ASKED)
async def test_a_reset_at_any_record_is_not_noticed(kind: str) -> None:
    """It may overtake records that were on their way."""
    path, fields = ASKED[kind]
    expected = await uninterrupted(path, fields)
    for after in range(len(expected)):
        if after == uncounted(expected):
            continue
        async with rig(*nodes()) as r:
            r.nodes[0].fault = dies(after, partial=True, reset=True)
            found = records(await post(r.url, path, asked(path, **fields)))
            assert text(found) == text(expected)
            assert (await line(r)).outcome == "ok"


@pytest.mark.parametrize("path", [CHAT, GENERATE, OPENAI])
async def test_the_counts_are_those_of_the_whole_answer(path: str) -> None:
    """Of what the second node counts as its prompt, some was the first one's answer."""
    relayed = 2
    counted: Record = {"stream_options": {"include_usage": True}} if path == OPENAI else {}
    async with rig(*nodes()) as r:
        r.nodes[0].fault = dies(relayed)
        final = records(await post(r.url, path, asked(path, **counted)))[-1]
        (second,) = [seen.body for seen in r.nodes[1].calls(path)]
        prompt, completion = counts(records(await post(r.nodes[1].url, path, second))[-1])
        assert counts(final) == (prompt - relayed, completion + relayed)
        assert completion + relayed == TOKENS
        assert (await line(r)) == Told("ok", ["continued"], 2)
        logged = r.requests[0]
        assert (logged["prompt_tokens"], logged["completion_tokens"]) == counts(final)
        assert logged["node"] == "n2"
        assert "tokens_from" not in logged


@pytest.mark.parametrize("path", [CHAT, GENERATE, OPENAI])
async def test_the_other_node_is_told_what_was_said(path: str) -> None:
    limits: Record = {"max_tokens": 5} if path == OPENAI else {"options": {"num_predict": 5}}
    async with rig(*nodes()) as r:
        r.nodes[0].fault = dies(2)
        sent = asked(path, **limits)
        said = text(records(await post(r.url, path, sent))[:2])
        (first,), (second,) = ([json.loads(one.body) for one in n.calls(path)] for n in r.nodes)
        if path == GENERATE:
            first["prompt"] += said
        else:
            first["messages"].append({"role": "assistant", "content": said})
        if path == OPENAI:
            first["max_tokens"] = 3
        else:
            first["options"]["num_predict"] = 3
        assert second == first


@pytest.mark.parametrize("kind", ["chat with a limit", "raw with a limit", "openai with a limit"])
async def test_what_has_all_the_tokens_it_may_have_needs_no_other_node(kind: str) -> None:
    path, fields = ASKED[kind]
    expected = await uninterrupted(path, fields)
    async with rig(*nodes()) as r:
        r.nodes[0].fault = dies(4)
        found = records(await post(r.url, path, asked(path, **fields)))
        alike(found, expected)
        assert not r.nodes[1].calls(path)
        assert (await line(r)) == Told("ok", ["ended"], 1)


async def test_what_lacks_only_its_last_event_needs_no_other_node() -> None:
    expected = await uninterrupted(OPENAI, {})
    async with rig(*nodes()) as r:
        r.nodes[0].fault = dies(TOKENS + 1)
        alike(records(await post(r.url, OPENAI, asked(OPENAI))), expected)
        assert not r.nodes[1].calls(OPENAI)
        assert (await line(r)) == Told("ok", ["ended"], 1)


async def test_the_scheduler_is_told_when_the_other_node_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with rig(*nodes()) as r:
        pool, told = r.app.pool, []
        began = pool.began

        def heard(attempt: Attempt, now: float) -> str:
            told.append(pool._leases[attempt].node.spec.name)
            return began(attempt, now)

        monkeypatch.setattr(pool, "began", heard)
        r.nodes[0].fault = dies(2)
        await post(r.url, CHAT, asked(CHAT))
        assert (await line(r)).continuations == ["continued"]
    assert told == ["n1", "n2"]


@pytest.mark.parametrize("path", [CHAT, GENERATE, OPENAI])
async def test_an_answer_may_go_over_three_nodes(path: str) -> None:
    expected = await uninterrupted(path, {})
    async with rig(*nodes(3)) as r:
        r.nodes[0].fault = dies(2, partial=True)
        r.nodes[1].fault = dies(2)
        found = records(await post(r.url, path, asked(path)))
        alike(found, expected)
        assert [len(node.calls(path)) for node in r.nodes] == [1, 1, 1]
        assert (await line(r)) == Told("ok", ["continued", "continued"], 3)


async def test_it_may_come_back_to_a_node_that_failed_before() -> None:
    """Each record that the client sees lets it be tried elsewhere anew."""
    expected = await uninterrupted(CHAT, {})
    async with rig(*nodes(), breaker={"resets": 100}) as r:
        for node in r.nodes:
            node.fault = dies(1)
        found = records(await post(r.url, CHAT, asked(CHAT)))
        assert text(found) == text(expected)
        told = await line(r)
        assert told.outcome == "ok"
        assert set(told.continuations) == {"continued"}
        assert told.attempts == len(told.continuations) + 1 > 3


async def test_other_nodes_that_fail_at_once_are_not_tried_for_ever() -> None:
    async with rig(*nodes(5)) as r:
        r.nodes[0].fault = dies(2)
        for node in r.nodes[1:]:
            node.fault = Fault(K.DIE)
        found, why = told(await post(r.url, CHAT, asked(CHAT)))
        assert len(found) == 2
        assert why.startswith("node n3: ")
        assert (await line(r)) == Told("broken", ["no_node"], 3)


@pytest.mark.parametrize("fault", [
    Fault(K.STATUS, status=500), Fault(K.STATUS, status=404), Fault(K.STATUS, status=503),
    Fault(K.GARBAGE), Fault(K.DIE), Fault(K.STATUS, status=400),
])  # fmt: skip
async def test_a_second_node_that_does_not_go_on_is_replaced_by_a_third(fault: Fault) -> None:
    expected = await uninterrupted(CHAT, {})
    async with rig(*nodes(3)) as r:
        r.nodes[0].fault = dies(2)
        r.nodes[1].fault = fault
        alike(records(await post(r.url, CHAT, asked(CHAT))), expected)
        assert (await line(r)) == Told("ok", ["continued"], 3)


async def test_a_stream_waits_for_a_second_node_that_is_full() -> None:
    expected = await uninterrupted(CHAT, {})
    async with rig(*nodes(), breaker={"back_off_s": 0.01, "back_off_max_s": 0.02}) as r:
        r.nodes[0].fault = dies(2)
        r.nodes[1].fault = Fault(K.STATUS, status=503, times=3)
        alike(records(await post(r.url, CHAT, asked(CHAT))), expected)
        assert (await line(r)) == Told("ok", ["continued"], 5)


async def test_many_streams_of_a_node_that_dies_all_go_on() -> None:
    expected = await uninterrupted(CHAT, {})
    tokens = (TOKENS, TOKENS)
    many = [spec(answer_tokens=tokens, num_parallel=20, warm=(MODEL,)) for _ in range(3)]
    async with rig(*many) as r:
        r.nodes[0].fault = Fault(K.STALL, after=3)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(post(r.url, CHAT, asked(CHAT))) for _ in range(60)]
            await r.nodes[0].until(lambda: r.nodes[0].held == 20)
            await r.nodes[0].stop()
        for task in tasks:
            alike(records(task.result()), expected)
        await r.until(lambda: len(r.requests) == 60)
        assert sum(found["attempts"] == 2 for found in r.requests) == 20
        assert r.app.pool.in_flight == r.app._gate.proxy.means.keep.bytes == 0


@pytest.mark.parametrize("path", [CHAT, OPENAI])
async def test_a_client_of_http_1_0_does_not_notice_either(path: str) -> None:
    expected = await uninterrupted(path, {})
    async with rig(*nodes()) as r, talk(r.url) as client:
        r.nodes[0].fault = dies(2, partial=True)
        await client.post(path, json.dumps(asked(path)).encode(), version="1.0")
        alike(records(await client.answer()), expected)
        assert (await line(r)) == Told("ok", ["continued"], 2)


async def test_a_client_that_reads_late_gets_every_record_once() -> None:
    long = [spec(answer_tokens=(3000, 3000)) for _ in range(2)]
    async with rig(*long) as r, talk(r.url) as client:
        expected = records(await post(r.nodes[1].url, CHAT, asked(CHAT)))
        r.nodes[1].seen.clear()
        r.nodes[0].fault = dies(1500, partial=True)
        await client.post(CHAT, json.dumps(asked(CHAT)).encode())
        await r.nodes[1].until(lambda: bool(r.nodes[1].calls(CHAT)))
        alike(records(await client.answer()), expected)
        assert (await line(r)) == Told("ok", ["continued"], 2)


async def test_who_has_kept_its_text_longest_loses_it_first() -> None:
    sent = json.dumps(asked(CHAT)).encode()
    long = [spec(answer_tokens=(110, 110), warm=(MODEL,)) for _ in range(2)]
    limits = {"max_buffered_bytes": 15_000}  # a record has more than a hundred
    async with rig(*long, limits=limits) as r, asyncio.TaskGroup() as group:
        old, new = r.nodes
        old.fault = Fault(K.STALL, after=100)
        new.fault = Fault(K.STALL, after=100)
        first = group.create_task(post(r.url, CHAT, sent))
        await old.until(lambda: old.held == 1)
        second = group.create_task(post(r.url, CHAT, sent))
        await new.until(lambda: new.held == 1)
        old.fault = new.fault = None
        old.drop_connections()
        assert len(told(await first)[0]) == 100
        new.drop_connections()
        assert len(records(await second)) == 110 + 1
        await r.until(lambda: len(r.requests) == 2)
        assert [one["continuations"] for one in r.requests] == [["lost"], ["continued"]]


# Thinking


THINKING: Mapping[str, Record] = {CHAT: {"think": True}, OPENAI: {"reasoning_effort": "low"}}


@pytest.mark.parametrize("path", THINKING)
async def test_an_answer_goes_on_once_its_thinking_is_over(path: str) -> None:
    expected = await uninterrupted(path, THINKING[path])
    for after in range(TOKENS + 1, 2 * TOKENS):
        async with rig(*nodes()) as r:
            r.nodes[0].fault = dies(after)
            found = records(await post(r.url, path, asked(path, **THINKING[path])))
            alike(found, expected)
            assert (await line(r)) == Told("ok", ["continued"], 2)


@pytest.mark.parametrize("path", THINKING)
async def test_a_thought_cannot_be_gone_on_with(path: str) -> None:
    async with rig(*nodes()) as r:
        r.nodes[0].fault = dies(2)
        found, why = told(await post(r.url, path, asked(path, **THINKING[path])))
        assert len(text(found, "thinking", "reasoning").split()) >= 2
        assert why.startswith("node n1: connection ")
        assert (await line(r)) == Told("broken", ["unable"], 1)


# Token counts that nobody asked for


async def test_counts_that_nobody_asked_for_stay_away_from_the_client() -> None:
    expected = await uninterrupted(OPENAI, {})
    async with rig(*nodes()) as r:
        r.nodes[0].fault = dies(2)
        answer = await post(r.url, OPENAI, asked(OPENAI))
        alike(records(answer), expected)
        assert b"usage" not in answer.body
        assert (await line(r)).continuations == ["continued"]
        assert r.requests[0]["completion_tokens"] == TOKENS
        assert "tokens_from" not in r.requests[0]


async def test_without_them_the_records_of_both_nodes_are_counted() -> None:
    async with rig(*nodes(), metrics={"exact_usage": False}) as r:
        r.nodes[0].fault = dies(2)
        records(await post(r.url, OPENAI, asked(OPENAI)))
        assert (await line(r)).continuations == ["continued"]
        assert r.requests[0]["completion_tokens"] == TOKENS
        assert r.requests[0]["tokens_from"] == "chunks"


ZSTD = ("Content-Encoding: zstd", "Content-Type: application/json")


async def test_a_compressed_request_goes_on_as_it_was_before() -> None:
    """A body is unpacked where the name in it is not what nodes call the model."""
    expected = await uninterrupted(OPENAI, {})
    async with rig(*nodes(), aliases={"chat": MODEL}) as r:
        r.nodes[0].fault = dies(2)
        packed = zstd.compress(json.dumps(asked(OPENAI, model="chat")).encode())
        alike(records(await post(r.url, OPENAI, packed, *ZSTD)), expected)
        assert (await line(r)) == Told("ok", ["continued"], 2)


async def test_a_request_that_went_on_compressed_does_not() -> None:
    async with rig(*nodes()) as r:
        r.nodes[0].fault = dies(2)
        packed = zstd.compress(json.dumps(asked(OPENAI)).encode())
        found, _ = told(await post(r.url, OPENAI, packed, *ZSTD))
        assert len(found) == 2
        assert (await line(r)) == Told("broken", ["unable"], 1)


async def test_the_name_that_a_node_was_told_is_what_the_next_is_told() -> None:
    expected = await uninterrupted(CHAT, {})
    async with rig(*nodes(), aliases={"chat": MODEL}) as r:
        r.nodes[0].fault = dies(2)
        found = records(await post(r.url, CHAT, asked(CHAT, model="ollama/chat")))
        alike(found, expected)
        assert json.loads(r.nodes[1].calls(CHAT)[0].body)["model"] == MODEL


# Silence


async def test_a_node_that_falls_silent_between_two_records_is_left() -> None:
    expected = await uninterrupted(CHAT, {})
    async with rig(*nodes(), timeouts={"between_records_s": 0.05}) as r:
        r.nodes[0].fault = Fault(K.STALL, after=2)
        alike(records(await post(r.url, CHAT, asked(CHAT))), expected)
        assert (await line(r)) == Told("ok", ["continued"], 2)
        await r.nodes[0].until(lambda: r.nodes[0].calls(CHAT)[0].outcome == "cancelled")


async def test_a_model_may_be_waited_for_longer_or_shorter() -> None:
    expected = await uninterrupted(CHAT, {})
    limits = {"models": {"llama3*": {"between_records_s": 0.05}}}
    async with rig(*nodes(), timeouts=limits) as r:
        r.nodes[0].fault = Fault(K.STALL, after=2)
        alike(records(await post(r.url, CHAT, asked(CHAT))), expected)
        assert (await line(r)) == Told("ok", ["continued"], 2)


async def test_one_that_is_silent_to_probes_too_is_left_sooner() -> None:
    expected = await uninterrupted(CHAT, {})
    probe = {"timeout_s": 0.3, "down_after": 1}
    async with (
        rig(*nodes(), probe=probe, timeouts={"silent_down_s": 0.05}) as r,
        asyncio.TaskGroup() as group,
    ):
        node = r.nodes[0]
        node.fault = Fault(K.STALL, after=2)
        task = group.create_task(post(r.url, CHAT, asked(CHAT)))
        await node.until(lambda: node.held == 1)
        node.faults.add(Fault(K.HANG, path="*"))
        await r.look()
        alike(records(await task), expected)
        assert (await line(r)) == Told("ok", ["continued"], 2)
        node.release()


# What cannot be gone on with


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}}}
GENERATED = {"model": MODEL, "prompt": "Why?", "input": "Why?", "stream": True, "max_tokens": 64,
             "messages": [{"role": "user", "content": "Why?"}]}  # fmt: skip
UNABLE: Mapping[str, tuple[str, Record]] = {
    "a prompt that the node puts into a template": (GENERATE, {"raw": False}),
    "another endpoint": ("/v1/completions", GENERATED),
    "responses": ("/v1/responses", GENERATED),
    "messages": ("/v1/messages", GENERATED),
    "a format": (CHAT, {"format": SCHEMA}),
    "any JSON": (CHAT, {"format": "json"}),
    "a format of OpenAI's": (
        OPENAI,
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    ),
    "a pin": (CHAT, {"model": f"{MODEL}@n1"}),
}


def sent_for(path: str, fields: Record) -> Record:
    return fields if fields is GENERATED else asked(path, **fields)


@pytest.mark.parametrize("kind", UNABLE)
async def test_what_cannot_be_gone_on_with_ends_with_an_honest_error(kind: str) -> None:
    path, fields = UNABLE[kind]
    async with rig(*nodes()) as r:
        r.nodes[0].fault = dies(2)
        found, why = told(await post(r.url, path, sent_for(path, fields)))
        assert len(found) == 2
        assert why.startswith("node n1: connection ")
        assert not r.nodes[1].calls(path)
        assert (await line(r)) == Told("broken", ["unable"], 1)
        assert r.requests[0]["error"] == why


@pytest.mark.parametrize("path", [CHAT, OPENAI])
async def test_a_call_of_a_tool_is_not_made_twice(path: str) -> None:
    calls = {"messages": [{"role": "user", "content": "use the tool weather"}], "tools": [TOOL]}
    async with rig(*nodes()) as r:
        r.nodes[0].fault = dies(1)
        found, _ = told(await post(r.url, path, asked(path, **calls)))
        assert "tool_calls" in parts(found[0])
        assert not r.nodes[1].calls(path)
        assert (await line(r)) == Told("broken", ["unable"], 1)


async def test_tools_that_were_not_called_do_not_matter() -> None:
    expected = await uninterrupted(CHAT, {"tools": [TOOL]})
    async with rig(*nodes()) as r:
        r.nodes[0].fault = dies(2)
        alike(records(await post(r.url, CHAT, asked(CHAT, tools=[TOOL]))), expected)
        assert (await line(r)) == Told("ok", ["continued"], 2)


async def test_a_path_that_names_a_node_keeps_an_answer_there() -> None:
    async with rig(*nodes()) as r:
        r.nodes[0].fault = dies(2)
        found, _ = told(await post(r.url, f"/@n1{CHAT}", asked(CHAT)))
        assert len(found) == 2
        assert not r.nodes[1].calls(CHAT)
        assert (await line(r)) == Told("broken", ["unable"], 1)


async def test_a_path_that_names_a_pool_does_not() -> None:
    expected = await uninterrupted(CHAT, {})
    async with rig(*nodes()) as r:
        r.nodes[0].fault = dies(2)
        alike(records(await post(r.url, f"/@default{CHAT}", asked(CHAT))), expected)
        assert (await line(r)) == Told("ok", ["continued"], 2)


async def test_only_the_very_same_model_goes_on() -> None:
    other = spec(model(digest="f" * 64), answer_tokens=(TOKENS, TOKENS))
    async with rig(*nodes(1), other) as r:
        r.nodes[0].fault = dies(2)
        found, why = told(await post(r.url, CHAT, asked(CHAT)))
        assert len(found) == 2
        assert why.startswith("node n1: ")
        assert not r.nodes[1].calls(CHAT)
        assert (await line(r)) == Told("broken", ["no_node"], 1)
    async with rig(*nodes(1), other, *nodes(1)) as r:
        r.nodes[0].fault = dies(2)
        records(await post(r.url, CHAT, asked(CHAT)))
        assert [len(node.calls(CHAT)) for node in r.nodes] == [1, 0, 1]


@pytest.mark.parametrize(
    ("section", "results"),
    [
        ({"enabled": False}, []),
        ({"models": ["phi*"]}, ["unable"]),
        ({"models": ["*", "!llama3*"]}, ["unable"]),
    ],
)
async def test_who_does_not_want_it_does_not_get_it(section: Record, results: list[str]) -> None:
    async with rig(*nodes(), continuation=section) as r:
        r.nodes[0].fault = dies(2)
        found, _ = told(await post(r.url, CHAT, asked(CHAT)))
        assert len(found) == 2
        assert (await line(r)) == Told("broken", results, 1)


@pytest.mark.parametrize("models", [["llama3*"], ["phi*", MODEL]])
async def test_models_may_be_named_for_it(models: Sequence[str]) -> None:
    async with rig(*nodes(), continuation={"models": models}) as r:
        r.nodes[0].fault = dies(2)
        records(await post(r.url, CHAT, asked(CHAT)))
        assert (await line(r)) == Told("ok", ["continued"], 2)


async def test_what_is_no_longer_kept_is_lost() -> None:
    long = [spec(answer_tokens=(110, 110)) for _ in range(2)]
    async with rig(*long, limits={"max_buffered_bytes": 5000}) as r:
        r.nodes[0].fault = dies(100)
        found, _ = told(await post(r.url, CHAT, asked(CHAT)))
        assert len(found) == 100
        assert (await line(r)) == Told("broken", ["lost"], 1)


async def test_a_record_too_large_to_be_held_is_not_gone_on_with() -> None:
    async with rig(*nodes(), limits={"max_record_bytes": 16}) as r:
        r.nodes[0].fault = dies(4)
        answer = await post(r.url, CHAT, asked(CHAT))
        assert text(records(answer)[:4]) or answer.body
        assert (await line(r)).outcome in ("ok", "broken")


# What is no death


@pytest.mark.parametrize("path", [CHAT, GENERATE, OPENAI])
@pytest.mark.parametrize("after", range(1, TOKENS + 1))
async def test_a_runner_that_fails_in_the_midst_is_left_as_well(path: str, after: int) -> None:
    """What Ollama says of it is shown where nobody goes on."""
    expected = await uninterrupted(path, {})
    async with rig(*nodes()) as r:
        r.nodes[0].fault = Fault(K.ERROR, after=after, message="the runner fell over")
        found = records(await post(r.url, path, asked(path)))
        assert text(found) == text(expected)
        assert b"fell over" not in json.dumps(found).encode()
        assert (await line(r)) == Told("ok", ["continued"], 2)


@pytest.mark.parametrize("path", [CHAT, GENERATE, OPENAI])
async def test_so_is_a_second_one(path: str) -> None:
    expected = await uninterrupted(path, {})
    async with rig(*nodes(3)) as r:
        for node in r.nodes[:2]:
            node.fault = Fault(K.ERROR, after=1)
        found = records(await post(r.url, path, asked(path)))
        assert text(found) == text(expected)
        assert (await line(r)) == Told("ok", ["continued", "continued"], 3)


async def test_the_silent_failure_of_a_pinned_stream_is_told() -> None:
    async with rig(*nodes()) as r:
        r.nodes[0].fault = Fault(K.ERROR, after=2)
        _, why = told(await post(r.url, OPENAI, asked(OPENAI, model=f"{MODEL}@n1")))
        assert why == "node n1: ended before its last record"
        assert (await line(r)).outcome == "broken"


@pytest.mark.parametrize("code", [400, 404, 422])
async def test_a_node_that_cannot_go_on_is_not_to_blame(code: int) -> None:
    async with rig(*nodes(3), breaker={"answers": 1, "resets": 2}) as r:
        r.nodes[0].fault = dies(2)
        r.nodes[1].fault = Fault(K.STATUS, status=code)
        records(await post(r.url, CHAT, asked(CHAT)))
        assert (await line(r)) == Told("ok", ["continued"], 3)
        assert not any(view.ejected for view in r.app.pool.registry.snapshot())


@pytest.mark.parametrize("path", [CHAT, GENERATE])
async def test_what_a_runner_said_is_passed_on_where_nobody_goes_on(path: str) -> None:
    async with rig(*nodes(1)) as r:
        r.nodes[0].fault = Fault(K.ERROR, after=2, message="the runner fell over")
        answer = await post(r.url, path, asked(path))
        assert told(answer)[1] == "the runner fell over"
        assert answer.body.endswith(b'\n{"error":"the runner fell over"}\n')
        assert (await line(r)) == Told("broken", ["no_node"], 1)


@pytest.mark.parametrize("second", [Fault(K.DIE), Fault(K.STATUS, status=500, message="no memory")])
async def test_what_a_runner_said_is_told_if_the_next_node_cannot_go_on(second: Fault) -> None:
    async with rig(*nodes()) as r:
        r.nodes[0].fault = Fault(K.ERROR, after=2, message="the runner fell over")
        r.nodes[1].fault = second
        _, why = told(await post(r.url, CHAT, asked(CHAT)))
        assert why == "the runner fell over"
        assert (await line(r)) == Told("broken", ["no_node"], 2)


@pytest.mark.parametrize("path", [CHAT, GENERATE, OPENAI])
async def test_a_clean_end_without_a_final_record_is_passed_on(path: str) -> None:
    async with rig(*nodes()) as r:
        r.nodes[0].fault = Fault(K.END, after=3)
        answer = await post(r.url, path, asked(path))
        assert (answer.status, answer.whole) == (200, True)
        assert b"error" not in answer.body
        assert not r.nodes[1].calls(path)
        assert (await line(r)) == Told("ok", [], 1)


async def test_a_client_that_leaves_while_another_node_is_asked_leaves_nothing_behind() -> None:
    before = asyncio.all_tasks()
    async with rig(*nodes()) as r:
        r.nodes[0].fault = dies(2)
        r.nodes[1].fault = Fault(K.HANG)
        async with talk(r.url) as client:
            await client.post(CHAT, json.dumps(asked(CHAT)).encode())
            await r.nodes[1].until(lambda: r.nodes[1].held == 1)
            client.leave()
            await r.nodes[1].until(lambda: r.nodes[1].calls(CHAT)[0].outcome == "cancelled")
        assert (await line(r)).outcome == "cancelled"
    assert asyncio.all_tasks() == before
