"""What clients may send that is no good request, and what becomes of their connection."""

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
import uvloop
from aiohttp import HttpVersion11, web
from aiohttp.test_utils import make_mocked_request

from router import downstream
from router.downstream import Request, Server
from router.errors import ClientError
from router.sim import Fault, FaultKind
from tests.rig import MODEL, Rig, Talk, rig, talk

GET_TAGS = b"GET /api/tags HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHAT = b'{"model":"%b","messages":[{"role":"user","content":"hi"}],"stream":false}' % MODEL.encode()
SECRET = "Zq7-planted"


def errors(r: Rig) -> list[dict[str, Any]]:
    """What was logged at error level."""
    return [line for line in r.lines if line["level"] in ("error", "critical")]


async def still_works(client: Talk) -> bool:
    """The connection carries another request."""
    await client.send(GET_TAGS)
    try:
        return (await client.answer()).status == 200
    except asyncio.IncompleteReadError:
        return False


LONG = "a" * 70_000
LOCAL = "/ HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (f"{SECRET}\r\n\r\n", 400),
        (f"GET /{SECRET} HTTP/1.1\r\nno colon {SECRET}\r\n\r\n", 400),
        (f"GET / HTTP/1.1\r\nHost: localhost\r\n{SECRET} : x\r\n\r\n", 400),
        (f"G\x00T /{SECRET} HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (f"GET http://[{SECRET} HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (f"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1{SECRET}\r\n\r\n", 400),
        (f"POST {LOCAL}Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx", 400),
        (f"POST {LOCAL}Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (f"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: {SECRET}{LONG}\r\n\r\n", 431),
        (f"GET /{SECRET}{LONG} HTTP/1.1\r\nHost: localhost\r\n\r\n", 431),
        (f"GET /{SECRET}\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (f"GET /?{SECRET}\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        ("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ],
    ids=[
        "no request line", "no colon in a header", "blank before the colon", "control character",
        "broken absolute url", "negative length", "two lengths", "length and chunked",
        "header above the limit", "url above the limit", "path not ascii", "query not ascii",
        "http/2", "tls",
    ],
)  # fmt: skip
async def test_what_is_not_http_gets_plain_text_without_an_echo(sent: str, status: int) -> None:
    async with rig() as r, talk(r.url) as client:
        await client.send(sent.encode("latin-1"))
        answer = await client.answer()
        assert (answer.version, answer.status) == ("HTTP/1.1", status)
        assert answer.header("Content-Type") == "text/plain; charset=utf-8"
        assert answer.header("Server") is None
        assert answer.body.startswith(b"%d " % status)
        assert len(answer.body) < 80
        assert SECRET not in answer.body.decode()
        assert await client.rest() == b"", "the connection ends: nothing after this is readable"
        assert not errors(r)
        assert SECRET not in r.output.getvalue()


async def test_header_fields_up_to_64_kib_are_taken() -> None:
    async with rig() as r, talk(r.url) as client:
        await client.post("/api/chat", CHAT, f"X-Long: {'a' * 65_000}")
        assert (await client.answer()).status == 200
        assert r.nodes[0].calls("/api/chat")[0].header("X-Long") == "a" * 65_000


async def test_all_header_fields_together_have_the_same_limit() -> None:
    async with rig() as r, talk(r.url) as client:
        await client.post("/api/chat", CHAT, *(f"X-{n}: {'a' * 30_000}" for n in range(3)))
        assert (await client.answer()).status == 431
        assert not r.nodes[0].calls("/api/chat")


NewLoop = Callable[[], asyncio.AbstractEventLoop]
# With the second loop, bytes can arrive between a head and the start of its handler.
LOOPS = pytest.mark.parametrize(
    "loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)
BROKEN = b"zz\r\nhello\r\n0\r\n\r\n", b"5\r\nhelloX\r\n0\r\n\r\n"


async def _break_chunking(chunks: bytes, begun: bytes, turns: int) -> None:
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with rig() as r, talk(r.url) as client:
        await client.send(head + begun)
        for _ in range(turns):
            await asyncio.sleep(0)
        await client.send(chunks)
        answer = await client.answer()
        assert answer.status == 400
        assert b"hello" not in answer.body
        assert await client.rest() == b""
        assert not errors(r)
        assert not r.nodes[0].calls("/api/chat")
        assert r.app._gate.active == 0


@LOOPS
@pytest.mark.parametrize("turns", [0, 1, 2, 9])
@pytest.mark.parametrize("begun", [b"", b"5\r\nhello\r\n"])
@pytest.mark.parametrize("chunks", BROKEN)
def test_bad_chunking_is_a_400_and_the_end_of_the_connection(
    chunks: bytes, begun: bytes, turns: int, loop: NewLoop
) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(_break_chunking(chunks, begun, turns))


async def test_what_is_not_http_behind_a_good_request_does_not_harm_it() -> None:
    async with rig() as r, talk(r.url) as client:
        r.nodes[0].fault = Fault(FaultKind.HANG, times=1)
        await client.post("/api/chat", CHAT)
        await r.nodes[0].until(lambda: r.nodes[0].in_flight == 1)
        await client.send(b"rubbish\r\n\r\n")
        await r.until(lambda: any(c.broken for c in r.app._server.connections))  # type: ignore[attr-defined]
        r.nodes[0].release()
        assert (await client.answer()).status == 200
        assert (await client.answer()).status == 400
        assert await client.rest() == b""


async def test_a_good_chunked_body_arrives_with_its_length() -> None:
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with rig() as r, talk(r.url) as client:
        await client.send(head)
        for at in range(0, len(CHAT), 7):
            await client.send(b"%x\r\n%b\r\n" % (len(CHAT[at : at + 7]), CHAT[at : at + 7]))
        await client.send(b"0\r\n\r\n")
        assert (await client.answer()).status == 200
        seen = r.nodes[0].calls("/api/chat")[0]
        assert seen.body == CHAT
        assert seen.header("Content-Length") == str(len(CHAT))
        assert seen.header("Transfer-Encoding") is None
        assert await still_works(client)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("path", "field"),
    [("/api/chat", "error"), ("/v1/chat/completions", "error"), ("/v1/messages", "error")],
)
async def test_a_body_above_the_limit_is_413_in_the_callers_dialect(
    path: str, field: str, chunked: bool
) -> None:
    async with rig(limits={"max_body_bytes": 100}) as r, talk(r.url) as client:
        if chunked:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            await client.send(head.encode(), b"c8\r\n" + b"y" * 200 + b"\r\n0\r\n\r\n")
        else:
            await client.post(path, b"y" * 101)
        answer = await client.answer()
        assert answer.status == 413
        assert b"the limit is 100 bytes" in answer.body
        assert b'"%b"' % field.encode() in answer.body
        assert not r.nodes[0].calls(path)
        assert await still_works(client), "the rest of the body was read, so HTTP allows it"


async def test_expect_continue_is_answered_before_the_body_comes() -> None:
    async with rig() as r, talk(r.url) as client:
        head = f"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(CHAT)}\r\n"
        await client.send(head.encode() + b"Expect: 100-continue\r\n\r\n")
        assert (await client.head())[1] == 100
        await client.send(CHAT)
        assert (await client.answer()).status == 200
        assert r.nodes[0].calls("/api/chat")[0].header("Expect") is None


async def test_expect_continue_is_not_asked_for_a_body_that_is_too_large() -> None:
    async with rig(limits={"max_body_bytes": 100}) as r, talk(r.url) as client:
        head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 101\r\n"
        await client.send(head + b"Expect: 100-continue\r\n\r\n")
        assert (await client.head())[1] == 413


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET http://localhost/api/version?x=1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        (b"GET /%61pi/version HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET /api/../api/tags HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    ],
)
async def test_strange_targets_are_read_or_refused(sent: bytes, status: int) -> None:
    async with rig() as r, talk(r.url) as client:
        await client.send(sent)
        assert (await client.answer()).status == status
        assert not errors(r)
        assert await still_works(client)


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with rig() as r, talk(r.url) as client:
        await client.send(GET_TAGS + b"GET /nope HTTP/1.1\r\nHost: localhost\r\n\r\n" + GET_TAGS)
        assert [(await client.answer()).status for _ in range(3)] == [200, 404, 200]
        await client.post("/api/chat", CHAT)
        await client.post("/api/chat", CHAT)
        first, second = await client.answer(), await client.answer()
        assert (first.status, second.status) == (200, 200)


async def test_http_1_0_gets_a_body_that_ends_with_the_connection() -> None:
    async with rig() as r, talk(r.url) as client:
        await client.post("/api/chat", CHAT.replace(b"false", b"true"), version="1.0")
        answer = await client.answer()
        assert answer.version == "HTTP/1.0"
        assert answer.header("Transfer-Encoding") is None
        assert answer.body.endswith(b"}\n")
        assert b'"done":true' in answer.body


async def test_an_upgrade_that_nobody_asked_for_is_ignored() -> None:
    head = b"GET /api/tags HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\n"
    async with rig() as r, talk(r.url) as client:
        await client.send(head + b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAA\r\n\r\n")
        assert (await client.answer()).status == 200


@pytest.mark.parametrize(
    "partial", [b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"POST /api/chat HT"]
)
@pytest.mark.parametrize("before", [b"", GET_TAGS], ids=["first", "later"])
async def test_a_head_that_is_never_whole_ends_its_connection(
    before: bytes, partial: bytes
) -> None:
    async with rig(timeouts={"head_timeout_s": 0.02}) as r, talk(r.url) as client:
        if before:
            await client.send(before)
            await client.answer()
        await client.send(partial[:-1])
        for _ in range(4):
            await asyncio.sleep(0)
        await client.send(partial[-1:])  # one byte now and then does not help
        assert await client.rest() == b""
        assert not errors(r)


async def test_a_query_that_could_end_its_line_is_refused() -> None:
    """Nothing of the sort passes aiohttp's parser today."""
    head = SimpleNamespace(
        raw_headers=(),
        raw_path="/x?a\x01b",
        server=SimpleNamespace(max_header_bytes=9),
        version=HttpVersion11,
        headers={},
    )
    with pytest.raises(ClientError, match="invalid query"):
        downstream.target(cast(Request, head))


async def _outlast_the_limit(turns: int) -> None:
    async with rig(timeouts={"head_timeout_s": 0.02}) as r, talk(r.url) as client:
        r.nodes[0].fault = Fault(FaultKind.HANG, times=1)
        head = f"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(CHAT)}\r\n\r\n"
        await client.send(head.encode())
        for _ in range(turns):
            await asyncio.sleep(0)
        await client.send(CHAT)
        await r.nodes[0].until(lambda: r.nodes[0].in_flight == 1)
        # A limit that began later has passed: so has any that the first head may have left.
        async with talk(r.url) as late:
            await late.send(b"GET")
            await late.rest()
        r.nodes[0].release()
        assert (await client.answer()).status == 200


@LOOPS
@pytest.mark.parametrize("turns", range(4))
def test_the_limit_of_a_head_ends_with_the_head(turns: int, loop: NewLoop) -> None:
    """Whenever the body follows: it has fallen between the head and the start of its handler."""
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(_outlast_the_limit(turns))


async def test_a_client_that_goes_while_its_body_is_read_leaves_nothing_behind() -> None:
    async with rig() as r, talk(r.url) as client:
        head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
        await client.send(head)
        await r.until(lambda: r.app._gate.active == 1)
        client.leave()
        await r.until(lambda: r.app._gate.active == 0)
        assert [line["outcome"] for line in r.requests] == ["cancelled"]
        assert not errors(r)


async def test_an_answer_to_an_open_connection_is_its_last_once_the_router_stops() -> None:
    async with rig() as r, talk(r.url) as busy, talk(r.url) as client:
        r.nodes[0].fault = Fault(FaultKind.HANG, times=1)
        await busy.post("/api/chat", CHAT)
        await r.nodes[0].until(lambda: r.nodes[0].in_flight == 1)
        assert await still_works(client)
        async with asyncio.TaskGroup() as group:
            group.create_task(r.app.drain())
            await r.until(lambda: r.app._server.closing)
            await client.send(GET_TAGS)
            answer = await client.answer()
            assert (answer.status, answer.header("Connection")) == (200, "close")
            assert await client.rest() == b""
            r.nodes[0].release()
            answer = await busy.answer()
            assert (answer.status, answer.header("Connection")) == (200, "close")


# Without a router around it


async def serving(
    handler: Callable[[Request], Awaitable[web.StreamResponse]],
    act: Callable[[Talk], Awaitable[None]],
) -> None:
    runner = web.ServerRunner(Server(handler, max_header_bytes=8192, head_timeout_s=30))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with talk(f"http://127.0.0.1:{runner.addresses[0][1]}") as client:
            await act(client)
    finally:
        await runner.cleanup()


async def test_a_mistake_of_ours_is_a_plain_500_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def handler(request: Request) -> web.StreamResponse:
        raise RuntimeError("a mistake")

    async def act(client: Talk) -> None:
        await client.send(GET_TAGS)
        answer = await client.answer()
        assert (answer.status, answer.body) == (500, b"500 Internal Server Error")

    await serving(handler, act)
    assert [record.levelname for record in caplog.records] == ["ERROR"]


async def test_a_mistake_of_ours_after_the_head_cuts_the_answer() -> None:
    async def handler(request: Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"begun")
        raise RuntimeError("a mistake")

    async def act(client: Talk) -> None:
        await client.send(GET_TAGS)
        answer = await client.answer()
        assert (answer.status, answer.body, answer.whole) == (200, b"begun", False)

    await serving(handler, act)


async def test_a_client_that_went_as_its_answer_began_is_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def handler(request: Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        response = web.StreamResponse()
        await response.prepare(request)
        return response

    async def act(client: Talk) -> None:
        await client.send(GET_TAGS)
        assert await client.rest() == b""

    await serving(handler, act)
    assert not caplog.records


@pytest.mark.parametrize(
    ("trusted", "peer", "header", "expected"),
    [
        ([], "10.0.0.1", "1.2.3.4", "10.0.0.1"),
        (["10.0.0.0/8"], "10.0.0.1", "1.2.3.4", "1.2.3.4"),
        (["10.0.0.0/8"], "10.0.0.1", "6.6.6.6, 1.2.3.4", "1.2.3.4"),
        (["10.0.0.0/8"], "10.0.0.1", "1.2.3.4, 10.9.9.9", "1.2.3.4"),
        (["10.0.0.0/8"], "10.0.0.1", "10.9.9.9, 10.8.8.8", "10.9.9.9"),
        (["10.0.0.0/8"], "10.0.0.1", None, "10.0.0.1"),
        (["10.0.0.0/8"], "9.9.9.9", "1.2.3.4", "9.9.9.9"),
        (["10.0.0.0/8"], "10.0.0.1", "unknown, <script>", "10.0.0.1"),
        (["fd00::/8"], "fd00::1", "2001:db8::1", "2001:db8::1"),
        (["10.0.0.0/8"], "", "x", ""),
    ],
)
def test_forwarded_addresses_are_believed_from_trusted_peers_only(
    trusted: list[str], peer: str, header: str | None, expected: str
) -> None:
    networks = [ipaddress.ip_network(one) for one in trusted]
    headers = {} if header is None else {"X-Forwarded-For": header}
    request = make_mocked_request("GET", "/", headers).clone(remote=peer)
    assert downstream.client_address(request, networks) == expected


@pytest.mark.parametrize(
    ("given", "taken"),
    [("abc-123", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("", False)],
)
def test_a_clients_id_is_taken_where_it_is_fit(given: str, taken: bool) -> None:
    request = make_mocked_request("GET", "/", {"X-Request-Id": given})
    assert downstream.request_id(request) == (given if taken else None)


@pytest.mark.parametrize("headers", ["", "Origin: http://localhost\r\n"])
async def test_a_request_without_a_host_is_answered(headers: str) -> None:
    async with rig() as r, talk(r.url) as client:
        await client.send(f"GET /api/version HTTP/1.0\r\n{headers}\r\n".encode())
        assert (await client.answer()).status == 200


async def test_a_usual_client_keeps_its_connection() -> None:
    async with rig() as r:
        connector = aiohttp.TCPConnector(limit=1)
        async with aiohttp.ClientSession(connector=connector) as session:
            for _ in range(3):
                async with session.get(f"{r.url}/api/version") as answer:
                    assert (answer.status, answer.headers.get("Server")) == (200, None)
