"""Simulated nodes as processes on addresses that stay: killed, stopped, and back again."""

import asyncio
import contextlib
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import aiohttp

from tests.process import ROOT, environment
from tests.rig import MODEL

OTHER = "qwen2.5:0.5b"
EMBEDDER = "nomic-embed-text"
MODELS = (MODEL, OTHER, EMBEDDER)
_LOWEST_PORT = 10_240


@dataclass(frozen=True)
class Speed:
    """How nodes answer: seconds to load a model, tokens per second, fewest and most tokens, and
    which models are loaded from the start. `slots`: so few that no node is enough for all."""

    load_s: float = 0.1
    decode_tps: float = 50.0
    tokens: tuple[int, int] = (10, 30)
    slots: int = 4
    prefill_tps: float = inf
    warm: Sequence[str] = ()

    @property
    def options(self) -> Sequence[str]:
        low, high = self.tokens
        return (
            f"--load-s={self.load_s}", f"--decode-tps={self.decode_tps}",
            f"--prefill-tps={self.prefill_tps}", f"--warm={','.join(self.warm)}",
            f"--min-tokens={low}", f"--max-tokens={high}", f"--num-parallel={self.slots}",
            "--memory-gb=4000", "--max-loaded=8", f"--models={','.join(MODELS)}",
        )  # fmt: skip


def listening() -> socket.socket:
    """A socket on a port that no outgoing connection can be given while its server is down: such
    a connection would keep it, or even find itself at the other end."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(_LOWEST_PORT, max(lowest, _LOWEST_PORT + 1))
        with contextlib.suppress(OSError):
            return socket.create_server(("127.0.0.1", port))


def free_port() -> int:
    with listening() as sock:
        return int(sock.getsockname()[1])


@dataclass
class Node:
    """One process. `in_flight`, `arrivals` and faults are asked of it over its control paths."""

    name: str
    session: aiohttp.ClientSession = field(repr=False)
    speed: Speed = field(default_factory=Speed)
    port: int = field(default_factory=free_port)
    stopped: bool = False
    _process: asyncio.subprocess.Process | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        return self._process is not None

    async def start(self) -> None:
        """Start it, if it does not run; returns once it listens."""
        if self._process is not None:
            return
        options = (f"--port={self.port}", *self.speed.options)
        # Measuring what nodes execute would cost half of their time.
        env = {k: v for k, v in environment({}).items() if not k.startswith("COVERAGE_")}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "router.sim", *options, cwd=ROOT, env=env,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        self._process = process
        assert process.stdout is not None
        told = await process.stdout.readline()
        assert told or self._process is not process, f"{self.name} did not start"

    async def kill(self) -> None:
        """SIGKILL; it may be dead already."""
        process, self._process = self._process, None
        self.stopped = False
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def stop(self) -> None:
        """SIGSTOP: its connections stay, and the kernel goes on to accept new ones."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)
            self.stopped = True

    def go_on(self) -> None:
        if self._process is not None and self.stopped:
            self._process.send_signal(signal.SIGCONT)
        self.stopped = False

    async def fault(self, **fields: Any) -> None:
        """Add a fault: the fields of `router.sim.Fault`."""
        await self._command("POST", "/sim/fault", fields)

    async def behave(self) -> None:
        """Take all faults away, and release what hangs."""
        await self._command("DELETE", "/sim/fault")

    async def delete(self, model: str) -> None:
        """Delete a model as somebody does behind the router's back; it is kept under a name."""
        await self._command("POST", "/api/copy", {"source": model, "destination": f"kept-{model}"})
        await self._command("DELETE", "/api/delete", {"model": model})

    async def restore(self, model: str) -> None:
        await self._command("POST", "/api/copy", {"source": f"kept-{model}", "destination": model})
        await self._command("DELETE", "/api/delete", {"model": f"kept-{model}"})

    async def state(self) -> Mapping[str, Any]:
        """What the node tells of itself, see `router.sim.control`."""
        async with self.session.get(f"{self.url}/sim/state") as answer:
            told: Mapping[str, Any] = await answer.json()
            return told

    async def in_flight(self) -> int:
        """Inference requests that it answers now; a dead node answers none."""
        return int((await self.state())["in_flight"]) if self.running else 0

    async def arrivals(self) -> Sequence[float]:
        """When each POST arrived that it remembers: monotonic seconds."""
        async with self.session.get(f"{self.url}/sim/seen") as answer:
            return [one["at"] for one in await answer.json() if one["method"] == "POST"]

    async def _command(self, method: str, path: str, body: object = None) -> None:
        async with self.session.request(method, self.url + path, json=body) as answer:
            assert answer.status in (200, 204), f"{self.name} {path}: {await answer.text()}"


@dataclass
class Fleet:
    """All nodes, by name."""

    nodes: Sequence[Node]

    def __getitem__(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    async def heal(self) -> None:
        """Have all nodes run and behave again."""
        for node in self.nodes:
            node.go_on()
        await asyncio.gather(*(node.start() for node in self.nodes))
        await asyncio.gather(*(node.behave() for node in self.nodes))

    async def in_flight(self) -> Mapping[str, int]:
        counts = await asyncio.gather(*(node.in_flight() for node in self.nodes))
        return {node.name: count for node, count in zip(self.nodes, counts, strict=True)}


@contextlib.asynccontextmanager
async def fleet(count: int, speed: Speed) -> AsyncIterator[Fleet]:
    """Nodes n1, n2, …; whatever happens, none of them runs afterwards."""
    # Without kept connections: a node may be killed between two commands.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        nodes = [Node(f"n{number}", session, speed) for number in range(1, count + 1)]
        try:
            await asyncio.gather(*(node.start() for node in nodes))
            yield Fleet(nodes)
        finally:
            await asyncio.gather(*(node.kill() for node in nodes))
