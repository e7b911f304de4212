"""A response on its way to the client: every byte, whole records only, honest endings."""

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import ollama
import openai
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from router import downstream
from router.core import continuation, dialect, usage
from router.core.stitch import Stitch
from router.core.types import Failure, FailureKind, NodeSpec
from router.downstream import Reply, Request, Server
from router.errors import UpstreamError
from router.keep import Keep, Kept
from router.log import Ending, Report
from router.relay import Limits, Relay
from router.upstream import Upstream, request_head
from tests.rig import MODEL, Answer, Peer, Rig, Talk, rig, scripted, talk

OK = b"HTTP/1.1 200 OK\r\n"
NDJSON, SSE = "application/x-ndjson", "text/event-stream"
LINES = [b'{"message":{"role":"assistant","content":"%d"},"done":false}\n' % n for n in range(3)]
LAST = b'{"message":{"content":""},"done":true,"prompt_eval_count":7,"eval_count":3}\n'


def head(kind: str, *lines: str) -> bytes:
    """The head of a chunked answer."""
    named = (f"Content-Type: {kind}", "Transfer-Encoding: chunked", *lines)
    return OK + "".join(f"{line}\r\n" for line in named).encode() + b"\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


END = b"0\r\n\r\n"
Act = Callable[[Peer], Awaitable[None]]


@asynccontextmanager
async def front(act: Act, **sections: Any) -> AsyncIterator[tuple[Rig, Talk]]:
    """A router in front of one node that acts as told, and a client of it."""
    async with scripted(act) as url, rig(entries=[{"url": url, "slots": 2}], **sections) as r:
        async with talk(r.url) as client:
            yield r, client
        await r.until(lambda: r.app.pool.in_flight == 0)


def says(*pieces: bytes, die: bool = False) -> Act:
    async def act(peer: Peer) -> None:
        for piece in pieces:
            await peer.say(piece)
            await asyncio.sleep(0)  # a write of its own: the kernel may still join them
        if die:
            peer.close()

    return act


async def ask(client: Talk, path: str = "/api/chat", version: str = "1.1") -> Answer:
    await client.post(path, json.dumps({"model": MODEL}).encode(), version=version)
    return await client.answer()


# Bytes


async def test_a_stream_is_relayed_record_by_record_without_delay() -> None:
    seen = asyncio.Semaphore(0)

    async def act(peer: Peer) -> None:
        await peer.say(head(NDJSON))
        for line in LINES:
            await peer.say(chunk(line))
            await seen.acquire()  # the client has this one, although no other follows
        await peer.say(chunk(LAST), END)

    async with front(act) as (r, client):
        await client.post("/api/chat", b'{"model":"llama3:8b"}')
        version, status, _ = await client.head()
        assert (version, status) == ("HTTP/1.1", 200)
        for line in LINES:
            assert await client.chunk() == line
            seen.release()
        assert await client.chunk() == LAST
        assert await client.chunk() == b""
        await r.until(lambda: r.requests != [])
        assert r.requests[0]["completion_tokens"] == 3


RAW = b'{"message":{"content":"\xe2\x80\xa8 \xff \\u2028 1.50e0"}}\n'
EVENTS = b": comment\n\nevent: x\ndata: {}\n\ndata: \xe2\x80\xa8\r\n\r\n"


@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (NDJSON, RAW + b"\n" + LINES[0] + b"\n\n" + LAST),
        (NDJSON, LINES[0] + b"an end without a line break"),
        (NDJSON, b""),
        (NDJSON + "; charset=utf-8", LINES[0] + LAST),
        (SSE, EVENTS + b"data: [DONE]\n\n"),
        (SSE, EVENTS + b"data: half an event"),
        (SSE, b"\n\n\r\n\r\n"),
        ("application/json; charset=utf-8", RAW),
        ("image/png", bytes(range(256))),
    ],
)
async def test_bytes_are_the_nodes_however_they_are_cut(kind: str, data: bytes, size: int) -> None:
    pieces = [chunk(data[at : at + size]) for at in range(0, len(data), size)]
    async with front(says(head(kind), *pieces, END)) as (_, client):
        answer = await ask(client)
        assert (answer.status, answer.body, answer.whole) == (200, data, True)
        assert answer.header("Content-Type") == kind


@pytest.mark.parametrize("status", [200, 201, 400, 404, 418, 500])
async def test_status_and_reason_are_the_nodes(status: int) -> None:
    node = b"HTTP/1.1 %d Strange Reason\r\nContent-Length: 4\r\n\r\nbody" % status
    async with front(says(node)) as (r, client):
        await client.post("/api/chat", b"{}")
        first = await client.reader.readuntil(b"\r\n")
        assert first == b"HTTP/1.1 %d Strange Reason\r\n" % status
        await r.until(lambda: r.requests != [])
        outcome = "ok" if status < 400 else "client_error" if status < 500 else "node_error"
        assert r.requests[0]["outcome"] == outcome


async def test_headers_of_the_connection_stay_behind() -> None:
    lines = (
        "Connection: keep-alive, X-Nominated", "X-Nominated: x", "Keep-Alive: timeout=5",
        "Proxy-Authenticate: Basic", "Trailer: X-T", "Upgrade: h2c", "Server: node/1",
        "Set-Cookie: a=1", "Set-Cookie: b=2", "Date: Thu, 01 Jan 1970 00:00:00 GMT",
        "Cache-Control: no-cache", "X-Custom: kept",
    )  # fmt: skip
    for body in (head(NDJSON, *lines) + chunk(LAST) + END, OK + "\r\n".join(
        (*lines, "Content-Type: text/plain", "Content-Length: 2")
    ).encode() + b"\r\n\r\nok"):  # fmt: skip
        async with front(says(body)) as (_, client):
            answer = await ask(client)
            found = [
                (name, value)
                for name, value in answer.headers
                if not name.startswith("X-Ollamux") and name not in ("Content-Length",
                "Content-Type", "Transfer-Encoding")
            ]  # fmt: skip
            assert sorted(found) == [
                ("Cache-Control", "no-cache"),
                ("Date", "Thu, 01 Jan 1970 00:00:00 GMT"),
                ("Set-Cookie", "a=1"),
                ("Set-Cookie", "b=2"),
                ("X-Custom", "kept"),
            ]


async def test_what_chose_the_node_stands_in_the_headers() -> None:
    for kind in (NDJSON, "application/json"):
        async with front(says(head(kind), chunk(LAST), END)) as (r, client):
            answer = await ask(client)
            ours = {name: value for name, value in answer.headers if name.startswith("X-Ollamux")}
            await r.until(lambda: r.requests != [])
            assert ours == {
                "X-Ollamux-Node": "n1",
                "X-Ollamux-Model": MODEL,
                "X-Ollamux-Request-Id": r.requests[0]["id"],
                "X-Ollamux-Attempts": "1",
                "X-Ollamux-Reason": "load",
            }


# Deaths


SURFACES: Mapping[str, tuple[str, list[bytes], bytes]] = {
    "/api/chat": (NDJSON, LINES, LAST),
    "/api/generate": (NDJSON, LINES, LAST),
    "/v1/chat/completions": (
        SSE,
        [b'data: {"choices":[{"delta":{"content":"data: [DONE]"}}]}\n\n'] * 3,
        b"data: [DONE]\n\n",
    ),
    "/v1/completions": (SSE, [b'data: {"choices":[]}\n\n'] * 3, b"data: [DONE]\n\n"),
    "/v1/responses": (
        SSE,
        [b'event: response.created\ndata: {"a":"event: response.completed"}\n\n'] * 3,
        b'event: response.completed\ndata: {"type":"response.completed"}\n\n',
    ),
    "/v1/messages": (
        SSE,
        [b'event: ping\ndata: {"a":"event: message_stop"}\n\n'] * 3,
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    ),
}


def error_of(path: str, record: bytes) -> str:
    """The message of the record that ends a broken stream; its form is checked."""
    if path.startswith("/api/"):
        assert record.endswith(b"}\n")
        error = json.loads(record)
        assert error.keys() == {"error"}
        return str(error["error"])
    *names, data, blank, end = record.split(b"\n")
    named = path in ("/v1/messages", "/v1/responses")
    assert (names, blank, end) == ([b"event: error"] if named else [], b"", b"")
    error = json.loads(data.removeprefix(b"data: "))
    if path == "/v1/messages":
        assert error["type"] == "error"
        assert error["error"]["type"] == "api_error"
    return str(error["error"]["message"])


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("path", SURFACES)
@pytest.mark.parametrize("half", [0, 1, 10, -1], ids=lambda half: f"{half} bytes more")
async def test_a_death_in_mid_stream_ends_it_with_an_error_record(
    path: str, half: int, version: str
) -> None:
    kind, records, _ = SURFACES[path]
    pieces = [chunk(record) for record in records]
    if half:
        size = len(records[0])
        pieces.append(b"%x\r\n%b" % (size, records[0][:half]))
    async with front(says(head(kind), *pieces, die=True)) as (r, client):
        answer = await ask(client, path, version)
        assert answer.status == 200
        assert answer.whole
        whole = b"".join(records)
        assert answer.body.startswith(whole), "no half of a record is ever shown"
        told = error_of(path, answer.body.removeprefix(whole))
        assert re.fullmatch("node n1: connection (closed|reset) inside the response", told)
        await r.until(lambda: r.requests != [])
        (line,) = r.requests
        assert (line["outcome"], line["error"]) == ("broken", told)


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("extra", [b"", b"\n", b'{"half'])
@pytest.mark.parametrize("path", SURFACES)
async def test_a_death_after_the_final_record_is_no_error(
    path: str, extra: bytes, version: str
) -> None:
    kind, records, last = SURFACES[path]
    pieces = [chunk(record) for record in (*records, last)]
    if extra:
        pieces.append(b"99\r\n" + extra)
    async with front(says(head(kind), *pieces, die=True)) as (r, client):
        answer = await ask(client, path, version)
        assert answer.whole
        assert answer.body.rstrip(b"\n") == b"".join((*records, last)).rstrip(b"\n")
        await r.until(lambda: r.requests != [])
        assert r.requests[0]["outcome"] == "ok"


@pytest.mark.parametrize(
    "record",
    [
        b'{"message":{"tool_calls":[{"function":{"arguments":{"done":true}}}]},"done":false}\n',
        b'{"message":{"content":"\\"done\\":true"},"done":false}\n',
    ],
)
async def test_a_record_that_only_looks_final_is_not(record: bytes) -> None:
    async with front(says(head(NDJSON), chunk(record), die=True)) as (_, client):
        answer = await ask(client)
        assert answer.body.startswith(record)
        assert error_of("/api/chat", answer.body.removeprefix(record))


@pytest.mark.parametrize("path", SURFACES)
async def test_a_clean_end_without_a_final_record_is_passed_on_as_it_is(path: str) -> None:
    kind, records, _ = SURFACES[path]
    async with front(says(head(kind), *map(chunk, records), END)) as (r, client):
        answer = await ask(client, path)
        assert answer.whole
        assert answer.body.startswith(b"".join(records))
        rest = answer.body.removeprefix(b"".join(records))
        assert bool(rest) is (path in {"/v1/messages", "/v1/responses"})
        assert not rest or error_of(path, rest) == "node n1: ended before its last record"
        await r.until(lambda: r.requests != [])
        assert r.requests[0]["outcome"] == ("broken" if rest else "ok")


@pytest.mark.parametrize("end", [b"", b"data: [DONE]", b"data: [DONE]\n", b"data: [DONE]\r\n\r\n"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_chunk_that_names_no_model_and_then_nothing_is_a_failure(
    path: str, end: bytes
) -> None:
    lost = b'data: {"model":"","choices":[{"finish_reason":null}]}\n\n'
    async with front(says(head(SSE), chunk(lost + end), END)) as (_, client):
        answer = await ask(client, path)
        assert answer.whole
        rest = answer.body.removeprefix(lost + end)
        assert bool(rest) is not bool(end)
        assert not rest or error_of(path, rest) == "node n1: ended before its last record"


@pytest.mark.parametrize(
    "end", ["event: error", "event: response.failed", "event: response.incomplete"]
)
async def test_a_stream_that_ends_by_telling_of_its_failure_gets_no_second_one(end: str) -> None:
    body = end.encode() + b"\ndata: {}\n\n"
    async with front(says(head(SSE), chunk(body), END)) as (_, client):
        answer = await ask(client, "/v1/responses")
        assert (answer.body, answer.whole) == (body, True)


@pytest.mark.parametrize("last", [b"", b'{"done":true}\n', b'{"done":true}'])
async def test_lines_that_end_with_the_connection_need_their_last_one(last: bytes) -> None:
    line = b'{"message":{"content":"a"},"done":false}\n'
    plain = head(NDJSON).replace(b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n")
    async with front(says(plain, line + last, die=True)) as (_, client):
        answer = await ask(client)
        assert answer.body.startswith(line + last)
        rest = answer.body.removeprefix(line + last)
        assert bool(rest) is not bool(last)
        assert not rest or "connection closed before" in error_of("/api/chat", rest)


@pytest.mark.parametrize("path", SURFACES)
@pytest.mark.parametrize("half", [b"", b"{", b"data: {"])
async def test_a_failure_before_the_first_whole_record_has_a_true_status(
    path: str, half: bytes
) -> None:
    kind, _, _ = SURFACES[path]
    pieces = [b"99\r\n" + half] if half else []
    async with front(says(head(kind), *pieces, die=True)) as (r, client):
        answer = await ask(client, path)
        assert answer.status == 502
        assert str(answer.header("Content-Type")).startswith("application/json")
        assert b"inside the response" in answer.body
        assert half == b"" or not answer.body.startswith(b"data")
        await r.until(lambda: r.requests != [])
        assert r.requests[0]["outcome"] == "failed"


DEAD = [head(NDJSON) + chunk(LINES[0]) + b"99\r\n{"]


async def test_ollamas_client_raises_on_a_broken_stream() -> None:
    async with front(says(*DEAD, die=True)) as (r, _):
        client = ollama.AsyncClient(r.url)
        got = []

        async def listen() -> None:
            async for part in await client.chat(MODEL, stream=True):
                got.append(part.message.content)  # noqa: PERF401 - it raises on the way

        with pytest.raises(ollama.ResponseError, match="inside the response"):
            await listen()
        assert got == ["0"]


async def test_openais_client_raises_on_a_broken_stream() -> None:
    first = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": MODEL,
             "choices": [{"index": 0, "delta": {"content": "0"}}]}  # fmt: skip
    event = b"data: " + json.dumps(first).encode() + b"\n\n"
    async with front(says(head(SSE), chunk(event), b"99\r\ndata: {", die=True)) as (r, _):
        client = openai.AsyncOpenAI(base_url=f"{r.url}/v1", api_key="k", max_retries=0)
        got = []
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}], stream=True
        )

        async def listen() -> None:
            async for part in stream:
                got.append(part.choices[0].delta.content)  # noqa: PERF401 - it raises on the way

        with pytest.raises(openai.APIError, match="inside the response"):
            await listen()
        assert got == ["0"]
        await client.close()


# Limits of what is held


async def test_a_record_above_the_limit_is_passed_on_in_pieces() -> None:
    long = b'{"x":"' + b"y" * 500 + b'"}\n'
    pieces = [long[at : at + 50] for at in range(0, len(long), 50)]
    stream = [chunk(LINES[0]), *map(chunk, pieces), chunk(LINES[1]), END]
    async with front(says(head(NDJSON), *stream), limits={"max_record_bytes": 120}) as (_, client):
        answer = await ask(client)
        assert (answer.body, answer.whole) == (LINES[0] + long + LINES[1], True)


@pytest.mark.parametrize("healed", [False, True])
async def test_a_death_inside_such_a_record_cuts_the_connection(*, healed: bool) -> None:
    """Once it has ended the stream is readable again, and so is an error record."""
    pieces = [b'{"x":"' + b"y" * 200, *([b'"}\n' + LINES[1]] if healed else [])]
    started = asyncio.Event()

    async def act(peer: Peer) -> None:
        await peer.say(head(NDJSON), chunk(pieces[0]))
        await started.wait()
        await peer.say(*map(chunk, pieces[1:]))
        peer.close()

    async with front(act, limits={"max_record_bytes": 120}) as (r, client):
        await client.post("/api/chat", b'{"model":"llama3:8b"}')
        await client.head()
        assert await client.chunk() == pieces[0]
        started.set()
        if healed:
            assert await client.chunk() == pieces[1]
            assert error_of("/api/chat", await client.chunk())
            assert await client.chunk() == b""
        else:
            assert await client.rest() == b""
        await r.until(lambda: r.requests != [])
        assert r.requests[0]["outcome"] == "broken"


WHOLE = b'{"message":{"content":"' + b"z" * 300 + b'"},"done":true,"eval_count":3}'
LENGTH = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(WHOLE)


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("at", [0, 1, 150, -1])
@pytest.mark.parametrize("chunked", [False, True])
async def test_an_unstreamed_answer_that_breaks_is_a_502(
    path: str, at: int, *, chunked: bool
) -> None:
    part = WHOLE[:at]
    begun = [head("application/json"), chunk(part)] if chunked else [OK + LENGTH, part]
    async with front(says(*begun[: 2 if part else 1], die=True)) as (r, client):
        answer = await ask(client, path)
        assert answer.status == 502
        assert b"zz" not in answer.body
        assert r.app.pool.in_flight == 0


@pytest.mark.parametrize("chunked", [False, True])
async def test_an_unstreamed_answer_above_the_limit_is_passed_through(*, chunked: bool) -> None:
    pieces = [WHOLE[at : at + 40] for at in range(0, len(WHOLE), 40)]
    begun = head("application/json") if chunked else OK + LENGTH
    sent = [*map(chunk, pieces), END] if chunked else pieces
    async with front(says(begun, *sent), limits={"max_held_bytes": 100}) as (r, client):
        answer = await ask(client)
        assert (answer.status, answer.body, answer.whole) == (200, WHOLE, True)
        assert answer.header("Content-Length") == (None if chunked else str(len(WHOLE)))
        await r.until(lambda: r.requests != [])
        assert r.requests[0]["completion_tokens"] == 3


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_death_after_that_cuts_the_connection(version: str, *, chunked: bool) -> None:
    begun = [head("application/json"), chunk(WHOLE[:200])] if chunked else [
        OK + LENGTH, WHOLE[:200]
    ]  # fmt: skip
    async with front(says(*begun, die=True), limits={"max_held_bytes": 100}) as (r, client):
        answer = await ask(client, version=version)
        assert answer.body == WHOLE[:200]
        if version == "1.1":
            assert not answer.whole
        await r.until(lambda: r.requests != [])
        assert r.requests[0]["outcome"] == "broken"


async def test_a_compressed_stream_is_passed_on_and_cut_where_it_breaks() -> None:
    packed = head(NDJSON, "Content-Encoding: zstd")
    async with front(says(packed, chunk(b"\x28\xb5\x2f\xfd"), END)) as (_, client):
        answer = await ask(client)
        assert (answer.body, answer.header("Content-Encoding")) == (b"\x28\xb5\x2f\xfd", "zstd")
    async with front(says(packed, chunk(b"\x28\xb5\x2f\xfd"), die=True)) as (_, client):
        answer = await ask(client)
        assert (answer.body, answer.whole) == (b"\x28\xb5\x2f\xfd", False)


# Silence


@pytest.mark.parametrize("path", SURFACES)
async def test_a_stall_ends_a_stream_with_an_error_record(path: str) -> None:
    kind, records, _ = SURFACES[path]
    gone = asyncio.Event()

    async def act(peer: Peer) -> None:
        await peer.say(head(kind) + b"".join(map(chunk, records)) + b"99\r\n{")
        await peer.gone()
        gone.set()

    async with front(act, timeouts={"between_records_s": 0.02}) as (r, client):
        answer = await ask(client, path)
        whole = b"".join(records)
        assert answer.body.startswith(whole)
        told = "node n1: sent nothing for 0.02 s"
        assert error_of(path, answer.body.removeprefix(whole)) == told
        await gone.wait()
        await r.until(lambda: r.requests != [])
        assert (r.requests[0]["outcome"], r.requests[0]["error"]) == ("broken", told)


@pytest.mark.parametrize("kind", [NDJSON, "application/json"])
async def test_a_stall_before_the_first_record_is_a_504(kind: str) -> None:
    async def act(peer: Peer) -> None:
        await peer.say(head(kind) + chunk(b'{"half'))
        await peer.gone()

    async with front(act, timeouts={"between_records_s": 0.02}) as (_, client):
        answer = await ask(client)
        assert answer.status == 504
        assert json.loads(answer.body) == {"error": "node n1: sent nothing for 0.02 s"}


async def test_a_node_that_keeps_talking_is_not_silent() -> None:
    """It speaks for several limits, each time well within one: the last word counts."""
    limit_s = 0.3

    async def act(peer: Peer) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        await peer.say(head(NDJSON))
        while loop.time() - start < 1.3 * limit_s:
            await peer.say(chunk(LINES[0]))
            await asyncio.sleep(0)
        await peer.say(chunk(LAST), END)

    async with front(act, timeouts={"between_records_s": limit_s}) as (r, client):
        answer = await ask(client)
        assert answer.body.endswith(LAST)
        await r.until(lambda: r.requests != [])
        assert r.requests[0]["outcome"] == "ok"


# Back-pressure

BIG = 48 << 20


async def test_a_slow_client_slows_the_node_and_is_not_blamed_on_it() -> None:
    """The node can push what sockets and one buffer hold, until the client reads.

    Other requests pass meanwhile, in more turns of the loop than the whole answer would take;
    and the client's silence lasts longer than the node's may.
    """
    record = b'{"x":"' + b"y" * 65_527 + b'"}\n'
    state = {"pushed": 0, "small": 0}

    async def act(peer: Peer) -> None:
        if b"small" in peer.body:
            state["small"] += 1
            await peer.say(head(NDJSON), chunk(LAST), END)
            return
        await peer.say(head(NDJSON))
        while state["pushed"] < BIG:
            await peer.say(chunk(record))
            state["pushed"] += len(record)
        await peer.say(END)

    async with front(act, timeouts={"between_records_s": 0.3}) as (r, client):
        await client.post("/api/chat", b'{"model":"llama3:8b"}')
        await client.head()
        start = asyncio.get_running_loop().time()
        while state["small"] < 100 or asyncio.get_running_loop().time() - start < 0.4:
            async with r.chat(messages=[{"role": "user", "content": "small"}]) as other:
                await other.read()
        assert state["pushed"] < BIG * 3 // 4
        body = b""
        while piece := await client.chunk():
            body += piece[:1]
        assert state["pushed"] == BIG
        assert body.strip(b"{") == b""
        await r.until(lambda: len(r.requests) == state["small"] + 1)
        assert {line["outcome"] for line in r.requests} == {"ok"}


# Token counts


USAGE: Sequence[tuple[str, str, Sequence[bytes], tuple[int | None, int | None]]] = [
    ("/api/chat", NDJSON, [*LINES, LAST], (7, 3)),
    ("/api/chat", "application/json", [LAST], (7, 3)),
    ("/api/chat", NDJSON, LINES, (None, 3)),
    ("/api/embed", "application/json", [b'{"embeddings":[],"prompt_eval_count":9}'], (9, None)),
    ("/api/embeddings", "application/json", [b'{"embedding":[0.5]}'], (None, None)),
    ("/v1/embeddings", "application/json",
     [b'{"data":[],"usage":{"prompt_tokens":9,"total_tokens":9}}'], (9, None)),
    ("/v1/chat/completions", SSE, [b'data: {"choices":[]}\n\n', b"data: [DONE]\n\n"],
     (None, None)),
    ("/v1/chat/completions", SSE,
     [b'data: {"choices":[]}\n\n',
      b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n',
      b"data: [DONE]\n\n"], (7, 3)),
    ("/v1/completions", SSE,
     [b'data: {"usage":{"prompt_tokens":0,"completion_tokens":0}}\n\n',
      b'data: {"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n',
      b"data: [DONE]\n\n"], (7, 3)),
    ("/v1/messages", SSE,
     [b'event: message_start\ndata: {"usage":{"input_tokens":99,"output_tokens":0}}\n\n',
      b'event: message_delta\ndata: {"usage":{"input_tokens":7,"output_tokens":3}}\n\n',
      b'event: message_stop\ndata: {"type":"message_stop"}\n\n'], (7, 3)),
    ("/v1/messages", SSE,
     [b'event: message_start\ndata: {"usage":{"input_tokens":99,"output_tokens":0}}\n\n'],
     (None, None)),
    ("/v1/responses", SSE,
     [b'event: response.created\ndata: {"usage":null}\n\n',
      b'event: response.completed\ndata: {"usage":{"input_tokens":7,"output_tokens":3}}\n\n'],
     (7, 3)),
]  # fmt: skip


@pytest.mark.parametrize("die", [False, True], ids=["ends", "dies"])
@pytest.mark.parametrize(("path", "kind", "records", "usage"), USAGE)
async def test_tokens_are_read_from_a_final_record_only(
    path: str, kind: str, records: Sequence[bytes], usage: tuple[int | None, int | None], *,
    die: bool,
) -> None:  # fmt: skip
    if die and kind == "application/json":
        usage = (None, None)
    end = () if die else (END,)
    async with front(says(head(kind), *map(chunk, records), *end, die=die)) as (r, client):
        await ask(client, path)
        await r.until(lambda: r.requests != [])
        (line,) = r.requests
        assert (line["prompt_tokens"], line["completion_tokens"]) == usage


HALVES: Mapping[str, tuple[list[bytes], int]] = {
    "/api/chat": (LINES, 3),
    "/api/generate": ([b'{"response":"x","done":false}\n'] * 2 + [b"\n"], 2),
    "/v1/chat/completions": (
        [b'data: {"choices":[{"delta":{"content":"\\"x\\""},"finish_reason":null}]}\n\n'] * 3
        + [b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'], 3,
    ),
    "/v1/completions": (
        [(b'data: {"choices":[{"text":"x","finish_reason":null}],'
          b'"usage":{"prompt_tokens":0,"completion_tokens":0}}\n\n')] * 2, 2,
    ),
    "/v1/messages": (
        [b'event: message_start\ndata: {"message":{"usage":{"input_tokens":9}}}\n\n',
         b'event: content_block_start\ndata: {}\n\n',
         b'event: content_block_delta\ndata: {"a":"event: content_block_delta"}\n\n',
         b'event: content_block_delta\ndata: {}\n\n'], 2,
    ),
    "/v1/responses": (
        [b'event: response.created\ndata: {"response":{"usage":null}}\n\n',
         b'event: response.output_text.delta\ndata: {"delta":".delta"}\n\n'], 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("die", [False, True], ids=["ends", "dies"])
@pytest.mark.parametrize("path", HALVES)
async def test_without_a_final_record_the_chunks_of_an_answer_are_counted(
    path: str, *, die: bool
) -> None:
    kind, _, _ = SURFACES[path]
    records, chunks = HALVES[path]
    end = () if die else (END,)
    joined = b"".join(records[1:])  # several in one piece count as much as each by itself
    said = (head(kind), chunk(records[0]), chunk(joined), *end)
    async with front(says(*said, die=die)) as (r, client):
        await ask(client, path)
        await r.until(lambda: r.requests != [])
        (line,) = r.requests
        assert (line["prompt_tokens"], line["completion_tokens"]) == (None, chunks)
        assert line["tokens_from"] == "chunks"


# A record that only the router asked for

STREAM = json.dumps({"model": MODEL, "stream": True}).encode()
TOLD = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"


def events(*said: str) -> list[bytes]:
    """What a node streams of a chat, up to the record of counts."""
    parts: list[Any] = [{"delta": {"content": one}, "finish_reason": None} for one in said]
    parts.append({"delta": {}, "finish_reason": "stop"})
    return [b"data: " + json.dumps({"choices": [part]}).encode() + b"\n\n" for part in parts]


SHOWN = events('"usage"', '{"choices":[],"usage":{}}', "data: [DONE]\n\n")
TEXT = b"".join((*SHOWN, TOLD, DONE))


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """`data` in pieces that begin at these places."""
    marks = [0, *sorted(place % len(data) for place in places), len(data)]
    pieces = [data[start:end] for start, end in itertools.pairwise(marks)]
    return [piece for piece in pieces if piece]


@pytest.mark.parametrize(
    "pieces",
    [
        [*SHOWN, TOLD, DONE],
        [*SHOWN[:-1], SHOWN[-1] + TOLD + DONE],
        [*SHOWN[:-1], SHOWN[-1] + TOLD, DONE],
        [*SHOWN, TOLD + DONE],
        [*SHOWN, TOLD[:20], TOLD[20:-1], TOLD[-1:] + DONE],
        [SHOWN[0] + TOLD, *SHOWN[1:], DONE],
        [TOLD, *SHOWN, DONE],
        [*SHOWN, TOLD.replace(b"\n", b"\r\n"), DONE],
        [*(TEXT[at : at + 1] for at in range(len(TEXT)))],
        [TEXT],
    ],
)
async def test_counts_that_nobody_asked_for_are_read_and_withheld(pieces: list[bytes]) -> None:
    async with front(says(head(SSE), *map(chunk, pieces), END)) as (r, client):
        await client.post("/v1/chat/completions", STREAM)
        answer = await client.answer()
        assert (answer.body, answer.whole) == (b"".join((*SHOWN, DONE)), True)
        await r.until(lambda: r.requests != [])
        (line,) = r.requests
        assert (line["prompt_tokens"], line["completion_tokens"], line["outcome"]) == (7, 3, "ok")
        assert "tokens_from" not in line


@given(st.lists(st.lists(st.integers(0, 10_000), max_size=12), min_size=1, max_size=20))
@settings(max_examples=20, deadline=None)
def test_any_cut_of_a_stream_shows_every_byte_but_those(cuts: list[list[int]]) -> None:
    async def relay() -> None:
        waiting = iter(cuts)

        async def act(peer: Peer) -> None:
            await peer.say(head(SSE), *map(chunk, cut(TEXT, next(waiting))), END)

        async with front(act) as (r, client):
            for number in range(1, len(cuts) + 1):
                await client.post("/v1/chat/completions", STREAM)
                assert (await client.answer()).body == b"".join((*SHOWN, DONE))
                await r.until(lambda number=number: len(r.requests) == number)  # type: ignore[misc]
                assert r.requests[-1]["completion_tokens"] == 3

    asyncio.run(relay())


async def test_only_one_record_is_withheld() -> None:
    async with front(says(head(SSE), *map(chunk, (TOLD, TOLD, DONE)), END)) as (_, client):
        await client.post("/v1/chat/completions", STREAM)
        assert (await client.answer()).body == TOLD + DONE


@pytest.mark.parametrize(
    ("path", "body", "sections"),
    [
        ("/v1/chat/completions", {"stream_options": {"include_usage": True}}, {}),
        ("/v1/chat/completions", {}, {"metrics": {"exact_usage": False}}),
        ("/v1/completions", {}, {}),
    ],
    ids=["asked by the client", "asked by nobody", "another endpoint"],
)
async def test_counts_that_the_router_did_not_ask_for_are_passed_on(
    path: str, body: Mapping[str, Any], sections: Mapping[str, Any]
) -> None:
    async with front(says(head(SSE), chunk(TEXT), END), **sections) as (r, client):
        sent = json.dumps({"model": MODEL, "stream": True, **body}).encode()
        await client.post(path, sent)
        assert (await client.answer()).body == TEXT
        await r.until(lambda: r.requests != [])
        assert r.requests[0]["completion_tokens"] == 3


async def test_a_stream_whose_node_dies_behind_the_text_and_its_counts_is_ended_for_it() -> None:
    async with front(says(head(SSE), *map(chunk, (*SHOWN, TOLD)), die=True)) as (r, client):
        await client.post("/v1/chat/completions", STREAM)
        assert (await client.answer()).body == b"".join((*SHOWN, DONE))
        await r.until(lambda: r.requests != [])
        (line,) = r.requests
        assert (line["completion_tokens"], line["outcome"]) == (3, "ok")
        assert line["continuations"] == ["ended"]
        assert "tokens_from" not in line


async def test_nothing_but_counts_is_an_empty_stream() -> None:
    async with front(says(head(SSE), chunk(TOLD), END)) as (_, client):
        await client.post("/v1/chat/completions", STREAM)
        answer = await client.answer()
        assert (answer.status, answer.body, answer.whole) == (200, b"", True)


def test_an_error_of_a_node_says_what_may_be_told() -> None:
    assert str(UpstreamError(Failure(FailureKind.RESET))) == "reset"
    assert str(UpstreamError(Failure(FailureKind.RESET, detail="x"), "told")) == "told"


# An answer that another node goes on with


@dataclass
class Relayed:
    """One answer of several nodes: what it came to, and what was seen of it at each death."""

    report: Report = field(default_factory=lambda: Report("id", "client", "POST", 0.0))
    kept: Kept = field(default_factory=Keep(1 << 30).keep)
    failures: list[Failure] = field(default_factory=list)
    progress: list[int] = field(default_factory=list)
    seen: list[bytes] = field(default_factory=list)


@asynccontextmanager
async def nodes(*acts: Act, record_bytes: int = 10_000) -> AsyncIterator[tuple[Talk, Relayed]]:
    """A client of a relay that asks these nodes one after the other, until one has ended."""
    made = Relayed()
    limits = Limits(10_000, record_bytes, 10_000, 5, 5, 5)

    async def handle(request: Request) -> Reply:
        body = await downstream.body(request, 10_000)
        route = dialect.find(request.path)
        assert route is not None
        call = dialect.parse(route, body, exact_usage=True)
        sent = dialect.rename(body, call, call.model)
        asks = call.usage is not None
        relay = Relay(
            request, route, limits, made.report, lambda: 1.0, withholds=asks, kept=made.kept
        )
        plan = continuation.Plan(Stitch(route.family, 0, {}, role=False), sent)
        for spec in specs:
            head = request_head(spec, "POST", request.path, (), sum(map(len, plan.body)))
            exchange = await upstream.open(spec, head, plan.body)
            try:
                if relay.begun:
                    return await relay.resume(exchange, plan.stitch)
                return await relay.run(exchange, b"")
            except UpstreamError as error:
                made.failures.append(error.failure)
            finally:
                exchange.close()
            made.progress.append(relay.progress)
            made.seen.append(made.kept.data)
            if relay.complete or made.kept.lost:
                break
            plan = continuation.plan(route, sent, made.kept.data, withholds=asks)
            if plan.ending:
                return relay.end_with(plan.ending)
        return await relay.break_off(made.failures[-1], "gone", "gone")

    upstream = Upstream(connect_s=5)
    async with AsyncExitStack() as stack:
        urls = [urlsplit(await stack.enter_async_context(scripted(act))) for act in acts]
        specs = [NodeSpec("n", url.geturl(), "http", "127.0.0.1", url.port or 0) for url in urls]
        stack.push_async_callback(upstream.close)
        server = Server(handle, max_header_bytes=8192, head_timeout_s=30)
        runner = web.ServerRunner(server)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        client = await stack.enter_async_context(talk(f"http://127.0.0.1:{port}"))
        yield client, made


ASKS = b'{"messages":[{"role":"user","content":"x"}],"stream":true}'


def piece(stream: str, delta: Mapping[str, str], finish: str | None = None) -> bytes:
    """A chunk of OpenAI's, of the stream with this id."""
    choice = {"delta": delta, "finish_reason": finish}
    made = json.dumps({"id": stream, "choices": [choice]}, separators=(",", ":"))
    return f"data: {made}\n\n".encode()


FIRST = [piece("1", {"role": "assistant", "content": "0"}), piece("1", {"content": "1"})]
NEXT = [piece("2", {"role": "assistant", "content": "2"}), piece("2", {}, "stop")]
SHOWN_NEXT = [piece("1", {"content": "2"}), piece("1", {}, "stop")]
COUNTS = b'data: {"id":"2","choices":[],"usage":{"prompt_tokens":9,"completion_tokens":1}}\n\n'
LAST_OF_ONE = b'{"message":{"content":""},"done":true,"prompt_eval_count":9,"eval_count":1}\n'
# The path, what two nodes say, what the client sees of the second, and what was told of tokens.
WENT_ON: Sequence[tuple[str, list[bytes], list[bytes], list[bytes]]] = [
    ("/api/chat", LINES[:2], [LINES[2], LAST_OF_ONE], [LINES[2], LAST]),
    ("/v1/chat/completions", FIRST, [*NEXT, COUNTS, DONE], [*SHOWN_NEXT, DONE]),
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("half", [b"", b"{", b'data: {"half'])
@pytest.mark.parametrize(("path", "first", "then", "shown"), WENT_ON)
async def test_another_nodes_records_follow_on_as_if_nothing_had_happened(
    path: str, first: list[bytes], then: list[bytes], shown: list[bytes], half: bytes, size: int
) -> None:
    bodies = []

    async def act(peer: Peer) -> None:
        bodies.append(peer.body)
        data = b"".join(then)
        pieces = [chunk(data[at : at + size]) for at in range(0, len(data), size)]
        await says(head(SURFACES[path][0]), *pieces, END)(peer)

    dying = says(head(SURFACES[path][0]), *map(chunk, first), b"99\r\n" + half, die=True)
    async with nodes(dying, act) as (client, made):
        await client.post(path, ASKS)
        answer = await client.answer()
        assert (answer.body, answer.whole) == (b"".join((*first, *shown)), True)
        assert [failure.kind for failure in made.failures] == [FailureKind.RESET]
        assert made.kept.data == answer.body
        assert b'{"role":"assistant","content":"01"}' in bodies[0]
        told = usage.counted(usage.read(made.report.final), made.report.chunks)
        assert (told.prompt_tokens, told.completion_tokens, made.report.chunks) == (7, 3, 3)


async def test_an_answer_may_break_again_and_again() -> None:
    lines = [line.replace(b'"%d"' % n, b'"%d"' % n) for n, line in enumerate(LINES)]
    dying = [says(head(NDJSON), chunk(line), b"99\r\n{", die=True) for line in lines]
    async with nodes(*dying, says(head(NDJSON), chunk(LAST_OF_ONE), END)) as (client, made):
        await client.post("/api/chat", ASKS)
        answer = await client.answer()
        final = LAST_OF_ONE.replace(b":9", b":6").replace(b'"eval_count":1', b'"eval_count":4')
        assert answer.body == b"".join((*lines, final))
        assert made.progress == sorted(set(made.progress)), "each brought something new"
        assert made.seen == [b"".join(lines[: n + 1]) for n in range(3)]


async def test_a_death_before_anything_new_is_no_progress() -> None:
    dying = says(head(NDJSON), b"99\r\n{", die=True)
    begun = says(head(NDJSON), chunk(LINES[0]), die=True)
    async with nodes(begun, dying, dying) as (client, made):
        await client.post("/api/chat", ASKS)
        answer = await client.answer()
        assert error_of("/api/chat", answer.body.removeprefix(LINES[0])) == "gone"
        assert (made.progress, made.report.ending) == ([made.progress[0]] * 3, Ending.BROKEN)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 500 X\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 404 X\r\nContent-Type: application/x-ndjson\r\nContent-Length: 2\r\n\r\n{}",
        OK + b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
        head(SSE) + END,
        head(NDJSON, "Content-Encoding: zstd") + END,
    ],
)
async def test_what_is_no_such_stream_is_refused_before_any_of_it_is_shown(answer: bytes) -> None:
    begun = says(head(NDJSON), chunk(LINES[0]), b"99\r\n{", die=True)
    ends = says(head(NDJSON), chunk(LAST_OF_ONE), END)
    async with nodes(begun, says(answer), ends) as (client, made):
        await client.post("/api/chat", ASKS)
        body = (await client.answer()).body
        assert body.startswith(LINES[0] + b'{"message":{"content":""},"done":true')
        assert made.failures[1].kind is FailureKind.ASTRAY
        assert re.fullmatch("answered [0-9]+ instead of going on", made.failures[1].detail)


async def test_a_last_record_without_a_line_end_follows_on_too() -> None:
    begun = says(head(NDJSON), chunk(LINES[0]), die=True)
    ends = says(head(NDJSON), chunk(LAST_OF_ONE[:-1]), END)
    async with nodes(begun, ends) as (client, made):
        await client.post("/api/chat", ASKS)
        body = (await client.answer()).body
        assert json.loads(body.split(b"\n")[1])["eval_count"] == 2
        assert usage.read(made.report.final).completion_tokens == 2


async def test_an_answer_that_lacks_only_its_end_needs_no_other_node() -> None:
    said = (*FIRST, *SHOWN_NEXT)
    async with nodes(says(head(SSE), *map(chunk, (*said, COUNTS)), die=True)) as (client, made):
        await client.post("/v1/chat/completions", ASKS)
        answer = await client.answer()
        assert (answer.body, answer.whole) == (b"".join((*said, DONE)), True)
        assert made.seen == [b"".join(said)], "what is withheld is not kept"
        told = usage.read(made.report.final)
        assert (told.completion_tokens, made.report.ending) == (1, Ending.OK)


async def test_counts_that_a_dead_node_told_are_not_those_of_the_next() -> None:
    """A node may tell them before it ends its text: those of the one that ends it count."""
    first = says(head(SSE), *map(chunk, (*FIRST, COUNTS)), die=True)
    then = says(head(SSE), *map(chunk, (*NEXT, COUNTS, DONE)), END)
    async with nodes(first, then) as (client, made):
        await client.post("/v1/chat/completions", ASKS)
        assert (await client.answer()).body == b"".join((*FIRST, *SHOWN_NEXT, DONE))
        assert usage.read(made.report.final) == usage.Usage(7, 3)


@pytest.mark.parametrize(
    "pieces",
    [
        [head(NDJSON), chunk(b'{"x":"' + b"y" * 200)],
        [head(NDJSON, "Content-Encoding: zstd"), chunk(b"\x28\xb5\x2f\xfd")],
        [head("application/json"), chunk(b"y" * 20_000)],
    ],
    ids=["a record above the limit", "a compressed stream", "no stream"],
)
async def test_what_has_no_records_is_not_kept(pieces: list[bytes]) -> None:
    async with nodes(says(*pieces, die=True), record_bytes=120) as (client, made):
        await client.post("/api/chat", ASKS)
        assert not (await client.answer()).whole
        assert (made.kept.lost, made.kept.data) == (True, b"")


async def test_a_record_above_the_limit_passes_unstitched() -> None:
    long = b'{"x":"' + b"y" * 200 + b'"}\n'
    begun = says(head(NDJSON), chunk(LINES[0]), die=True)
    then = says(head(NDJSON), *(chunk(long[at : at + 60]) for at in range(0, 240, 60)),
                chunk(LAST_OF_ONE), END)  # fmt: skip
    async with nodes(begun, then, record_bytes=120) as (client, made):
        await client.post("/api/chat", ASKS)
        body = (await client.answer()).body
        assert body.startswith(LINES[0] + long)
        assert json.loads(body.splitlines()[-1])["eval_count"] == 2
        assert made.kept.lost
