"""One request in is one request out: what clients and nodes may write so that others take it for
more, or for something else, and what becomes of it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from tests.rig import MODEL, Peer, Talk, rig, scripted, talk

CHAT = b'{"model":"%b","messages":[{"role":"user","content":"hi"}],"stream":false}' % MODEL.encode()
HEAD = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\n"
SIZE = b"%x" % len(CHAT)
LENGTH = b"Content-Length: %d" % len(CHAT)
CHUNKED = b"Transfer-Encoding: chunked"
# Stands behind what is refused: as a request of its own it would be a 404, or reach the node.
BEHIND = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n" + (
    b"POST /api/chat?smuggled HTTP/1.1\r\nHost: localhost\r\n%b\r\n\r\n%b" % (LENGTH, CHAT)
)


def plain(*lines: bytes) -> bytes:
    """A chat request with these header lines and the body as it is."""
    return HEAD + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + CHAT


def chunked(*lines: bytes, size: bytes = SIZE, end: bytes = b"\r\n0\r\n\r\n") -> bytes:
    """A chat request with these header lines and the body as one chunk; `size` is its line."""
    head = HEAD + b"".join(line + b"\r\n" for line in lines or (CHUNKED,))
    return head + b"\r\n" + size + b"\r\n" + CHAT + end


async def statuses(client: Talk) -> list[int]:
    """Of all answers until the router ends the connection."""
    found = []
    with contextlib.suppress(asyncio.IncompleteReadError):
        while True:
            found.append((await client.answer()).status)
    return found


# Clients: what is framed in two ways, or in none

REFUSED = {
    "length and chunked": chunked(b"Content-Length: 3", CHUNKED),
    "chunked and length": chunked(CHUNKED, b"Content-Length: 3"),
    "length and chunked, the length right": plain(LENGTH, CHUNKED),
    "two lengths that agree": plain(LENGTH, LENGTH),
    "a list of lengths": plain(LENGTH + b", " + LENGTH[16:]),
    "a length with a sign": plain(LENGTH.replace(b": ", b": +")),
    "a length in hex": plain(b"Content-Length: 0x" + SIZE),
    "a length with a blank in it": plain(b"Content-Length: 1 0"),
    "a length with an underscore": plain(b"Content-Length: 1_0"),
    "a length past 64 bits": plain(b"Content-Length: 18446744073709551617"),
    "no length": plain(b"Content-Length:"),
    "a length in other digits": plain("Content-Length: \u0663".encode()),
    "chunked, identity": chunked(CHUNKED + b", identity"),
    "identity alone": plain(b"Transfer-Encoding: identity", LENGTH),
    "chunked twice in a line": chunked(CHUNKED + b", chunked"),
    "chunked in two lines": chunked(CHUNKED, CHUNKED),
    "chunked, then identity": chunked(CHUNKED, b"Transfer-Encoding: identity"),
    "identity, then chunked": chunked(b"Transfer-Encoding: identity", CHUNKED),
    "xchunked": chunked(b"Transfer-Encoding: xchunked"),
    "xchunked and a length": plain(b"Transfer-Encoding: xchunked", LENGTH),
    "chunked in quotes": plain(b'Transfer-Encoding: "chunked"', LENGTH),
    "chunked behind a vertical tab": plain(b"Transfer-Encoding: \x0bchunked", LENGTH),
    "a folded coding": chunked(b"Transfer-Encoding:\r\n chunked"),
    "a folded coding and a length": plain(b"Transfer-Encoding:\r\n chunked", LENGTH),
    "chunked in HTTP/1.0": chunked().replace(b"HTTP/1.1", b"HTTP/1.0"),
    "a folded line": plain(b"X-A: b", b" c", LENGTH),
    "a folded first line": plain(b" X-A: b", LENGTH),
    "bare line feeds": plain(LENGTH).replace(b"\r\n", b"\n"),
    "a bare line feed": plain(b"X-A: b\nX-B: c", LENGTH),
    "a bare line feed before the body": HEAD + LENGTH + b"\r\n\n" + CHAT,
    "a bare carriage return": plain(b"X-A: b\rX-B: c", LENGTH),
    "a carriage return too many": plain(b"X-A: b\r", LENGTH),
    "a NUL in a value": plain(b"X-A: b\0c", LENGTH),
    "a control character in a value": plain(b"X-A: b\x0bc", LENGTH),
    "a blank before the colon": plain(LENGTH.replace(b":", b" :")),
    "a tab before the colon": plain(LENGTH.replace(b":", b"\t:")),
    "no name": plain(b": b", LENGTH),
    "a name with a bracket": plain(b"X(: b", LENGTH),
    "a name that is not ASCII": plain(b"X-\xff: b", LENGTH),
    "two hosts": plain(b"Host: localhost", LENGTH),
    "two hosts that differ": plain(b"Host: 127.0.0.1", LENGTH),
    "no host": plain(LENGTH).replace(b"Host", b"Hosts"),
    "a size with a plus": chunked(size=b"+" + SIZE),
    "a size with a minus": chunked(size=b"-" + SIZE),
    "a size with 0x": chunked(size=b"0x" + SIZE),
    "a size behind a blank": chunked(size=b" " + SIZE),
    "a size before a blank": chunked(size=SIZE + b" "),
    "a size before a tab": chunked(size=SIZE + b"\t"),
    "a size with an underscore": chunked(size=SIZE + b"_"),
    "a size past 64 bits": chunked(size=b"f" * 17),
    "a size that wraps around": chunked(size=b"1" + b"0" * (16 - len(SIZE)) + SIZE),
    "no size": chunked(size=b""),
    "a size line that ends in a line feed": chunked().replace(SIZE + b"\r\n", SIZE + b"\n"),
    "a size line that ends in a return": chunked().replace(SIZE + b"\r\n", SIZE + b"\r"),
    "an extension with a line feed": chunked(size=SIZE + b";a\nb"),
    "an extension with a return": chunked(size=SIZE + b";a\rb"),
    "an extension with a NUL": chunked(size=SIZE + b";\0"),
    "a chunk without its end": chunked(end=b"0\r\n\r\n"),
    "a chunk that ends in a line feed": chunked(end=b"\n0\r\n\r\n"),
    "bare line feeds at the end": chunked(end=b"\r\n0\n\n"),
    "a trailer that frames": chunked(end=b"\r\n0\r\nContent-Length: 5\r\n\r\n"),
    "a trailer that is chunked": chunked(end=b"\r\n0\r\n%b\r\n\r\n" % CHUNKED),
    "a trailer that is none": chunked(end=b"\r\n0\r\nX y\r\n\r\n"),
    "a tab in the request line": plain(LENGTH).replace(b" /", b"\t/"),
    "a blank in the path": plain(LENGTH).replace(b"/chat ", b"/ chat "),
    "a blank behind the version": plain(LENGTH).replace(b"/1.1\r", b"/1.1 \r"),
    "no version": plain(LENGTH).replace(b" HTTP/1.1", b""),
    "an unknown version": plain(LENGTH).replace(b"/1.1", b"/1.2"),
    "a later version": plain(LENGTH).replace(b"/1.1", b"/2.0"),
    "an unknown method": plain(LENGTH).replace(b"POST", b"SMUGGLE"),
    "a method in lower case": plain(LENGTH).replace(b"POST", b"post"),
}


@pytest.mark.parametrize("wire", REFUSED.values(), ids=REFUSED.keys())
async def test_is_refused_and_nothing_behind_it_is_answered_or_forwarded(wire: bytes) -> None:
    async with rig() as r, talk(r.url) as client:
        await client.send(wire + BEHIND)
        assert await statuses(client) == [400]
        assert not r.nodes[0].calls("/api/chat")
        assert all("smuggled" not in line["endpoint"] for line in r.requests)


@pytest.mark.parametrize(
    ("wire", "status"),
    [
        (chunked(b"Transfer-Encoding: identity, chunked"), 501),
        (chunked(b"Transfer-Encoding: gzip, chunked"), 501),
        (plain(b"Transfer-Encoding:", LENGTH), 501),
        (plain(*[b"X-%d: %b" % (n, b"a" * 30_000) for n in range(3)], LENGTH), 431),
        (plain(b"X-A: " + b"a" * 70_000, LENGTH), 431),
        (plain(*[b"A:"] * 20_000, LENGTH), 400),
    ],
    ids=["identity", "gzip", "empty coding", "header fields", "one field", "too many"],
)
async def test_what_is_refused_by_its_head_is_the_last_of_its_connection(
    wire: bytes, status: int
) -> None:
    async with rig() as r, talk(r.url) as client:
        await client.send(wire + BEHIND)
        assert await statuses(client) == [status]
        assert not r.nodes[0].calls("/api/chat")


async def test_what_follows_the_offer_of_another_protocol_is_not_answered() -> None:
    """The parser drops what came with such a request, so what comes later may begin anywhere."""
    offer = b"Connection: Upgrade"
    async with rig() as r, talk(r.url) as client:
        await client.send(plain(offer, b"Upgrade: h2c", LENGTH) + BEHIND)
        answer = await client.answer()
        assert (answer.status, answer.header("Connection")) == (200, "close")
        assert await client.rest() == b""
        assert [seen.raw_path for seen in r.nodes[0].calls("/api/chat")] == ["/api/chat"]


@pytest.mark.parametrize("upgrade", [b"websocket", b"tcp", b"h2c"])
async def test_no_other_protocol_is_ever_spoken(upgrade: bytes) -> None:
    async with rig() as r, talk(r.url) as client:
        head = b"GET /api/tags HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: "
        await client.send(head + upgrade + b"\r\n\r\n" + BEHIND)
        assert await statuses(client) == [200]
        assert not r.nodes[0].calls("/api/chat")


async def test_a_tunnel_is_not_opened() -> None:
    async with rig() as r, talk(r.url) as client:
        head = b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost:80\r\n\r\n"
        await client.send(head + BEHIND)
        assert (await client.answer()).status >= 300
        assert await client.rest() == b""
        assert not r.nodes[0].calls("/api/chat")


ACCEPTED = {
    "an extension": chunked(size=SIZE + b';a=b;c="d"'),
    "zeros before a size": chunked(size=b"0" * 40 + SIZE),
    "a size in upper case": chunked(size=SIZE.upper()),
    "a trailer": chunked(end=b"\r\n0\r\nX-Trailer: a\r\n\r\n"),
    "zeros before a length": plain(LENGTH.replace(b": ", b": 000")),
    "a blank behind a length": plain(LENGTH + b" \t"),
    "empty lines before it": b"\r\n\r\n" + plain(LENGTH),
    "a value that is not ASCII": plain(b"X-A: \xff", LENGTH),
}


@pytest.mark.parametrize("wire", ACCEPTED.values(), ids=ACCEPTED.keys())
async def test_what_only_looks_odd_reaches_the_node_in_one_form(wire: bytes) -> None:
    async with recorder() as node, rig(entries=[{"url": node.url}]) as r, talk(r.url) as client:
        await client.send(wire)
        assert (await client.answer()).status == 200
        ((head, body),) = node.seen
        assert body == CHAT
        assert head.count(b"\r\n" + LENGTH + b"\r\n") == head.lower().count(b"content-length") == 1
        assert b"transfer-encoding" not in head.lower()
        assert b"X-Trailer" not in head
        await client.send(plain(LENGTH))
        assert (await client.answer()).status == 200


# Clients: what has no end


@pytest.mark.parametrize(
    "framing",
    [b"5;" + b"y" * 70_000, b"0" * 70_000, (b"1;" + b"y" * 99 + b"\r\nx\r\n") * 900],
    ids=["one extension", "zeros", "an extension to each byte"],
)
async def test_chunk_framing_that_outgrows_its_body_is_a_400(framing: bytes) -> None:
    async with rig() as r, talk(r.url) as client:
        await client.send(HEAD + CHUNKED + b"\r\n\r\n")
        await r.until(lambda: r.app._gate.active == 1)
        await client.send(framing)
        assert await statuses(client) == [400]
        assert not r.nodes[0].calls("/api/chat")


async def test_a_body_in_chunks_of_one_byte_is_no_attack() -> None:
    body = CHAT[:-1] + b" " * 20_000 + b"}"
    async with rig() as r, talk(r.url) as client:
        await client.send(HEAD + CHUNKED + b"\r\n\r\n")
        await r.until(lambda: r.app._gate.active == 1)
        await client.send(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
        assert (await client.answer()).status == 200
        assert r.nodes[0].calls("/api/chat")[0].body == body


async def test_trailers_without_end_are_refused() -> None:
    async with rig() as r, talk(r.url) as client:
        await client.send(chunked(end=b"\r\n0\r\n" + b"X: y\r\n" * 20_000 + b"\r\n"))
        assert await statuses(client) == [400]
        assert not r.nodes[0].calls("/api/chat")


class Ahead(asyncio.SelectorEventLoop):
    """A loop whose clock can be put forward."""

    ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self.ahead_s


async def _upload_slowly(loop: Ahead, step_s: float) -> list[int]:
    limits = {"stalled_body_s": 100, "head_timeout_s": 100}
    async with rig(timeouts=limits) as r, talk(r.url) as client:
        await client.send(HEAD + LENGTH + b"\r\n\r\n")
        await r.until(lambda: r.app._gate.active == 1)
        (connection,) = r.app._server.connections
        request = connection._current_request
        assert request is not None
        content = request.content
        sent = 0

        def taken() -> bool:
            return content.total_bytes == sent and not content._size

        for byte in CHAT:
            loop.ahead_s += step_s
            if step_s > 100:
                return await statuses(client)
            await client.send(bytes((byte,)))
            sent += 1
            await r.until(taken)
        return [(await client.answer()).status]


@pytest.mark.parametrize(("step_s", "statuses"), [(50.0, [200]), (150.0, [408])])
def test_an_upload_may_be_slow_but_not_stall(step_s: float, statuses: list[int]) -> None:
    """An hour in all, a byte at a time: each comes within the limit."""
    loop = Ahead()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        assert runner.run(_upload_slowly(loop, step_s)) == statuses


# Clients: what would be more than one thing further on


@dataclass
class Recorder:
    """A node that answers everything, and what it was sent: heads and bodies as bytes."""

    url: str = ""
    seen: list[tuple[bytes, bytes]] = field(default_factory=list)


@contextlib.asynccontextmanager
async def recorder() -> AsyncIterator[Recorder]:
    node = Recorder()

    async def script(peer: Peer) -> None:
        node.seen.append((peer.head, peer.body))
        await peer.say(ok(b"{}"))

    async with scripted(script) as node.url:
        yield node


def ok(body: bytes, *lines: bytes) -> bytes:
    head = b"".join(line + b"\r\n" for line in lines)
    return b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body)


async def test_a_body_that_holds_a_request_is_a_body() -> None:
    body = CHAT + BEHIND
    async with recorder() as node, rig(entries=[{"url": node.url}]) as r, talk(r.url) as client:
        await client.post("/api/chat", body)
        assert (await client.answer()).status == 200
        assert [sent for _, sent in node.seen] == [body]


@pytest.mark.parametrize("named", ["content-length", "Host", "transfer-encoding", "X-Ollamux-Via"])
async def test_a_client_cannot_take_the_framing_off_a_request(named: str) -> None:
    async with recorder() as node, rig(entries=[{"url": node.url}]) as r, talk(r.url) as client:
        await client.post("/api/chat", CHAT, f"Connection: keep-alive, {named}")
        assert (await client.answer()).status == 200
        ((head, body),) = node.seen
        assert body == CHAT
        lines = head.lower().split(b"\r\n")
        for name in (b"host:", b"content-length:", b"x-ollamux-via:"):
            assert sum(line.startswith(name) for line in lines) == 1
        assert not any(line.startswith((b"connection:", b"transfer-encoding:")) for line in lines)


@pytest.mark.parametrize(
    ("target", "forwarded"),
    [
        ("/api/chat?a=%0d%0aX-Evil:%201", "/api/chat?a=%0d%0aX-Evil:%201"),
        ("/%61pi/chat", "/api/chat"),
        ("/api/chat%20HTTP/1.1%0d%0aX-Evil:%201", None),
        ("/api/chat%00", None),
        ("/api/chat;x", None),
        ("/api/../api/chat", None),
        ("/api/%2e%2e/chat", None),
    ],
)
async def test_a_path_is_an_endpoints_own_or_goes_nowhere(
    target: str, forwarded: str | None
) -> None:
    async with recorder() as node, rig(entries=[{"url": node.url}]) as r, talk(r.url) as client:
        await client.post(target, CHAT)
        assert (await client.answer()).status == (200 if forwarded else 404)
        lines = [head.partition(b"\r\n")[0].decode() for head, _ in node.seen]
        assert lines == ([f"POST {forwarded} HTTP/1.1"] if forwarded else [])
        assert not any(b"\r\nX-Evil" in head for head, _ in node.seen)


# Clients: what would end a line of an answer

EVIL = "\\r\\nX-Evil: 1\\r\\n\\r\\nHTTP/1.1 200 OK"


@pytest.mark.parametrize(
    "name", [f"{MODEL}{EVIL}", f"{MODEL}@n1{EVIL}", f"{MODEL}@{EVIL}", f"{EVIL}@n1", f"a/{EVIL}"]
)
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
async def test_a_name_ends_no_line(path: str, name: str) -> None:
    async with rig() as r, talk(r.url) as client:
        await client.post(path, CHAT.replace(MODEL.encode(), name.encode()))
        answer = await client.answer()
        assert 400 <= answer.status < 500
        assert answer.header("X-Evil") is None
        assert b"\r" not in answer.body
        await client.send(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await client.answer()).status == 200, "what follows is the next answer"


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models/a%0d%0aX-Evil:%201",
        "/v1/models/a%0d%0aX-Evil:%201/",
        "/v1/models/a%0d%0aX-Evil:%201",
        "//api/tags?a=%0d%0aX-Evil:%201",
        "/@n1%0d%0aX-Evil:%201/api/tags",
        "/@n1%0d%0aX-Evil:%201//api/tags",
    ],
)
async def test_a_path_ends_no_line(target: str) -> None:
    async with rig() as r, talk(r.url) as client:
        await client.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        answer = await client.answer()
        assert answer.status >= 300
        assert answer.header("X-Evil") is None
        await client.send(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await client.answer()).status == 200


@pytest.mark.parametrize("given", [b"a b", b"a\tb", b"\xff", b"\xc2\x85", b"a" * 129])
@pytest.mark.parametrize("path", [b"/api/version", b"/nope"])
async def test_an_id_that_is_unfit_is_replaced(path: bytes, given: bytes) -> None:
    async with rig() as r, talk(r.url) as client:
        head = b"GET %b HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: %b\r\n\r\n"
        await client.send(head % (path, given))
        answer = await client.answer()
        own = answer.header("X-Ollamux-Request-Id")
        assert own is not None
        assert own.isascii()
        assert given.decode("latin-1") not in own


@pytest.mark.parametrize(
    "origin", [b"http://localhost\xc2\x85X-Evil:1", b"app://\xff", b"app://a\tb"]
)
async def test_an_origin_ends_no_line(origin: bytes) -> None:
    async with rig() as r, talk(r.url) as client:
        head = b"GET /api/version HTTP/1.1\r\nHost: localhost\r\nOrigin: %b\r\n\r\n"
        await client.send(head % origin)
        answer = await client.answer()
        assert answer.header("X-Evil") is None
        await client.send(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await client.answer()).status == 200


# Nodes

Says = Callable[[Peer], Awaitable[None]]


@contextlib.asynccontextmanager
async def facing(script: Says) -> AsyncIterator[Talk]:
    """A client of a router whose one node answers as `script` says."""
    async with scripted(script) as url, rig(entries=[{"url": url}]) as r, talk(r.url) as client:
        yield client


def saying(wire: bytes) -> Says:
    async def script(peer: Peer) -> None:
        await peer.say(wire)
        await peer.gone()

    return script


GARBAGE = {
    "a return in a header": ok(b"{}", b"X-A: a\rX-Evil: 1"),
    "a line feed in a header": ok(b"{}", b"X-A: a\nX-Evil: 1"),
    "a NUL in a header": ok(b"{}", b"X-A: a\0X-Evil: 1"),
    "a folded header": ok(b"{}", b"X-A: a", b" X-Evil: 1"),
    "a return in the reason": ok(b"{}").replace(b"OK\r", b"O\rX-Evil: 1\r"),
    "a line feed in the reason": ok(b"{}").replace(b"OK\r", b"O\nX-Evil: 1\r"),
    "a control character in the reason": ok(b"{}").replace(b"OK", b"O\x0bK"),
    "length and chunked": ok(b"{}", CHUNKED),
    "interim answers without end": b"HTTP/1.1 103 Early Hints\r\nX-Evil: 1\r\n\r\n" * 8000,
    "another protocol": b"HTTP/1.1 101 Yes\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    "a chunk size that wraps around": b"HTTP/1.1 200 OK\r\n%b\r\n\r\n%b2\r\n{}\r\n0\r\n\r\n"
    % (CHUNKED, b"1" + b"0" * 16),
}


@pytest.mark.parametrize("wire", GARBAGE.values(), ids=GARBAGE.keys())
async def test_what_a_node_may_not_write_is_a_502_without_any_of_it(wire: bytes) -> None:
    async with facing(saying(wire)) as client:
        await client.post("/api/chat", CHAT)
        answer = await client.answer()
        assert answer.status == 502
        assert b"Evil" not in answer.body
        assert not any("evil" in name.lower() for name, _ in answer.headers)
        await client.send(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await client.answer()).status == 200


EXTRA = b"HTTP/1.1 200 OK\r\nX-Evil: 1\r\nContent-Length: 4\r\n\r\nevil"


@pytest.mark.parametrize(
    "wire",
    [
        ok(b"{}") + b"evil",
        ok(b"{}") + EXTRA,
        b"HTTP/1.1 200 OK\r\n%b\r\n\r\n2\r\n{}\r\n0\r\n\r\n" % CHUNKED + EXTRA,
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nX-Evil: 1\r\n\r\n" + ok(b"{}"),
        ok(b"{}", b"Connection: X-Evil, close", b"X-Evil: 1"),
        ok(b"{}", b"Trailer: X-Evil", b"Keep-Alive: 5", b"Upgrade: h2c"),
    ],
    ids=["more bytes", "two answers", "two, the first chunked", "interim", "hop by hop", "trailer"],
)
async def test_no_client_gets_more_than_the_answer_to_its_request(wire: bytes) -> None:
    calls: list[Peer] = []

    async def script(peer: Peer) -> None:
        calls.append(peer)
        await peer.say(wire if len(calls) == 1 else ok(b"[2]"))

    async with facing(script) as client:
        await client.post("/api/chat", CHAT)
        first = await client.answer()
        assert (first.status, first.body) == (200, b"{}")
        names = {name.lower() for name, _ in first.headers}
        assert names.isdisjoint({"x-evil", "trailer", "upgrade", "keep-alive", "connection"})
        await client.post("/api/chat", CHAT)
        second = await client.answer()
        assert (second.status, second.body) == (200, b"[2]")
        client.writer.write_eof()
        assert await client.rest() == b""


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_that_has_no_body_gets_none(status: int) -> None:
    wire = b"HTTP/1.1 %d X\r\nContent-Length: 4\r\n\r\nevil" % status
    async with facing(saying(wire)) as client:
        await client.post("/api/chat", CHAT)
        assert (await client.answer()).status == status
        await client.send(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await client.answer()).status == 200


async def test_a_node_that_claims_more_than_it_sends_ends_the_clients_answer() -> None:
    async def script(peer: Peer) -> None:
        await peer.say(ok(b"{}").replace(b"Length: 2", b"Length: 50"))
        peer.writer.close()

    async with facing(script) as client:
        await client.post("/api/chat", CHAT)
        answer = await client.answer()
        assert (answer.status, answer.whole) == (502, True)


async def test_what_a_node_says_before_it_is_asked_answers_nobody() -> None:
    """A connection on which a node speaks out of turn is not used again."""
    seen: list[Peer] = []

    async def script(peer: Peer) -> None:
        seen.append(peer)
        await peer.say(ok(b"[%d]" % len(seen)))
        if len(seen) == 1:
            await peer.say(EXTRA)
            await peer.gone()

    async with scripted(script) as url, rig(entries=[{"url": url}]) as r:
        for expected in (b"[1]", b"[2]"):
            async with r.chat(stream=False) as answer:
                assert await answer.read() == expected


async def test_pipelined_requests_each_get_their_own_answer_once() -> None:
    async with rig() as r, talk(r.url) as client:
        for number in range(5):
            body = CHAT.replace(b"hi", b"number %d" % number)
            await client.post("/api/chat", body, f"X-Request-Id: id-{number}")
        ids = [(await client.answer()).header("X-Ollamux-Request-Id") for _ in range(5)]
        assert ids == [f"id-{number}" for number in range(5)]
        assert len(r.nodes[0].calls("/api/chat")) == 5
