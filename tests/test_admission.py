"""Too much at once: what is refused is told so and may come again, what was taken goes on."""

import asyncio
import contextlib
import gc
import json
import resource
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from router import admission, answers, downstream
from router.admission import Held, Room, Rooms
from router.core.dialect import Family
from router.downstream import Connection, Request, Server
from router.errors import ClientError
from router.keep import Keep
from router.sim import Fault, FaultKind, SimNode
from tests.process import Process, settings, started, write
from tests.rig import MODEL, Answer, Rig, Talk, rig, spec, talk
from tests.test_downstream import CHAT, GET_TAGS, LOOPS, NewLoop, still_works
from tests.test_gate import errors, message

PARALLEL = 50


async def ends_clean(client: Talk) -> bool:
    """The connection ends, and without a reset."""
    with contextlib.suppress(ConnectionError):
        return await client.reader.read() == b""
    return False


def says_later(answer: Answer) -> bool:
    return (answer.status, answer.header("Retry-After")) == (503, "1")


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def together(count: int, act: Callable[[], Awaitable[Any]]) -> Counter[Any]:
    """Do something `count` times, some at once; how it went, counted."""
    seen: Counter[Any] = Counter()

    async def some() -> None:
        for _ in range(count // PARALLEL):
            seen[await act()] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(PARALLEL):
            group.create_task(some())
    return seen


# How descriptors are shared out


@given(st.integers(1, 1 << 20), st.integers(64, 1 << 21))
def test_no_more_descriptors_are_given_out_than_there_are(wanted: int, there: int) -> None:
    rooms = Rooms.of(wanted, there)
    clients, admins = rooms.clients, rooms.admins
    assert 0 < clients.served <= wanted
    others = clients.told + clients.backlog + admins.served + admins.told + admins.backlog
    assert 2 * clients.served + others <= there
    assert clients.served in (wanted, (there - min(there // 4, admission._SPARE_MAX)) // 2)


@pytest.mark.parametrize(
    ("there", "served", "told", "admins", "backlog"),
    [
        (256, 96, 16, 4, 32),
        (1024, 384, 64, 16, 128),
        (20_000, 8976, 512, 128, 1024),
        (1 << 20, 16384, 512, 128, 4096),
    ],
)
def test_the_default_is_served_where_there_are_descriptors_for_it(
    there: int, served: int, told: int, admins: int, backlog: int
) -> None:
    rooms = Rooms.of(16384, there)
    assert (rooms.clients.served, rooms.clients.told) == (served, told)
    assert (rooms.admins.served, rooms.clients.backlog) == (admins, backlog)


# Connections


async def _one_too_many() -> None:
    async with rig(limits={"max_connections": 2}) as r, talk(r.url) as first, talk(r.url) as second:
        assert await still_works(first)
        assert await still_works(second)
        async with talk(r.url) as third:
            await third.post("/api/chat", CHAT)
            answer = await third.answer()
            assert says_later(answer)
            assert answer.header("Connection") == "close"
            assert answer.header("Content-Type") == "application/json; charset=utf-8"
            assert json.loads(answer.body) == {"error": "too many connections: try again later"}
            assert await ends_clean(third)
        assert await still_works(first), "who was there before notices nothing"
        first.leave()
        await r.until(lambda: not r.app._server.full)
        async with talk(r.url) as later:
            assert await still_works(later)
        assert r.app.refusals["connections"] == 1
        assert not errors(r)


@LOOPS
def test_a_connection_too_many_is_told_to_come_back(loop: NewLoop) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(_one_too_many())


@contextlib.asynccontextmanager
async def serving(
    handler: Callable[[Request], Awaitable[web.StreamResponse]], **limits: Any
) -> AsyncIterator[tuple[Server, str]]:
    """A server without a router, and its url."""
    server = Server(handler, max_header_bytes=8192, head_timeout_s=30, **limits)
    runner = web.ServerRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield server, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def _never(request: Request) -> web.StreamResponse:
    raise AssertionError


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - nothing tells of a change
        await asyncio.sleep(0)


async def _sends_on(room: Room) -> None:
    async with serving(_never, room=room) as (server, url), talk(url) as client:
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8000000\r\n\r\n"
        await client.send(head, b"x" * 1_000_000)
        assert says_later(await client.answer())
        for _ in range(7):  # it looks at no answer before all is sent, as many clients do
            await client.send(b"x" * 1_000_000)
        assert await ends_clean(client)
        client.writer.close()
        await until(lambda: not server.surplus)


@LOOPS
def test_who_sends_on_after_a_refusal_can_still_read_it(loop: NewLoop) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(_sends_on(Room(0)))


async def test_who_sends_without_end_is_cut() -> None:
    room = Room(0, linger_bytes=1_000_000)
    async with serving(_never, room=room) as (server, url), talk(url) as client:
        with contextlib.suppress(ConnectionError):
            while not client.reader.at_eof():
                await client.send(b"x" * 100_000)
        await until(lambda: not server.surplus)


@pytest.mark.parametrize("sent", [b"", b"POST / HTTP/1.1\r\n"], ids=["nothing", "a part"])
async def test_who_neither_sends_nor_leaves_is_cut(sent: bytes) -> None:
    async with serving(_never, room=Room(0, linger_s=0.02)) as (server, url), talk(url) as client:
        await client.send(sent)
        assert (await client.rest())[9:12] == (b"503" if sent else b"")
        await until(lambda: not server.surplus)


async def test_beyond_those_who_are_told_with_patience_all_are_told_at_once() -> None:
    async with serving(_never, room=Room(0, told=1)) as (server, url), talk(url), talk(url) as more:
        answer = await more.answer()
        assert says_later(answer)
        assert await ends_clean(more)
        assert len(server.surplus) == 1
        assert server.refusals == {"connections": 2}


async def test_who_is_being_told_does_not_hold_up_the_end() -> None:
    async with serving(_never, room=Room(0)) as (server, url), talk(url) as client:
        await until(lambda: bool(server.surplus))
        async with asyncio.TaskGroup() as group:
            group.create_task(client.rest())
            server.pre_shutdown()
        assert not server.surplus


async def test_thousands_of_refused_connections_leave_nothing_behind() -> None:
    async with rig(limits={"max_connections": 1}) as r, talk(r.url) as client:
        assert await still_works(client)

        async def refused() -> int:
            async with talk(r.url) as more:
                await more.post("/api/chat", CHAT)
                return (await more.answer()).status

        await together(PARALLEL, refused)
        await r.until(lambda: not r.app._server.surplus)
        before = descriptors()
        assert await together(3000, refused) == {503: 3000}
        await r.until(lambda: not r.app._server.surplus)
        assert descriptors() <= before
        gc.collect()
        assert sum(isinstance(one, Connection) for one in gc.get_objects()) < 10
        assert r.app.refusals["connections"] == 3000 + PARALLEL
        assert await still_works(client)
        client.leave()
        await r.until(lambda: not r.app._server.full)
        said = [line["event"] for line in r.lines if line["event"].startswith("connections")]
        assert said == ["connections refused", "connections accepted again"]
        assert not errors(r)


async def test_operators_get_in_while_clients_fill_everything() -> None:
    async with rig(limits={"max_connections": 20}) as r, contextlib.AsyncExitStack() as stack:
        for _ in range(700):  # more than are told with patience
            await stack.enter_async_context(talk(r.url))
        await r.until(lambda: r.app.refusals["connections"] == 680)
        assert len(r.app._server.surplus) == admission._TOLD_MAX
        assert "ollamux_node_up" in await r.metrics()
        async with r.session.get(f"{r.admin}/status") as answer:
            assert answer.status == 200
        await stack.aclose()
        await r.until(lambda: not r.app._server.full)
        async with r.chat() as answer:
            assert answer.status == 200


async def test_a_reload_changes_how_many_there_may_be() -> None:
    async with rig(limits={"max_connections": 1}) as r, talk(r.url) as client:
        assert await still_works(client)
        async with talk(r.url) as more:
            await more.send(GET_TAGS)
            assert says_later(await more.answer())
        config = r.app.config
        limits = config.limits.model_copy(update={"max_connections": 2})
        r.app.reconfigure(config.model_copy(update={"limits": limits}))
        async with talk(r.url) as more:
            assert await still_works(more)


# A process with few descriptors

FEW = 256


@contextlib.asynccontextmanager
async def pressed(path: Path, node: SimNode) -> AsyncIterator[tuple[Process, str, str]]:
    """A router with few descriptors: its process, and where clients and operators find it."""
    write(path, settings(node))
    async with asyncio.timeout(60), started("serve", "--config", str(path)) as process:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (FEW, FEW))
        line = await process.logged("listening")
        await process.logged("ready")
        yield process, line["clients"][0], line["admin"][0]
        assert "Traceback" not in process.text
        said = [line["event"] for line in process.log if line["event"] != "request"]
        assert len(said) < 10, "what is refused costs no line each"


def opened(process: Process) -> int:
    return len(list(Path(f"/proc/{process.pid}/fd").iterdir()))


async def _flood(url: str, stack: contextlib.AsyncExitStack, count: int) -> Counter[int]:
    """Connect, ask, and stay; what each was answered, 0 for a connection cut without a word."""

    async def ask() -> int:
        try:
            client = await stack.enter_async_context(talk(url))
            await client.send(GET_TAGS)
            return (await client.answer()).status
        except (ConnectionError, asyncio.IncompleteReadError):
            return 0

    return await together(count, ask)


async def test_a_process_with_few_descriptors_stays_in_order(tmp_path: Path) -> None:
    async with (
        SimNode(spec()) as node,
        pressed(tmp_path / "router.yaml", node) as (process, url, admin),
        talk(url) as client,
        contextlib.AsyncExitStack() as stack,
    ):
        assert await still_works(client)
        quiet = opened(process)
        seen = await _flood(url, stack, 1000)
        assert seen[200] == Rooms.of(16384, FEW).clients.served - 1
        assert seen[503] > 0
        assert opened(process) < FEW
        async with talk(admin) as operator:
            await operator.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await operator.answer()).status == 200
        await client.post("/api/chat", CHAT)
        assert (await client.answer()).status == 200, "a node can still be reached"
        await stack.aclose()
        await process.logged("connections accepted again")
        async with talk(url) as later:
            assert await still_works(later)
        while opened(process) > quiet + 2:
            async with talk(admin) as operator:
                await operator.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                await operator.answer()


async def test_a_listener_outlives_the_last_descriptor(tmp_path: Path) -> None:
    async with (
        SimNode(spec()) as node,
        pressed(tmp_path / "router.yaml", node) as (process, url, _),
        talk(url) as client,
        contextlib.AsyncExitStack() as stack,
    ):
        assert await still_works(client)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (opened(process), FEW))
        assert await _flood(url, stack, 200) == {0: 200}
        assert await still_works(client)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (FEW, FEW))
        async with talk(url) as later:
            assert await still_works(later)


# Requests in flight


@contextlib.asynccontextmanager
async def busy(most: int = 1) -> AsyncIterator[Rig]:
    """A router that answers as many requests as it may."""
    node, limits = spec(num_parallel=most, warm=(MODEL,)), {"max_in_flight": most}
    async with rig(node, limits=limits) as r, contextlib.AsyncExitStack() as stack:
        r.nodes[0].fault = Fault(FaultKind.HANG, times=most)
        clients = [await stack.enter_async_context(talk(r.url)) for _ in range(most)]
        for client in clients:
            await client.post("/api/chat", CHAT)
        await r.nodes[0].until(lambda: r.nodes[0].in_flight == most)
        yield r
        r.nodes[0].release()
        for client in clients:
            assert (await client.answer()).status == 200
        assert r.app._gate.active == 0
        async with r.chat() as answer:
            assert answer.status == 200
        assert not errors(r)


@pytest.mark.parametrize(
    ("path", "family"),
    [
        ("/api/chat", Family.NATIVE),
        ("/api/embed", Family.NATIVE),
        ("/api/pull", Family.NATIVE),
        ("/@n1/api/chat", Family.NATIVE),
        ("/v1/chat/completions", Family.OPENAI),
        ("/v1/messages", Family.ANTHROPIC),
    ],
)
async def test_a_request_too_many_is_told_to_come_back_in_its_own_dialect(
    path: str, family: Family
) -> None:
    async with busy() as r, talk(r.url) as client:
        await client.post(path, CHAT)
        answer = await client.answer()
        assert says_later(answer)
        told = "too many requests are being answered: try again later"
        assert message(family, answer.body) == told
        assert answer.header("X-Ollamux-Reason") == "in_flight"
        assert await still_works(client), "its body was there, so HTTP allows it"
        assert len(r.nodes[0].calls("/api/chat")) == 1
        line = r.requests[0]
        assert (line["outcome"], line["status"], line["error"]) == ("rejected", 503, told)
        assert r.app.refusals == {"connections": 0, "in_flight": 1, "buffered": 0}


@pytest.mark.parametrize("path", ["/", "/api/version", "/api/tags", "/api/ps", "/v1/models"])
async def test_what_takes_no_node_is_answered_meanwhile(path: str) -> None:
    async with busy() as r, r.session.get(r.url + path) as answer:
        assert answer.status == 200


@pytest.mark.parametrize("chunked", [False, True])
async def test_the_body_of_a_request_too_many_is_dropped_as_it_comes(chunked: bool) -> None:
    async with busy() as r, talk(r.url) as client:
        framing = "Transfer-Encoding: chunked" if chunked else "Content-Length: 8000000"
        await client.send(
            f"POST /api/chat HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n".encode()
        )
        piece = b"f4240\r\n" + b"x" * 1_000_000 + b"\r\n" if chunked else b"x" * 1_000_000
        await client.send(piece)
        answer = await client.answer()
        assert says_later(answer)
        assert answer.header("Connection") == "close"
        for _ in range(7):
            await client.send(piece)
        await client.send(b"0\r\n\r\n" if chunked else b"")
        assert await ends_clean(client)


async def test_a_client_that_waits_for_the_word_is_not_asked_for_its_body() -> None:
    async with busy() as r, talk(r.url) as client:
        head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
        await client.send(head + b"Expect: 100-continue\r\n\r\n")
        answer = await client.answer()
        assert says_later(answer)
        assert answer.header("Connection") == "close"


async def test_thousands_of_refused_requests_leave_nothing_behind() -> None:
    async with busy(3) as r:

        async def refused() -> int:
            async with r.chat() as answer:
                return int(answer.status)

        await together(PARALLEL, refused)
        before = descriptors()
        assert await together(3000, refused) == {503: 3000}
        assert descriptors() <= before
        assert r.app._gate.active == 3
        assert r.app.refusals["in_flight"] == 3000 + PARALLEL


# Bodies in memory


def _reading(
    memory: Keep, limit: int = 1 << 20, stall_s: float | None = None
) -> Callable[[Request], Awaitable[web.StreamResponse]]:
    """A handler that reads a body, and answers with its length."""

    async def handler(request: Request) -> web.StreamResponse:
        held = Held(memory)
        try:
            body = await downstream.body(request, limit, stall_s, held)
            assert held.bytes == len(body)
            return web.Response(text=str(len(body)))
        except ClientError as error:
            answer = answers.error(Family.NATIVE, error.status, error.message)
            answer.force_close()
            return answer
        finally:
            held.close()

    return handler


def head(length: int) -> bytes:
    return b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % length


async def test_many_slow_clients_hold_no_more_than_the_limit_together() -> None:
    memory, half = Keep(200_000), b"x" * 10_000
    async with (
        serving(_reading(memory)) as (_, url),
        contextlib.AsyncExitStack() as stack,
    ):
        clients = [await stack.enter_async_context(talk(url)) for _ in range(60)]
        waiting = []
        for client in clients:
            before = memory.bytes
            await client.send(head(2 * len(half)), half)
            if before + len(half) > 200_000:
                answer = await client.answer()
                assert says_later(answer)
                assert b"held in memory" in answer.body
                assert memory.bytes <= 200_000
                await client.send(half)
                assert await ends_clean(client)
            else:
                await until(lambda at=before: memory.bytes == at + len(half))  # type: ignore[misc]
                waiting.append(client)
        assert len(waiting) == 20
        waiting.pop().leave()
        for client in waiting:
            await until(lambda: memory.bytes <= 200_000 - len(half))
            await client.send(half)
            assert (await client.answer()).body == b"20000"
        await until(lambda: memory.bytes == 0)


_CHUNKED = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
_CHUNK = b"258\r\n" + b"x" * 600 + b"\r\n"


async def test_a_body_in_chunks_is_counted_too() -> None:
    memory = Keep(1000)
    async with serving(_reading(memory)) as (_, url), talk(url) as first, talk(url) as client:
        await first.send(_CHUNKED + _CHUNK)
        await until(lambda: memory.bytes == 600)
        await client.send(_CHUNKED + _CHUNK)
        assert says_later(await client.answer())
        await client.send(b"0\r\n\r\n")
        assert await ends_clean(client)
        await first.send(b"0\r\n\r\n")
        assert (await first.answer()).body == b"600"
        await until(lambda: memory.bytes == 0)


async def test_a_body_that_would_never_fit_is_not_told_to_try_again() -> None:
    memory = Keep(1000)
    async with serving(_reading(memory)) as (_, url), talk(url) as client:
        await client.send(_CHUNKED + _CHUNK)
        await until(lambda: memory.bytes == 600)
        await client.send(_CHUNK)
        answer = await client.answer()
        assert answer.status == 413
        assert "limits.max_buffered_bytes" in json.loads(answer.body)["error"]
        assert answer.header("Retry-After") is None
        await client.send(b"0\r\n\r\n")
        assert await ends_clean(client)
        assert memory.bytes == 0


@pytest.mark.parametrize("end", ["left", "too large", "stalled", "stopped"])
async def test_what_was_held_is_given_back_whatever_the_end(end: str) -> None:
    memory = Keep(10_000)
    stall_s = 0.02 if end == "stalled" else None
    async with serving(_reading(memory, 1000, stall_s)) as (server, url), talk(url) as client:
        await client.send(head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
        await client.send(b"258\r\n" + b"x" * 600 + b"\r\n")
        await until(lambda: memory.bytes == 600)
        if end == "left":
            client.leave()
        elif end == "too large":
            await client.send(b"258\r\n" + b"x" * 600 + b"\r\n")
            assert (await client.answer()).status == 413
        elif end == "stalled":
            assert (await client.answer()).status == 408
        else:
            await server.shutdown(0.01)
        await until(lambda: memory.bytes == 0)


async def test_thousands_of_bodies_too_many_leave_nothing_behind() -> None:
    memory = Keep(30_000)
    async with serving(_reading(memory)) as (_, url), talk(url) as client:
        await client.send(head(40_000), b"x" * 30_000)
        await until(lambda: memory.bytes == 30_000)

        async def refused() -> int:
            async with talk(url) as more:
                await more.post("/api/chat", CHAT)
                return (await more.answer()).status

        await together(PARALLEL, refused)
        before = descriptors()
        assert await together(2000, refused) == {503: 2000}
        assert descriptors() <= before
        assert memory.bytes == 30_000


@pytest.mark.parametrize(
    ("path", "family"),
    [
        ("/api/chat", Family.NATIVE),
        ("/api/pull", Family.NATIVE),
        ("/v1/chat/completions", Family.OPENAI),
        ("/v1/messages", Family.ANTHROPIC),
    ],
)
async def test_bodies_that_are_too_much_together_are_refused(path: str, family: Family) -> None:
    start = head(2000).replace(b"/api/chat", path.encode())
    async with (
        rig(limits={"max_buffered_bytes": 5000}) as r,
        contextlib.AsyncExitStack() as stack,
    ):
        keep = r.app._means.keep
        clients = [await stack.enter_async_context(talk(r.url)) for _ in range(5)]
        for number, client in enumerate(clients, 1):
            await client.send(start, b"x" * 1000)
            await r.until(lambda at=1000 * number: keep.bytes == at)  # type: ignore[misc]
        async with talk(r.url) as more:
            await more.send(start, b"x" * 1000)
            answer = await more.answer()
            assert says_later(answer)
            assert message(family, answer.body).startswith("too much of requests is held")
            assert answer.header("X-Ollamux-Reason") == "buffered"
            assert answer.header("Connection") == "close"
            await more.send(b"x" * 1000)
            assert await ends_clean(more)
        line = r.requests[0]
        assert (line["outcome"], line["status"]) == ("rejected", 503)
        async with talk(r.url) as small:
            await small.post("/api/chat", CHAT)
            assert (await small.answer()).status == 200  # it is there, and as good as answered
            for client in clients:
                client.leave()
            await r.until(lambda: keep.bytes == 0)
            await small.post("/api/chat", CHAT)
            assert (await small.answer()).status == 200
        assert keep.bytes == 0
        assert r.app.refusals["buffered"] == 1
        assert not errors(r)


async def test_a_body_is_held_until_its_request_is_answered() -> None:
    async with rig() as r, talk(r.url) as client:
        keep = r.app._means.keep
        r.nodes[0].fault = Fault(FaultKind.HANG, times=1)
        large = CHAT + b" " * 32_000
        await client.post("/api/chat", large)
        await r.nodes[0].until(lambda: r.nodes[0].in_flight == 1)
        assert keep.bytes == len(large)
        r.nodes[0].release()
        assert (await client.answer()).status == 200
        assert keep.bytes == 0


async def test_what_a_compressed_body_unpacks_to_is_held_too() -> None:
    messages = [{"role": "user", "content": "y" * 500_000}]
    plain = json.dumps({"model": MODEL, "messages": messages}).encode()
    packed = zstd.compress(plain)
    post = b"Content-Encoding: zstd\r\nContent-Length: %d\r\n\r\n%b" % (len(packed), packed)
    start = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    async with rig(limits={"max_buffered_bytes": 800_000}) as r, talk(r.url) as client:
        keep = r.app._means.keep
        r.nodes[0].fault = Fault(FaultKind.HANG, times=1)
        await client.send(start + post)
        await r.nodes[0].until(lambda: r.nodes[0].in_flight == 1)
        assert keep.bytes == len(packed) + len(plain)
        async with talk(r.url) as more:
            await more.send(start + post)
            assert says_later(await more.answer())
        r.nodes[0].release()
        assert (await client.answer()).status == 200
        assert keep.bytes == 0


# When to come back


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(("retry_s", "told"), [(0.0, "1"), (0.2, "1"), (1.5, "2"), (30.0, "30")])
def test_a_later_try_is_told_in_whole_seconds(status: int, retry_s: float, told: str) -> None:
    answer = answers.error(Family.OPENAI, status, "later", retry_s=retry_s)
    assert answer.headers["Retry-After"] == told


@pytest.mark.parametrize("status", [400, 404, 413, 500, 502, 504])
def test_where_no_later_try_helps_none_is_told(status: int) -> None:
    assert "Retry-After" not in answers.error(Family.NATIVE, status, "no").headers


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
async def test_a_503_for_want_of_nodes_says_when_to_come_back(path: str) -> None:
    async with rig() as r, talk(r.url) as client:
        await r.nodes[0].refuse()
        await r.look()
        await client.post(path, CHAT)
        assert says_later(await client.answer())


async def test_a_nodes_own_503_to_a_change_passes_as_it_is() -> None:
    async with rig() as r, talk(r.url) as client:
        r.nodes[0].fault = Fault(FaultKind.STATUS, path="/api/pull", status=503)
        await client.post("/api/pull", CHAT)
        answer = await client.answer()
        assert (answer.status, answer.header("Retry-After")) == (503, None)
