"""The simulated node as a real HTTP server: start and stop, what it saw, what it is told to do."""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from aiohttp import web

from router.listeners import close
from router.sim import audio, guard
from router.sim.account import Account
from router.sim.control import PREFIX, Control
from router.sim.driver import Driver
from router.sim.exchange import Broken, Exchange, Machine, Seen
from router.sim.faults import Fault, Faults
from router.sim.models import SimSpec
from router.sim.node import Scheduler
from router.sim.request import Refused, parse
from router.sim.routes import INFERENCE, serve, takes_uploads
from router.sim.shelf import Shelf

SEEN_MAX = 10_000
_HEADER_LIMIT = 1 << 20
# How long Go's server lets a client go on sending what it will not read.
_LINGER_S = 0.5
_CLOUD = SimSpec(num_parallel=1000, max_loaded=1000, memory_bytes=1 << 60, default_num_ctx=131_072)


class SimNode:
    """One Ollama node on a port. `async with SimNode(spec) as node:` starts and stops it.

    Stopping breaks every connection, as a node does on SIGTERM. Started again, it comes back on the
    same port with nothing loaded but `spec.warm`. `in_flight` counts inference requests between
    their arrival and their end, also those that a fault holds; the scheduler has counters of its
    own. `seen` keeps the last `SEEN_MAX` requests, in order of arrival.
    """

    def __init__(
        self, spec: SimSpec | None = None, *, port: int = 0, host: str = "127.0.0.1"
    ) -> None:
        """Raises ValueError for models whose names are none, or the same."""
        self.spec = spec or SimSpec()
        self.host = host
        self.port = port
        self.seen: deque[Seen] = deque(maxlen=SEEN_MAX)
        self.faults = Faults()
        self.in_flight = 0
        self.peak_in_flight = 0
        self._account = Account(self.spec)
        self._shelf = Shelf(self.spec.models, self._account)
        self._change = asyncio.Event()
        self._comeback: asyncio.Task[None] | None = None
        self._runner: web.AppRunner | None = None
        self._listening: asyncio.Server | None = None
        self._machine: Machine | None = None

    def __repr__(self) -> str:
        """State in one line."""
        state = "up" if self._listening else "refusing" if self._runner else "stopped"
        return f"<SimNode {self.url} {state} in_flight={self.in_flight} faults={len(self.faults)}>"

    @property
    def url(self) -> str:
        """Where the node listens (after the start), without a trailing slash."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of the present life of the node. Raises RuntimeError before the start."""
        return self._running().driver.scheduler

    @property
    def held(self) -> int:
        """Requests that a HANG or a STALL holds now: what `release` would let go on."""
        return self._running().held

    @property
    def fault(self) -> Fault | None:
        """The first fault in force. Setting replaces all of them; None behaves again."""
        return next(iter(self.faults), None)

    @fault.setter
    def fault(self, fault: Fault | None) -> None:
        self.faults.clear()
        if fault is not None:
            self.faults.add(fault)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen. Raises OSError when the port is taken."""
        loop = asyncio.get_running_loop()
        driver = Driver(Scheduler(self.spec, loop.time()), self._changed)
        remote = Driver(Scheduler(_CLOUD, loop.time()), self._changed)
        self._machine = Machine(
            self.spec, self._shelf, driver, remote, self._account, self._changed
        )
        app = web.Application()
        control = Control(self.faults, self._state, self._arrivals, self.release, self._refuse_for)
        app.router.add_route("*", PREFIX + "{tail:.*}", control.serve)
        app.router.add_route("*", "/{tail:.*}", self._handle, expect_handler=_say_nothing)
        app.on_response_prepare.append(_drop_headers)
        self._runner = web.AppRunner(
            app,
            handler_cancellation=True,
            auto_decompress=False,
            access_log=None,
            shutdown_timeout=1.0,
            lingering_time=_LINGER_S,
            max_line_size=_HEADER_LIMIT,
            max_field_size=_HEADER_LIMIT,
        )
        await self._runner.setup()
        await self.accept()

    async def stop(self) -> None:
        """Break all connections and stop listening. A stopped node may be stopped again."""
        if self._comeback is not None:
            self._comeback.cancel()
            await asyncio.gather(self._comeback, return_exceptions=True)
            self._comeback = None
        if self._runner is not None:
            await self.refuse()
            await self._runner.cleanup()
            self._runner = None
        if self._machine is not None:
            self._machine.driver.close()
            self._machine.remote.close()

    async def refuse(self, *, keep: web.Request | None = None) -> None:
        """Close the listening socket and break every connection but that of `keep`."""
        listening, self._listening = self._listening, None
        if listening is not None:
            await close(listening)
        self.drop_connections(keep=keep)
        self._changed()

    async def accept(self) -> None:
        """Listen again, on the same port."""
        server = self._runner.server if self._runner is not None else None
        if self._listening is not None or server is None:
            return
        loop = asyncio.get_running_loop()
        self._listening = await loop.create_server(server, self.host, self.port, backlog=1024)
        self.port = self._listening.sockets[0].getsockname()[1]
        self._changed()

    def drop_connections(self, *, keep: web.Request | None = None) -> None:
        """Break every open connection; what runs on them is cancelled."""
        server = self._runner.server if self._runner is not None else None
        for connection in server.connections if server is not None else ():
            if connection.transport is not None and (keep is None or connection != keep.protocol):
                connection.transport.abort()

    def release(self) -> None:
        """Let go on what a HANG or a STALL holds now. Wait for `held` first: later ones stay."""
        machine = self._running()
        machine.released.set()
        machine.released = asyncio.Event()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until `holds()`, which is asked again after everything the node does."""
        while not holds():
            await self._change.wait()

    def calls(self, path: str | None = None) -> list[Seen]:
        """What was seen of one path (without query), or all of it."""
        return [one for one in self.seen if path in (None, one.raw_path.partition("?")[0])]

    def _running(self) -> Machine:
        if self._machine is None:
            raise RuntimeError("the node was not started")
        return self._machine

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path, _, query = _local(request.raw_path).partition("?")
        headers = list(request.headers.items())
        clock = asyncio.get_running_loop()
        seen = Seen(request.method, request.raw_path, headers, clock.time())
        self.seen.append(seen)
        exchange = Exchange(request, path, seen, self._running())
        counts = request.method == "POST" and path in INFERENCE
        self._count(int(counts))
        try:
            await self._answer(exchange, query, inference=counts)
            seen.outcome = "done" if seen.status is not None and seen.status < 400 else "error"
        except Broken:
            seen.outcome = "error"
        except asyncio.CancelledError:
            seen.outcome = "cancelled"
            raise
        except ConnectionError:
            # Found out by writing, before the cancellation came: nobody is left to answer.
            seen.outcome = "cancelled"
        finally:
            seen.finished = clock.time()
            self._count(-int(counts))
        return exchange.response

    def _count(self, step: int) -> None:
        self.in_flight += step
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        self._changed()

    async def _answer(self, exchange: Exchange, query: str, *, inference: bool) -> None:
        request = exchange.request
        if not takes_uploads(request.method, exchange.path):
            await exchange.receive()
        model = _model_named(exchange)
        exchange.fault = self.faults.take(exchange.path, model, inference=inference)
        try:
            if self.spec.check_host and not guard.admits(request.headers, self.spec.origins):
                await exchange.empty(403)
                return
            await exchange.misbehave_early()
            await serve(exchange, request.method, query)
        except Refused as error:
            await exchange.refuse(error)

    async def _refuse_for(self, seconds: float, request: web.Request) -> None:
        await self.refuse(keep=request)
        self._comeback = asyncio.create_task(self._come_back(seconds))

    async def _come_back(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.accept()

    def _state(self) -> Mapping[str, object]:
        scheduler = self.scheduler
        return {
            "in_flight": self.in_flight,
            "peak_in_flight": self.peak_in_flight,
            "peaks": scheduler.peaks,
            "held": self.held,
            "loads": scheduler.loads,
            "aborted_loads": scheduler.aborted_loads,
            "evictions": scheduler.evictions,
            "refused": scheduler.refused,
            "resident": [one.model.name for one, _ in self._running().driver.resident()],
            "faults": [fault.kind for fault in self.faults],
            "seen": [
                {"method": one.method, "path": one.raw_path, "outcome": one.outcome}
                for one in list(self.seen)[-100:]
            ],
        }

    def _arrivals(self) -> Sequence[Mapping[str, object]]:
        return [
            {"method": one.method, "path": one.raw_path, "outcome": one.outcome, "at": one.started}
            for one in self.seen
        ]


def _local(target: str) -> str:
    """A request target without scheme and host, which a proxy's client may send along."""
    if target.startswith("/"):
        return target
    _, _, rest = target.partition("://")
    return "/" + rest.partition("/")[2]


def _model_named(exchange: Exchange) -> str | None:
    """The model a request is about, as far as that can be read."""
    content_type = exchange.seen.header("Content-Type") or ""
    try:
        if content_type.startswith("multipart/"):
            return audio.parts(exchange.body, content_type).get("model", b"").decode() or None
        fields = parse(exchange.body)
        for name in ("model", "name", "source"):
            if found := fields.text(name):
                return found
    except (Refused, UnicodeDecodeError):
        pass
    return None


async def _say_nothing(request: web.Request) -> None:
    """Leave the answer to `Expect: 100-continue` to whoever reads the body."""


async def _drop_headers(request: web.Request, response: web.StreamResponse) -> None:
    """A node names no server, and does not tell the length of its tags to HEAD."""
    response.headers.pop("Server", None)
    if request.method == "HEAD" and request.path == "/api/tags":
        response.headers.pop("Content-Length", None)
