"""A whole router in this event loop, in front of simulated nodes, on loopback."""

import asyncio
import contextlib
import io
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import aiohttp

from router import config, listeners, log
from router.admin import ReloadResult
from router.app import App
from router.settings import Config
from router.sim import GB, SimModel, SimNode, SimSpec

MODEL = "llama3:8b"
# The node with the least in flight is asked, in turn among equals, whatever it has in its memory,
# and nothing waits here.
LEAST: Mapping[str, Any] = {"policy": "least-in-flight"}
# Nothing takes time unless a test asks for it.
_AT_ONCE = {"load_s": 0.0, "prefill_tps": inf, "decode_tps": inf}


def model(name: str = MODEL, **settings: Any) -> SimModel:
    """A model that loads and answers at once."""
    return SimModel(name, **{"size_bytes": GB, **_AT_ONCE, **settings})


def spec(*models: SimModel, **settings: Any) -> SimSpec:
    """A node with `models`, or with the usual one."""
    return SimSpec(models=models or (model(),), **settings)


@dataclass
class Rig:
    """A running router: `url` for clients, `admin`, its nodes, and what it has logged."""

    app: App
    nodes: Sequence[SimNode]
    session: aiohttp.ClientSession
    output: io.StringIO
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.app.clients[0]

    @property
    def admin(self) -> str:
        return self.app.admins[0]

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Everything logged so far, as parsed JSON lines."""
        self.app._gate.ledger.settle()
        for handler in logging.getLogger().handlers:
            handler.flush()
        return [json.loads(line) for line in self.output.getvalue().splitlines()]

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The canonical lines of the requests that have ended."""
        return [line for line in self.lines if line["event"] == "request"]

    def chat(self, **fields: Any) -> Any:
        """`async with` it: a chat request, streamed unless `stream=False` is given."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], **fields}
        return self.session.post(f"{self.url}/api/chat", json=body)

    async def look(self) -> None:
        """Probe every node for everything, now."""
        for node in self.app.pool.registry.specs():
            await self.app.prober.look(node, ("version", "tags", "ps"))

    async def metrics(self) -> str:
        async with self.session.get(f"{self.admin}/metrics") as answer:
            return await answer.text()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until `holds()`, asked again at every turn of the loop."""
        while not holds():  # noqa: ASYNC110 - nothing tells of a change
            await asyncio.sleep(0)


def _entries(
    nodes: Sequence[SimNode], others: Sequence[str], extras: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = [
        *({"url": node.url, "slots": node.spec.num_parallel} for node in nodes),
        *({"url": url} for url in others),
    ]
    padded = [*extras, *({} for _ in told)]
    return [{"name": f"n{n + 1}", **one, **padded[n]} for n, one in enumerate(told)]


async def _no_reload() -> ReloadResult:
    raise AssertionError("a test that reloads starts a Daemon")


def parsed(settings: Mapping[str, Any]) -> Config:
    """A configuration from what would be the file's content."""
    return config.parse(json.dumps(settings).encode(), "router.yaml", {})


@contextlib.asynccontextmanager
async def rig(
    *specs: SimSpec,
    entries: Sequence[Mapping[str, Any]] = (),
    others: Sequence[str] = (),
    looked: bool = True,
    **sections: Any,
) -> AsyncIterator[Rig]:
    """Start one simulated node per spec (names n1, n2, …) and a router in front of them.

    `others` are the urls of nodes that run already, to be named after these. `entries` add to, or
    replace, fields of the nodes in the configuration; `sections` are other top-level keys of it.
    Probes run only when a test says `look()`, and once at the start unless `looked` is false.
    """
    output = io.StringIO()
    log.setup("debug", "json", output)
    async with contextlib.AsyncExitStack() as stack:
        here = specs or (() if others else (spec(),))
        nodes = [await stack.enter_async_context(SimNode(one)) for one in here]
        settings = {
            "listen": "127.0.0.1:0",
            "admin": "127.0.0.1:0",
            "nodes": _entries(nodes, others, entries),
            **sections,
        }
        app = await stack.enter_async_context(App(parsed(settings), _no_reload))
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        made = Rig(app, nodes, session, output, settings)
        if looked:
            await made.look()
        yield made


@dataclass
class Peer:
    """One request that reached a scripted node, and the connection to answer it on."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    head: bytes = b""
    body: bytes = b""

    async def receive(self) -> None:
        """Read the next request. Raises IncompleteReadError at the end of the connection."""
        self.head = await self.reader.readuntil(b"\r\n\r\n")
        length = 0
        for line in self.head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        self.body = await self.reader.readexactly(length)

    async def say(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def gone(self) -> None:
        """Return when the router has closed the connection."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass

    def close(self) -> None:
        self.writer.transport.abort()


Script = Callable[[Peer], Awaitable[None]]
_PROBED: Mapping[bytes, Any] = {
    b"/api/version": {"version": "0.33.0"},
    b"/api/tags": {"models": [{"name": MODEL, "model": MODEL, "digest": "ab"}]},
    b"/api/ps": {"models": []},
}


@contextlib.asynccontextmanager
async def scripted(script: Script, probed: Mapping[bytes, Any] = _PROBED) -> AsyncIterator[str]:
    """A node that has the usual model and answers every POST as `script` says; gives its url.

    `probed`: the JSON of each path that probes ask for; what is bytes is a whole response.
    """
    calls: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        calls.add(task)
        peer = Peer(reader, writer)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while not writer.transport.is_closing():
                    await peer.receive()
                    method, path, _ = peer.head.split(b" ", 2)
                    if method == b"GET":
                        await peer.say(_probed(probed[path]))
                    else:
                        await script(peer)
        finally:
            calls.discard(task)
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        await listeners.close(server)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


def _probed(answer: Any) -> bytes:
    if isinstance(answer, bytes):
        return answer
    body = json.dumps(answer).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


@dataclass(frozen=True)
class Answer:
    """A response as it came over the wire, its chunks joined. `whole`: it was not cut off."""

    version: str
    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes
    whole: bool

    def header(self, name: str) -> str | None:
        """The first value of a header, whatever its case."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


@dataclass
class Talk:
    """A client that writes what it likes."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def post(self, path: str, body: bytes, *headers: str, version: str = "1.1") -> None:
        """Send one POST with its length."""
        lines = (
            f"POST {path} HTTP/{version}",
            "Host: localhost",
            f"Content-Length: {len(body)}",
            *headers,
        )
        await self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    async def head(self) -> tuple[str, int, Sequence[tuple[str, str]]]:
        """The next response's version, status and headers."""
        first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = [line.partition(":") for line in lines if line]
        version, status = first.split(" ")[:2]
        return version, int(status), [(name, value.strip()) for name, _, value in pairs]

    async def answer(self, *, bodiless: bool = False) -> Answer:
        """The next response."""
        version, status, headers = await self.head()
        named = {name.lower(): value for name, value in headers}
        whole = True
        if bodiless or status in (204, 304):
            body = b""
        elif named.get("transfer-encoding") == "chunked":
            body, whole = await self._chunks()
        elif "content-length" in named:
            try:
                body = await self.reader.readexactly(int(named["content-length"]))
            except asyncio.IncompleteReadError as error:
                body, whole = error.partial, False
        else:
            body = await self.rest()
        return Answer(version, status, headers, body, whole)

    async def chunk(self) -> bytes:
        """The next chunk of a chunked body; empty for the last. Raises IncompleteReadError."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def _chunks(self) -> tuple[bytes, bool]:
        body = b""
        try:
            while chunk := await self.chunk():
                body += chunk
        except (asyncio.IncompleteReadError, ConnectionError):
            return body, False
        return body, True

    async def rest(self) -> bytes:
        """Everything until the router closes the connection."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""

    def leave(self) -> None:
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def talk(url: str) -> AsyncIterator[Talk]:
    """Connect to a router or node."""
    host, _, port = url.rpartition("/")[2].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Talk(reader, writer)
    finally:
        writer.transport.abort()
