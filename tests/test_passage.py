"""Requests whose node fails before its first record: who is asked next, and what is told."""

import asyncio
import contextlib
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from router.sim import Fault, FaultKind
from tests.rig import LEAST, MODEL, Answer, Peer, Rig, model, rig, scripted, spec, talk
from tests.test_metrics import scrape, total

K = FaultKind
OTHER = "qwen3:4b"
CHAT, OPENAI, MESSAGES = "/api/chat", "/v1/chat/completions", "/v1/messages"
FAMILIES = (CHAT, OPENAI, MESSAGES)
STREAMED = ("/api/generate", "/v1/completions", "/v1/responses", *FAMILIES)
PATHS = ("/api/embed", "/api/embeddings", "/v1/embeddings", *STREAMED)
NEVER_S = 1000.0  # a back-off that no test sees the end of
FULL = "server busy, please try again.  maximum pending requests exceeded"


def body(**fields: Any) -> bytes:
    """A request that every endpoint takes."""
    messages = [{"role": "user", "content": "hello"}]
    asked = {"model": MODEL, "messages": messages, "prompt": "hello", "input": "hello"}
    return json.dumps({**asked, "max_tokens": 64, **fields}).encode()


async def ask(r: Rig, path: str = CHAT, **fields: Any) -> Answer:
    async with talk(r.url) as client:
        await client.post(path, body(**fields))
        return await client.answer()


def said(answer: Answer) -> str:
    """The message of an error in any dialect; empty for an answer that is none."""
    try:
        error = json.loads(answer.body).get("error") or ""
    except ValueError:  # a stream
        assert b'"error":{' not in answer.body
        assert b'{"error"' not in answer.body
        return ""
    return str(error if isinstance(error, str) else error["message"])


def asked(r: Rig) -> list[int]:
    """How many POSTs have reached each node."""
    return [sum(seen.method == "POST" for seen in node.seen) for node in r.nodes]


def ejected(r: Rig) -> dict[str, Sequence[str]]:
    """Why requests are kept away, by node."""
    return {
        node.spec.name: [one.reason for one in node.ejected]
        for node in r.app.pool.registry.snapshot()
        if node.ejected
    }


def waiting(r: Rig) -> int:
    """Requests that wait for a full node to have room."""
    return r.app._gate.proxy.means.dispatch.waiting


def status(code: int, message: str = "out of memory", **fields: Any) -> Fault:
    return Fault(K.STATUS, status=code, message=message, **fields)


def backs_off(back_off_s: float = NEVER_S, max_s: float = 2000.0) -> dict[str, Any]:
    return {"back_off_s": back_off_s, "back_off_max_s": max_s, "jitter": 0}


# Elsewhere


FAILURES: Mapping[str, Fault] = {
    "closed": Fault(K.DIE),
    "reset": Fault(K.DIE, reset=True),
    "half a record": Fault(K.DIE, partial=True),
    "no HTTP": Fault(K.GARBAGE),
    "500": status(500),
    "502": status(502),
    "504": status(504),
    "busy": status(503, FULL),
    "no such model": status(404, "model 'llama3:8b' not found"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_fails_before_its_first_record_is_answered_by_another_node(
    path: str, failure: str, *, stream: bool
) -> None:
    async with rig(spec(), spec()) as r:
        r.nodes[0].fault = FAILURES[failure]
        answer = await ask(r, path, stream=stream)
        assert (answer.status, answer.whole) == (200, True)
        assert answer.header("X-Ollamux-Node") == "n2"
        assert answer.header("X-Ollamux-Attempts") == "2"
        assert said(answer) == ""
        # A connection that was kept and ends without a byte is tried anew first.
        assert asked(r) in ([1, 1], [2, 1] if failure in ("closed", "reset") else [])
        await r.until(lambda: r.requests != [])
        (line,) = r.requests
        assert (line["outcome"], line["attempts"], line["node"]) == ("ok", 2, "n2")
        assert total(await scrape(r), "ollamux_retries_total", endpoint=path) == 1
        assert r.app.pool.in_flight == 0


@pytest.mark.parametrize(
    ("path", "stream"), [*((path, False) for path in PATHS), (CHAT, True), ("/api/generate", True)]
)
async def test_a_runner_that_falls_over_at_once_is_left_where_that_can_be_seen(
    path: str, *, stream: bool
) -> None:
    """Of streams only those of Ollama's own API have a record for it, which is the first then."""
    async with rig(spec(), spec()) as r:
        r.nodes[0].fault = Fault(K.ERROR)
        answer = await ask(r, path, stream=stream)
        assert (answer.status, said(answer)) == (200, "")
        assert answer.header("X-Ollamux-Node") == "n2"
        assert asked(r) == [1, 1]


async def test_a_connection_that_went_stale_is_no_reason_to_go_elsewhere() -> None:
    bodies: list[bytes] = []

    async def script(peer: Peer) -> None:
        bodies.append(peer.body)
        if len(bodies) == 2:
            peer.close()
            return
        await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    preferred = [{"models": [MODEL], "nodes": ["n1"], "wish": "prefer"}]
    async with (
        scripted(script) as url,
        rig(spec(), spec(), entries=[{"url": url}], placement=preferred) as r,
    ):
        for _ in range(2):
            answer = await ask(r, stream=False)
            assert (answer.status, answer.header("X-Ollamux-Node")) == (200, "n1")
            assert answer.header("X-Ollamux-Attempts") == "1"
        assert len(bodies) == 3
        assert asked(r) == [0, 0]


@pytest.mark.parametrize("path", FAMILIES)
@pytest.mark.parametrize("code", [400, 401, 403, 408, 409, 413, 422, 429, 501, 505])
async def test_what_is_the_clients_is_for_no_other_node(path: str, code: int) -> None:
    async with rig(spec(), spec()) as r:
        r.nodes[0].fault = status(code, "no, thank you")
        answer = await ask(r, path)
        assert (answer.status, said(answer)) == (code, "no, thank you")
        assert answer.header("X-Ollamux-Attempts") == "1"
        assert asked(r) == [1, 0]
        assert ejected(r) == {}


@pytest.mark.parametrize("pinned", ["by name", "by path"])
@pytest.mark.parametrize("failure", FAILURES)
async def test_who_pins_a_node_gets_its_failure(failure: str, pinned: str) -> None:
    names = {"by name": (CHAT, f"{MODEL}@n1"), "by path": (f"/@n1{CHAT}", MODEL)}
    path, name = names[pinned]
    async with rig(spec(), spec(), timeouts={"busy_s": 0.01}) as r:
        fault = r.nodes[0].fault = FAILURES[failure]
        answer = await ask(r, path, model=name)
        if fault.kind is K.STATUS:
            assert (answer.status, said(answer)) == (fault.status, fault.message)
        else:
            assert answer.status == 502
            assert said(answer).startswith("node n1: ")
        assert asked(r)[1] == 0
        assert answer.header("X-Ollamux-Node") == "n1"


async def test_who_pins_a_node_that_is_full_waits_for_it() -> None:
    async with rig(spec(), spec(), breaker=backs_off(0.01, 0.02)) as r:
        r.nodes[0].fault = full(times=3)
        answer = await ask(r, model=f"{MODEL}@n1")
        assert (answer.status, answer.header("X-Ollamux-Attempts")) == (200, "4")
        assert asked(r) == [4, 0]


@pytest.mark.parametrize("failure", ["half a record", "500", "no such model"])
async def test_a_form_is_sent_on_as_it_came(failure: str) -> None:
    path = "/v1/audio/transcriptions"
    async with rig(spec(), spec()) as r:
        r.nodes[0].fault = replace(FAILURES[failure], path=path)
        form = aiohttp.FormData({"model": MODEL})
        form.add_field("file", b"RIFF" + bytes(5000), filename="a.wav")
        async with r.session.post(r.url + path, data=form) as answer:
            await answer.read()
            assert answer.headers["X-Ollamux-Node"] == "n2"
        (first,), (second,) = (node.calls(path) for node in r.nodes)
        assert first.body == second.body


@pytest.mark.parametrize("fault", [
    status(404, body="404 page not found", headers=(("Content-Type", "text/plain"),)),
    status(404, body='{"error":"gone"}', headers=(("Content-Type", "text/html"),)),
])  # fmt: skip
async def test_an_endpoint_that_a_node_does_not_know_is_no_missing_model(fault: Fault) -> None:
    async with rig(spec(), spec()) as r:
        r.nodes[0].fault = fault
        answer = await ask(r)
        assert (answer.status, answer.body.decode()) == (404, fault.body)
        assert asked(r) == [1, 0]
        assert MODEL in r.app.pool.registry.snapshot()[0].present


async def test_a_model_that_no_node_was_believed_to_have_is_not_looked_for() -> None:
    async with rig(spec(), spec()) as r:
        r.nodes[0].fault = status(404, "model 'gpt-oss:cloud' not found")
        answer = await ask(r, model="gpt-oss:cloud")
        assert (answer.status, said(answer)) == (404, "model 'gpt-oss:cloud' not found")
        assert asked(r) == [1, 0]


@pytest.mark.parametrize("fault", [Fault(K.DIE, path="*"), status(500, path="*")])
@pytest.mark.parametrize("path", ["/api/push", "/api/me", "/api/pull", "/api/create", "/api/copy"])
async def test_what_changes_more_than_a_node_is_never_sent_twice(path: str, fault: Fault) -> None:
    sent = {"/api/create": {"model": "mine", "from": MODEL},
            "/api/copy": {"source": MODEL, "destination": "mine"}}  # fmt: skip
    entries: list[dict[str, Any]] = [{"primary": True}, {"models": ["!*"]}]
    to = {"to": "one"}
    async with rig(spec(), spec(), entries=entries, manage={"pull": to, "create": to}) as r:
        r.nodes[0].fault = fault
        async with r.session.post(r.url + path, json=sent.get(path, {"model": MODEL})) as answer:
            await answer.read()
        assert asked(r) == [1, 0]
        assert r.app.pool.in_flight == 0


@pytest.mark.parametrize("path", ["/api/push", "/api/me"])
async def test_such_a_request_does_not_go_over_a_connection_that_may_be_stale(path: str) -> None:
    peers: list[Peer] = []

    async def script(peer: Peer) -> None:
        peers.append(peer)
        await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    async with scripted(script) as url, rig(entries=[{"url": url, "primary": True}]) as r:
        for _ in range(3):
            async with r.session.post(r.url + path, json={"model": MODEL}) as got:
                assert got.status == 200
        assert len({id(peer.writer) for peer in peers}) == 3


# At most so many


@pytest.mark.parametrize("others", [0, 1, 2, 5])
async def test_only_so_many_other_nodes_are_asked(others: int) -> None:
    async with rig(*(spec() for _ in range(4)), retry={"other_nodes": others}) as r:
        for node in r.nodes:
            node.fault = Fault(K.DIE)
        answer = await ask(r)
        count = min(others + 1, 4)
        assert [number > 0 for number in asked(r)] == [True] * count + [False] * (4 - count)
        assert answer.status == 502
        closed = "connection closed before the response"
        assert said(answer) == "; ".join(f"node n{n + 1}: {closed}" for n in range(count))
        assert answer.header("X-Ollamux-Attempts") == str(count)
        await r.until(lambda: r.requests != [])
        assert r.requests[0]["outcome"] == "failed"
        assert r.requests[0]["error"] == said(answer)
        assert r.app.pool.in_flight == 0


@pytest.mark.parametrize("path", FAMILIES)
@pytest.mark.parametrize("stream", [False, True])
async def test_of_several_failures_the_most_telling_one_gives_the_status(
    path: str, *, stream: bool
) -> None:
    specs = spec(), spec(), spec()
    async with rig(*specs, timeouts={"busy_s": 0.01}, breaker=backs_off()) as r:
        r.nodes[0].fault = Fault(K.GARBAGE)
        r.nodes[1].fault = status(500, "out of memory")
        r.nodes[2].fault = status(503, FULL)
        answer = await ask(r, path, stream=stream)
        assert answer.status == 500
        first, *others = said(answer).split("; ")
        assert first.startswith("node n1: ")
        assert others == ["node n2: out of memory", f"node n3: {FULL}"]
        assert json.loads(answer.body).keys() >= {"error"}
        assert asked(r) == [1, 1, 1]


@pytest.mark.parametrize("path", FAMILIES)
async def test_what_all_nodes_say_is_said_in_their_words(path: str) -> None:
    async with rig(spec(), spec()) as r:
        for node in r.nodes:
            node.fault = status(500, "llama runner process has terminated")
        answer = await ask(r, path)
        async with talk(r.nodes[0].url) as client:
            await client.post(path, body())
            direct = await client.answer()
        assert (answer.status, answer.header("X-Ollamux-Attempts")) == (500, "2")
        assert answer.header("Content-Type") == direct.header("Content-Type")
        identity = re.compile(rb"req_[0-9a-f]+")
        assert identity.sub(b"", answer.body) == identity.sub(b"", direct.body)
        await r.until(lambda: r.requests != [])
        assert r.requests[0]["outcome"] == "node_error"


@pytest.mark.parametrize("path", [CHAT, "/api/generate"])
async def test_an_error_that_is_the_first_record_of_a_stream_is_an_error(path: str) -> None:
    async with rig(spec(), spec()) as r:
        for node in r.nodes:
            node.fault = Fault(K.ERROR, message="the runner fell over")
        answer = await ask(r, path, stream=True)
        assert (answer.status, said(answer)) == (500, "the runner fell over")
        assert answer.header("X-Ollamux-Attempts") == "2"
        await r.until(lambda: r.requests != [])
        assert r.requests[0]["outcome"] == "node_error"


async def test_what_one_node_said_is_not_told_of_the_next() -> None:
    async with rig(spec(), spec()) as r:
        r.nodes[0].fault = Fault(K.ERROR, message="the runner fell over")
        r.nodes[1].fault = Fault(K.DIE, partial=True)
        answer = await ask(r, stream=True)
        first, second = said(answer).split("; ")
        assert (answer.status, first) == (502, "node n1: the runner fell over")
        assert re.fullmatch("node n2: connection (closed|reset) inside the response", second)


@pytest.mark.parametrize("path", FAMILIES)
async def test_an_error_that_is_no_text_is_told_by_its_status(path: str) -> None:
    async with rig(spec(), spec()) as r:
        r.nodes[0].fault = status(500, body="<html>proxy error</html>")
        r.nodes[1].fault = status(502, body="x" * 100_000)
        answer = await ask(r, path)
        assert (answer.status, said(answer)) == (502, "node n1: status 500; node n2: status 502")


@pytest.mark.parametrize("others", [status(502, "no memory"), status(500, "no memory left")])
async def test_what_nodes_say_in_other_words_is_told_of_each(others: Fault) -> None:
    async with rig(spec(), spec()) as r:
        r.nodes[0].fault = status(500, "no memory")
        r.nodes[1].fault = others
        answer = await ask(r)
        assert answer.status == others.status
        assert said(answer) == f"node n1: no memory; node n2: {others.message}"


async def test_one_node_alone_says_it_itself() -> None:
    async with rig() as r:
        for fault in (status(404, "gone"), status(502, body="<b>", headers=(("X-Odd", "1"),))):
            r.nodes[0].fault = fault
            answer = await ask(r)
            assert answer.status == fault.status
            assert answer.header("X-Odd") == dict(fault.headers).get("X-Odd")
            await r.look()


async def test_a_model_that_has_gone_from_all_nodes_is_a_404() -> None:
    async with rig(spec(), spec()) as r:
        for node in r.nodes:
            node.fault = status(404, f"model '{MODEL}' not found")
        answer = await ask(r)
        assert (answer.status, said(answer)) == (404, f"model '{MODEL}' not found")
        assert asked(r) == [1, 1]


# Nodes that are full


def full(**fields: Any) -> Fault:
    return status(503, FULL, **fields)


async def test_a_node_that_is_full_gets_nothing_new_of_that_model() -> None:
    async with rig(spec(model(), model(OTHER)), spec(), breaker=backs_off()) as r:
        r.nodes[0].fault = full(times=1, model=MODEL)
        answers = [await ask(r) for _ in range(20)]
        assert {answer.status for answer in answers} == {200}
        assert [answer.header("X-Ollamux-Attempts") for answer in answers] == ["2"] + ["1"] * 19
        assert asked(r) == [1, 20]
        assert ejected(r) == {"n1": ["busy"]}
        assert (await ask(r, model=OTHER)).status == 200, "it has room for others"
        assert asked(r) == [2, 20]
        assert not [line for line in r.lines if line["event"] == "node ejected"]


async def test_it_gets_requests_again_once_one_of_its_own_has_ended() -> None:
    backs = backs_off()
    async with (
        rig(spec(), spec(), breaker=backs, routing=LEAST) as r,
        asyncio.TaskGroup() as group,
    ):
        r.nodes[0].fault = Fault(K.STALL, after=2, times=1)
        r.nodes[0].faults.add(full(times=1))
        running = group.create_task(ask(r))
        await r.nodes[0].until(lambda: r.nodes[0].held == 1)
        for _ in range(4):
            assert (await ask(r)).header("X-Ollamux-Node") == "n2"
        assert ejected(r) == {}, "it was never asked: the other one had less in flight"
        r.nodes[1].fault = Fault(K.STALL, after=2, times=1)
        second = group.create_task(ask(r))
        await r.nodes[1].until(lambda: r.nodes[1].held == 1)
        assert (await ask(r)).header("X-Ollamux-Attempts") == "2"
        assert ejected(r) == {"n1": ["busy"]}
        r.nodes[0].release()
        assert (await running).header("X-Ollamux-Node") == "n1"
        await r.until(lambda: ejected(r) == {})
        assert (await ask(r)).header("X-Ollamux-Node") == "n1"
        r.nodes[1].release()
        assert (await second).status == 200


async def test_where_nothing_else_is_eligible_a_request_waits_for_room() -> None:
    wide = spec(num_parallel=5)
    async with rig(wide, breaker=backs_off()) as r, asyncio.TaskGroup() as group:
        node = r.nodes[0]
        node.fault = Fault(K.STALL, after=2, times=1)
        node.faults.add(full(times=1))
        running = group.create_task(ask(r))
        await node.until(lambda: node.held == 1)
        waits = []
        for number in range(1, 4):
            waits.append(group.create_task(ask(r)))
            await r.until(lambda number=number: waiting(r) == number)  # type: ignore[misc]
        assert asked(r) == [2], "one was told so, the others were not sent"
        assert r.app.pool.in_flight == 1
        node.release()
        assert {(await one).status for one in (running, *waits)} == {200}
        assert waiting(r) == 0
        assert asked(r) == [5]


async def test_a_request_waits_no_longer_than_the_back_off() -> None:
    async with rig(breaker=backs_off(0.01, 0.02)) as r:
        r.nodes[0].fault = full(times=4)
        answer = await ask(r)
        assert (answer.status, answer.header("X-Ollamux-Attempts")) == (200, "5")
        assert asked(r) == [5]
        assert ejected(r) == {}
        await r.until(lambda: r.requests != [])
        assert (r.requests[0]["outcome"], r.requests[0]["attempts"]) == ("ok", 5)


@pytest.mark.parametrize("back_off_s", [0.01, NEVER_S])
@pytest.mark.parametrize("path", FAMILIES)
async def test_what_finds_no_room_in_time_is_told_when_to_come_back(
    path: str, back_off_s: float
) -> None:
    backs = backs_off(back_off_s, max(back_off_s, 0.02))
    async with rig(spec(), spec(), breaker=backs, timeouts={"busy_s": 0.1}) as r:
        for node in r.nodes:
            node.fault = full()
        answer = await ask(r, path)
        assert (answer.status, said(answer)) == (503, FULL)
        assert answer.header("Retry-After") == "1"
        assert all(count <= 12 for count in asked(r))
        assert waiting(r) == r.app.pool.in_flight == 0


async def test_who_comes_while_all_are_full_is_told_so_without_asking() -> None:
    async with rig(breaker=backs_off(), timeouts={"busy_s": 0.02}) as r:
        r.nodes[0].fault = full()
        assert (await ask(r)).status == 503
        answer = await ask(r)
        assert (answer.status, answer.header("Retry-After")) == (503, "1")
        assert "busy" in said(answer)
        assert "n1" in said(answer)
        assert answer.header("X-Ollamux-Node") is None
        assert asked(r) == [1]


async def test_a_wait_for_room_does_not_count_against_the_node() -> None:
    """A limit of the first byte that has passed meanwhile is not the next node's fault."""
    times = {"first_byte_s": 0.1, "busy_s": 5.0}
    async with rig(breaker={**backs_off(0.3, 0.3), "answers": 1}, timeouts=times) as r:
        r.nodes[0].fault = full(times=1)
        answer = await ask(r)
        assert answer.status == 503
        assert answer.header("Retry-After") == "1"
        assert ejected(r) == {"n1": ["busy"]}
        assert asked(r) == [1]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_while_it_waits_leaves_nothing_behind(*, stream: bool) -> None:
    before, node = asyncio.all_tasks(), spec(num_parallel=5, warm=(MODEL,))
    async with rig(node, breaker=backs_off()) as r:
        r.nodes[0].fault = full()
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(talk(r.url)) for _ in range(5)]
            for client in clients:
                await client.post(CHAT, body(stream=stream))
            await r.until(lambda: waiting(r) == 5)
            for client in clients:
                client.leave()
        await r.until(lambda: waiting(r) == 0)
        assert r.app.pool.in_flight == 0
        await r.until(lambda: len(r.requests) == 5)
        assert {line["outcome"] for line in r.requests} == {"cancelled"}
        assert not r.app._gate.proxy.means.dispatch._waiters
        assert r.app._gate.proxy.means.keep.bytes == 0
    assert asyncio.all_tasks() == before


# What a node no longer has


@contextlib.asynccontextmanager
async def probing(r: Rig) -> AsyncIterator[None]:
    """Probes run by themselves."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(r.app.prober.run())
        await r.app.prober.looked.wait()
        yield
        task.cancel()


async def present(r: Rig) -> dict[str, Sequence[str]]:
    """The models of each node, as the operator sees them."""
    async with r.session.get(f"{r.admin}/status") as shown:
        return {node["name"]: node["present"] for node in (await shown.json())["nodes"]}


async def listed(r: Rig) -> list[str]:
    async with r.session.get(f"{r.url}/api/tags") as answer:
        return sorted(entry["name"] for entry in (await answer.json())["models"])


async def test_a_404_for_what_a_node_lists_takes_it_from_nobody() -> None:
    """Whatever was asked with it: the node is asked what it has, and has it."""
    async with rig(spec(), spec()) as r:
        r.nodes[0].fault = status(404, f"model '{MODEL}' not found")
        for _ in range(4):
            assert (await ask(r)).status == 200
        assert await listed(r) == [MODEL]
        r.nodes[0].fault = None
        assert await present(r) == {"n1": [MODEL], "n2": [MODEL]}


async def test_a_node_that_does_not_have_a_model_is_asked_what_it_has() -> None:
    probe = {"tags_interval_s": 3600, "interval_s": 3600, "ps_interval_s": 3600}
    async with rig(spec(model(), model(OTHER)), spec(), probe=probe) as r, probing(r):
        node = r.nodes[0]
        async with r.session.delete(f"{node.url}/api/delete", json={"model": OTHER}) as done:
            assert done.status == 200
        copied = {"source": MODEL, "destination": "mine:1b"}
        async with r.session.post(f"{node.url}/api/copy", json=copied) as done:
            assert done.status == 200
        assert (await present(r))["n1"] == [MODEL, OTHER]
        answer = await ask(r, model=OTHER)
        assert (answer.status, said(answer)) == (404, f"model '{OTHER}' not found")
        while (await present(r))["n1"] != [MODEL, "mine:1b"]:
            pass
        assert await listed(r) == [MODEL, "mine:1b"]


# Nodes that fail fast


async def test_a_node_that_answers_500_at_once_gets_hardly_a_request() -> None:
    async with rig(spec(), spec(), spec(), breaker=backs_off(), routing=LEAST) as r:
        r.nodes[0].fault = status(500)
        answers = [await ask(r, stream=False) for _ in range(150)]
        assert {answer.status for answer in answers} == {200}
        assert asked(r)[0] == 5
        assert ejected(r) == {"n1": ["status 500"]}


async def test_afterwards_it_gets_its_trials_only() -> None:
    async with rig(spec(), spec(), spec(), breaker=backs_off(0.01, 0.1), routing=LEAST) as r:
        r.nodes[0].fault = status(500)
        answers = [await ask(r, stream=False) for _ in range(300)]
        assert {answer.status for answer in answers} == {200}
        trials = sum(line["event"] == "model on trial" for line in r.lines)
        assert trials > 0
        assert asked(r)[0] == 5 + trials
        r.nodes[0].fault = None
        while ejected(r):
            assert (await ask(r)).status == 200
        assert [line["event"] for line in r.lines if "trial" in line["event"] or
                "admit" in line["event"]][-1] == "model readmitted"  # fmt: skip


async def test_a_burst_on_a_node_that_fails_fast_is_answered_by_the_others() -> None:
    budget = {"budget_least": 100}
    async with rig(spec(), spec(), spec(), breaker=backs_off(), retry=budget) as r:
        r.nodes[0].fault = status(500)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(r)) for _ in range(90)]
        assert {task.result().status for task in tasks} == {200}
        assert asked(r)[0] < 60, "no more than were on their way when it was ejected"
        assert ejected(r) == {"n1": ["status 500"]}


async def test_a_request_that_every_node_fails_at_ejects_none() -> None:
    async with rig(spec(), spec(), spec(), retry={"budget_least": 1000}) as r:
        for node in r.nodes:
            node.fault = status(500, path="/api/generate")
        for _ in range(20):
            assert (await ask(r, "/api/generate")).status == 500
        assert asked(r) == [20, 20, 20]
        assert ejected(r) == {}
        assert (await ask(r)).header("X-Ollamux-Attempts") == "1"


async def test_nor_does_one_that_is_pinned() -> None:
    """No other node can tell whether it is the request."""
    async with rig(spec(), spec()) as r:
        r.nodes[0].fault = status(500)
        for _ in range(20):
            assert (await ask(r, model=f"{MODEL}@n1")).status == 500
        assert ejected(r) == {}


async def test_what_nodes_say_is_told_to_the_client_and_not_to_the_log() -> None:
    """It may hold words of a prompt."""
    async with rig(spec(), spec()) as r:
        r.nodes[0].fault = status(500, "cannot read: my secret")
        r.nodes[1].fault = status(500, "no template for: my secret")
        answer = await ask(r)
        assert said(answer).count("my secret") == 2
        r.nodes[0].fault = r.nodes[1].fault = Fault(K.ERROR, after=2, message="my secret")
        r.app.pool.registry.drain("n2", draining=True)
        assert b"my secret" in (await ask(r)).body
        await r.until(lambda: len(r.requests) == 2)
        assert "secret" not in json.dumps(r.lines)
        assert [line["error"] for line in r.requests] == [
            "node n1: status 500; node n2: status 500", "node n1: failed in the midst",
        ]  # fmt: skip


async def test_an_error_whose_text_does_not_come_is_not_waited_for() -> None:
    async def act(peer: Peer) -> None:
        await peer.say(b"HTTP/1.1 500 No\r\nContent-Length: 99\r\n\r\n{")
        await asyncio.sleep(60)

    async with scripted(act) as url, rig(entries=[{"url": url}]) as r:
        answer = await ask(r)
        assert (answer.status, said(answer)) == (500, "node n1: status 500")


async def test_without_a_budget_a_nodes_own_error_goes_through() -> None:
    retry = {"budget": 0, "budget_least": 1}
    async with rig(spec(), spec(), retry=retry, routing=LEAST) as r:
        r.nodes[0].fault = status(500, "out of memory")
        first = await ask(r)
        assert (first.status, first.header("X-Ollamux-Attempts")) == (200, "2")
        answer = await ask(r)
        assert (answer.status, said(answer)) == (500, "out of memory")
        assert answer.header("X-Ollamux-Node") == "n1"
        assert answer.header("X-Ollamux-Attempts") == "1"
        await r.until(lambda: len(r.requests) == 2)
        assert r.requests[1]["outcome"] == "node_error"


@pytest.mark.parametrize("failure", ["closed", "reset", "no HTTP", "busy"])
async def test_no_budget_is_needed_to_leave_a_node_that_gave_no_answer(failure: str) -> None:
    async with rig(spec(), spec(), retry={"budget": 0, "budget_least": 0}) as r:
        r.nodes[0].fault = FAILURES[failure]
        answers = [await ask(r) for _ in range(6)]
        assert {answer.status for answer in answers} == {200}


# Time limits


SLOW_MODEL = "slow:70b"


async def test_a_model_may_have_limits_of_its_own() -> None:
    limits = {"models": {"slow*": {"first_byte_s": 0.03}}}
    both = spec(model(), model(SLOW_MODEL), warm=(MODEL, SLOW_MODEL))
    async with rig(both, timeouts=limits) as r, asyncio.TaskGroup() as group:
        node = r.nodes[0]
        node.fault = Fault(K.HANG)
        patient = group.create_task(ask(r))
        await node.until(lambda: node.held == 1)
        answer = await ask(r, model=SLOW_MODEL)
        assert answer.status == 504
        assert said(answer) == "node n1: no first byte within 0.03 s"
        assert not patient.done()
        node.fault = None
        node.release()
        assert (await patient).status == 200


async def test_no_request_waits_longer_than_its_limit_however_many_nodes_it_meets() -> None:
    async with rig(spec(), spec(), spec(), timeouts={"first_byte_s": 0.05}) as r:
        for node in r.nodes:
            node.fault = Fault(K.HANG)
        answer = await ask(r)
        assert answer.status == 504
        assert asked(r) == [1, 0, 0]
        assert r.app.pool.in_flight == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_node_that_is_silent_to_probes_too_is_given_up_soon(*, stream: bool) -> None:
    probe = {"timeout_s": 0.3, "down_after": 1}
    async with (
        rig(spec(), spec(), probe=probe, timeouts={"silent_down_s": 0.05}) as r,
        asyncio.TaskGroup() as group,
    ):
        node = r.nodes[0]
        node.fault = Fault(K.HANG, path="*")
        task = group.create_task(ask(r, stream=stream))
        await node.until(lambda: node.held == 1)
        await r.look()
        assert [one.up for one in r.app.pool.registry.snapshot()] == [False, True]
        answer = await task
        assert (answer.status, answer.header("X-Ollamux-Node")) == (200, "n2")
        assert answer.header("X-Ollamux-Attempts") == "2"
        node.release()


async def test_as_long_as_it_answers_probes_its_silence_is_work() -> None:
    both = {"silent_down_s": 0.02, "models": {"*": {"first_byte_s": 0.2}}}
    async with rig(spec(), spec(), timeouts=both) as r:
        r.nodes[0].fault = Fault(K.HANG)
        answer = await ask(r)
        assert (answer.status, said(answer)) == (504, "node n1: no first byte within 0.2 s")


def fast() -> Any:
    """A node whose answers take some time, so that its speed can be known."""
    return spec(model(decode_tps=20_000), answer_tokens=(4, 4), num_parallel=2)


async def learnt(r: Rig) -> None:
    """Let the pool learn how fast all nodes are."""
    for _ in range(4 * len(r.nodes)):
        assert (await ask(r)).status == 200
    await r.until(lambda: len(r.requests) == 4 * len(r.nodes))
    await r.look()  # a model that is in memory has no load to wait for
    r.nodes[0].seen.clear()


async def test_a_node_whose_speed_is_known_is_not_waited_for_as_long() -> None:
    async with rig(fast(), fast(), timeouts={"first_byte_min_s": 0.05}) as r:
        await learnt(r)
        r.nodes[0].fault = Fault(K.HANG, times=1)
        answer = await ask(r)
        assert (answer.status, answer.header("X-Ollamux-Node")) == (200, "n2")
        assert answer.header("X-Ollamux-Attempts") == "2"
        assert len(r.nodes[0].calls(CHAT)) == 1


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("fields", [{"tools": [TOOL]}, {"stream": False}])
async def test_what_is_sent_only_when_whole_keeps_the_long_limit(fields: Any) -> None:
    """A stream with tools may be silent until a call is complete."""
    async with rig(fast(), timeouts={"first_byte_min_s": 0.05}) as r, asyncio.TaskGroup() as group:
        await learnt(r)
        node = r.nodes[0]
        node.fault = Fault(K.HANG)
        patient = group.create_task(ask(r, **fields))
        await node.until(lambda: node.held == 1)
        plain = await ask(r)
        assert plain.status == 504
        assert not patient.done(), "it came first, and waits still"
        node.fault = None
        node.release()
        assert (await patient).status == 200


# Through it all


async def test_whatever_two_of_three_nodes_do_every_request_is_answered() -> None:
    """A good one is left at all times."""
    bad = [Fault(K.DIE), status(500), Fault(K.GARBAGE), full(), Fault(K.DIE, reset=True)]
    specs = spec(), spec(), spec()
    async with rig(*specs, breaker=backs_off(0.001, 0.01), retry={"budget_least": 99}) as r:
        seen: Counter[int] = Counter()
        for turn in range(60):
            for node, faults in zip(r.nodes, (bad, bad[2:]), strict=False):
                node.fault = faults[turn % len(faults)]
            answer = await ask(r, STREAMED[turn % len(STREAMED)], stream=turn % 2 == 0)
            seen[answer.status] += 1
        assert seen == {200: 60}
        assert r.app.pool.in_flight == waiting(r) == 0
