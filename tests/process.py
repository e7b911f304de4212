"""Real `ollamux` processes, what they say, and the supervisor that they report to."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import aiohttp

from router.sim import SimNode
from tests.rig import MODEL

ROOT = Path(__file__).parent.parent
_NOT_INHERITED = (
    "OLLAMA_", "OLLAMUX_", "NOTIFY_", "WATCHDOG_", "LISTEN_", "RUNTIME_DIRECTORY", "HTTP_",
    "HTTPS_", "ALL_", "PYTHONUNBUFFERED",
)  # fmt: skip

# Where processes meet that take over from each other: gone with this one.
_RUNTIME = tempfile.TemporaryDirectory(prefix="ollamux-")


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, without what would change how a router behaves."""
    inherited = {k: v for k, v in os.environ.items() if not k.upper().startswith(_NOT_INHERITED)}
    return inherited | {"XDG_RUNTIME_DIR": _RUNTIME.name} | dict(extra)


def settings(*nodes: SimNode, **sections: Any) -> dict[str, Any]:
    """A configuration for simulated nodes n1, n2, …; `sections` are other top-level keys."""
    return {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "nodes": [entry(node, f"n{number}") for number, node in enumerate(nodes, 1)],
        **sections,
    }


def entry(node: SimNode, name: str, **fields: Any) -> dict[str, Any]:
    """One node of a configuration."""
    return {"name": name, "url": node.url, "slots": node.spec.num_parallel, **fields}


def write(path: Path, value: object) -> None:
    """Replace a file by rename, as editors do; `value` is bytes, or anything JSON can say."""
    fresh = path.with_name(f"{path.name}.new")
    overwrite(fresh, value)
    fresh.replace(path)


def overwrite(path: Path, value: object) -> None:
    """Write a file where it stands."""
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())


def remove(path: Path) -> None:
    path.unlink()


@dataclass
class Output:
    """Lines of a pipe as they come. `next` gives each line at most once."""

    lines: list[str] = field(default_factory=list)
    ended: bool = False
    _unread: list[str] = field(default_factory=list)
    _begun: bytes = b""
    _more: asyncio.Event = field(default_factory=asyncio.Event)

    def __str__(self) -> str:
        return "\n".join(self.lines)

    def feed(self, data: bytes) -> None:
        *whole, self._begun = (self._begun + data).split(b"\n")
        self._add(whole)

    def close(self) -> None:
        self.ended = True
        self._add([self._begun] if self._begun else [])

    def _add(self, lines: Iterable[bytes]) -> None:
        new = [line.decode() for line in lines]
        self.lines += new
        self._unread += new
        self._more.set()
        self._more = asyncio.Event()

    async def next(self, wanted: Callable[[str], bool]) -> str:
        """The first line not given yet that is `wanted`; waits for it."""
        while True:
            for line in self._unread:
                if wanted(line):
                    self._unread.remove(line)
                    return line
            assert not self.ended, f"the process has ended; it said:\n{self}"
            await self._more.wait()

    async def logged(self, event: str, **fields: object) -> dict[str, Any]:
        """The next line of a log about `event` that has all these fields."""

        def wanted(line: str) -> bool:
            found = json.loads(line)
            return found["event"] == event and all(found[key] == fields[key] for key in fields)

        said: dict[str, Any] = json.loads(await self.next(wanted))
        return said


class Process(asyncio.SubprocessProtocol):
    """A process that runs `python -m router ...`."""

    def __init__(self) -> None:
        self.out = Output()
        self.err = Output()
        self.running = True
        self._gone = asyncio.Event()

    @property
    def text(self) -> str:
        """All that it has printed and logged."""
        return f"{self.out}\n{self.err}"

    @property
    def log(self) -> list[dict[str, Any]]:
        """Everything logged so far; a line that is no JSON fails the test."""
        return [json.loads(line) for line in self.err.lines]

    @property
    def pid(self) -> int:
        return self._transport.get_pid()

    def signal(self, number: signal.Signals) -> None:
        self._transport.send_signal(number)

    async def ended(self) -> int:
        """Wait for its end and its last line; returns the exit code."""
        await self._gone.wait()
        code = self._transport.get_returncode()
        assert code is not None
        return code

    async def logged(self, event: str, **fields: object) -> dict[str, Any]:
        return await self.err.logged(event, **fields)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.SubprocessTransport, transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        (self.out if fd == 1 else self.err).feed(data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        (self.out if fd == 1 else self.err).close()

    def process_exited(self) -> None:
        self.running = False

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone.set()


@contextlib.asynccontextmanager
async def started(*args: str, env: Mapping[str, str] | None = None) -> AsyncIterator[Process]:
    """Run `python -m router` with `args`; what still runs at the end is killed."""
    transport, process = await asyncio.get_running_loop().subprocess_exec(
        Process, sys.executable, "-m", "router", *args,
        stdin=asyncio.subprocess.DEVNULL, env=environment(env or {}), cwd=ROOT,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.running:
            transport.kill()
        await process.ended()
        transport.close()


async def ran(*args: str, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Run a command to its end; returns (exit code, standard output, standard error)."""
    async with asyncio.timeout(60), started(*args, env=env) as process:
        code = await process.ended()
        return code, str(process.out), str(process.err)


def watches(pid: int) -> bool:
    """Whether a process watches a directory by now: what changed before is seen by a poll."""
    return any("inotify wd:" in _shown(path) for path in Path(f"/proc/{pid}/fdinfo").iterdir())


def _shown(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # closed meanwhile


@dataclass
class Router:
    """A running `ollamux serve`: `url` for clients, `admin`, its file and its process."""

    process: Process
    path: Path
    session: aiohttp.ClientSession
    url: str
    admin: str

    def chat(self, text: str = "hello", **fields: Any) -> Any:
        """`async with` it: a chat request, streamed unless `stream=False` is given."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}
        return self.session.post(f"{self.url}/api/chat", json=body)

    async def get(self, path: str) -> tuple[int, str]:
        """(status, body) of a page of the admin listener."""
        async with self.session.get(f"{self.admin}{path}") as answer:
            return answer.status, await answer.text()

    async def metrics(self) -> Mapping[str, float]:
        """All samples by name and labels, as they are spelled in the exposition."""
        _, text = await self.get("/metrics")
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    async def status(self) -> dict[str, Any]:
        async with self.session.get(f"{self.admin}/status") as answer:
            shown: dict[str, Any] = await answer.json()
            return shown

    async def until(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Ask for `/status` until it `holds`."""
        while not holds(shown := await self.status()):
            pass
        return shown

    async def reload(self, token: str = "") -> tuple[int, dict[str, Any]]:
        """(status, answer) of `POST /reload`."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with self.session.post(f"{self.admin}/reload", headers=headers) as answer:
            return answer.status, await answer.json()

    async def watching(self) -> None:
        """Wait until it watches its directory."""
        while not watches(self.process.pid):
            await self.status()

    async def stop(self) -> int:
        """End it at once, whatever is in flight; returns the exit code."""
        if self.process.running:
            self.process.signal(signal.SIGTERM)
            self.process.signal(signal.SIGINT)
        return await self.process.ended()


@contextlib.asynccontextmanager
async def serving(
    path: Path,
    *,
    env: Mapping[str, str] | None = None,
    secrets: Sequence[str] = (),
    ready: bool = True,
    watching: bool = False,
    codes: Sequence[int] = (0,),
) -> AsyncIterator[Router]:
    """Run `ollamux serve --config path`, and stop it at the end; waits until it is ready.

    Whatever the test does: it must end with one of `codes`, and have said nothing but JSON on
    standard error, without a traceback and without any of the `secrets`.
    """
    async with (
        asyncio.timeout(60),
        started("serve", "--config", str(path), env=env) as process,
        aiohttp.ClientSession() as session,
    ):
        line = await process.logged("listening")
        router = Router(process, path, session, line["clients"][0], line["admin"][0])
        if ready:
            await process.logged("ready")
        if watching:
            await router.watching()
        yield router
        assert await router.stop() in codes
        assert process.log
        assert not process.out.lines
        assert "Traceback" not in process.text
        assert not [line for line in process.log if "exception" in line]
        assert not [secret for secret in secrets if secret in process.text]


class Supervisor:
    """What systemd hears from a process: `messages`, each with its states.

    `path` is that of a socket, or with a leading @ a name in the abstract namespace.
    """

    def __init__(self, path: str) -> None:
        self.env = {"NOTIFY_SOCKET": path}
        self.messages: list[dict[str, str]] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._sock.bind("\0" + path[1:] if path.startswith("@") else path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    async def heard(self, key: str) -> dict[str, str]:
        """The next message with a state of this key; waits for it."""
        while True:
            data = await asyncio.get_running_loop().sock_recv(self._sock, 65536)
            if key in self._take(data):
                return self.messages[-1]

    def so_far(self) -> Sequence[Mapping[str, str]]:
        """All messages, with those that are there and nobody has waited for."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._take(self._sock.recv(65536))
        return self.messages

    def _take(self, data: bytes) -> dict[str, str]:
        pairs = (line.partition("=") for line in data.decode().split("\n"))
        self.messages.append({key: value for key, _, value in pairs})
        return self.messages[-1]
