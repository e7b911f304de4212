"""One process after the other at the same addresses: what is handed over, and what is not lost."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvloop

from router import takeover
from router.listeners import Listener
from router.sim import Fault, FaultKind, SimNode
from router.takeover import Handover, Meeting, Predecessor
from tests.process import ROOT, Process, environment, ran, settings, started, write
from tests.rig import MODEL, Talk, model, rig, spec, talk

STALL = Fault(FaultKind.STALL, path="/api/chat", after=2)
QUICK = "quick:1b"
CHAT = b'{"model":"llama3:8b","messages":[{"role":"user","content":"hello"}]}'


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory whose name is short enough for a Unix socket in it."""
    with tempfile.TemporaryDirectory(prefix="ollamux-test-") as path:
        yield Path(path)


def listening() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def port(sock: socket.socket) -> int:
    number: int = sock.getsockname()[1]
    return number


# Where processes meet


def test_a_configuration_has_one_meeting_point_wherever_it_is_asked_from(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = {"XDG_RUNTIME_DIR": str(place)}
    monkeypatch.chdir(place)
    mine = takeover.meeting_point(env, place / "router.yaml")
    assert mine.parent == place
    assert mine == takeover.meeting_point(env, Path("router.yaml"))
    assert mine != takeover.meeting_point(env, place / "other.yaml")
    assert mine != takeover.meeting_point(env, None)


def test_the_service_managers_directory_goes_before_the_users(place: Path) -> None:
    env = {"RUNTIME_DIRECTORY": "/run/ollamux:/run/more", "XDG_RUNTIME_DIR": "/run/user/7"}
    assert takeover.meeting_point(env, None).parent == Path("/run/ollamux")


def test_without_either_the_directory_is_made_for_this_user_alone(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    for _ in range(2):
        made = takeover.meeting_point({}, None).parent
    assert made == place / f"ollamux-{os.geteuid()}"
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


def as_link(path: Path) -> None:
    target = path.with_name("target")
    target.mkdir(mode=0o700)
    path.symlink_to(target)


def as_open(path: Path) -> None:
    path.mkdir()
    path.chmod(0o750)


@pytest.mark.parametrize("make", [as_link, as_open, Path.touch])
def test_a_directory_that_others_may_reach_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    make(place / f"ollamux-{os.geteuid()}")
    with pytest.raises(PermissionError, match="is no directory of this user alone"):
        takeover.meeting_point({}, None)


def test_only_this_user_may_ask(place: Path) -> None:
    meeting = takeover.meet(place / "m.sock")
    assert stat.S_IMODE(meeting.path.stat().st_mode) == 0o600
    meeting.close()
    assert not meeting.path.exists()


def test_the_socket_of_a_dead_process_is_replaced_and_that_of_a_live_one_is_not(
    place: Path,
) -> None:
    path = place / "m.sock"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    live = takeover.meet(path)
    with pytest.raises(OSError, match="in use"):
        takeover.meet(path)
    assert path.exists()
    live.close()


def test_what_is_no_socket_is_left_alone(place: Path) -> None:
    path = place / "m.sock"
    path.write_text("mine")
    with pytest.raises(OSError, match="in use"):
        takeover.meet(path)
    assert path.read_text() == "mine"


# What is said between them


@dataclass
class Old:
    """A process that can be taken over from, and what has become of it."""

    meeting: Meeting
    given: list[Listener]
    task: asyncio.Task[None]
    relieved_by: list[int] = field(default_factory=list)

    async def ask(self) -> Predecessor:
        return await asyncio.to_thread(takeover.ask, self.meeting.path)


@contextlib.asynccontextmanager
async def old(place: Path, **fields: Any) -> AsyncIterator[Old]:
    meeting = await asyncio.to_thread(takeover.meet, place / "m.sock")
    with listening() as clients, listening() as admin:
        given = [
            Listener("clients", "127.0.0.1:0", clients),
            Listener("admin", None, admin),
        ]
        told: list[int] = []

        async def relieved(pid: int) -> None:
            told.append(pid)

        handover = Handover(
            meeting, lambda: given, lambda: {"told": list(told)}, relieved, **fields
        )
        async with asyncio.TaskGroup() as group:
            made = Old(meeting, given, group.create_task(handover.run()), told)
            yield made
            made.task.cancel()
    await asyncio.to_thread(meeting.close)


def close(predecessor: Predecessor) -> None:
    predecessor.meeting.sock.close()
    for one in predecessor.listeners:
        one.sock.close()


async def test_the_sockets_come_with_what_they_are_for(place: Path) -> None:
    async with old(place) as it:
        before = await it.ask()
        assert before.pid == os.getpid()
        assert before.state == {"told": []}
        came = [(one.role, one.address, port(one.sock)) for one in before.listeners]
        assert came == [(one.role, one.address, port(one.sock)) for one in it.given]
        assert not any(os.get_inheritable(one.sock.fileno()) for one in before.listeners)
        assert before.meeting.sock.getsockname() == str(it.meeting.path)
        assert it.relieved_by == []
        assert await before.relieve() == {"told": [os.getpid()]}
        await it.task
        close(before)
    assert it.meeting.path.exists()  # it is the other one's now


async def test_one_that_ends_before_it_serves_has_changed_nothing(place: Path) -> None:
    async with old(place) as it:
        for _ in range(3):
            before = await it.ask()
            close(before)
            before._line.close()
        before = await it.ask()
        assert await before.relieve() == {"told": [os.getpid()]}
        close(before)


async def test_the_old_one_may_end_meanwhile(place: Path) -> None:
    async with old(place) as it:
        before = await it.ask()
        it.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await it.task
        await asyncio.to_thread(it.meeting.close)
        assert await before.relieve() == before.state
        # What was promised stays where the next one looks for it.
        assert before.meeting.path.exists()
        await asyncio.to_thread(before.meeting.close)
        assert not before.meeting.path.exists()
        close(before)


async def test_who_only_looks_whether_somebody_is_there_disturbs_nothing(place: Path) -> None:
    async with old(place) as it:
        with pytest.raises(OSError, match="in use"):
            await asyncio.to_thread(takeover.meet, it.meeting.path)
        before = await it.ask()
        await before.relieve()
        close(before)


@pytest.mark.parametrize(
    "said",
    [
        b"\n",
        b"[]\n",
        b"\xff\n",
        b'{"version": 2, "pid": 1}\n',
        b'{"version": 1}\n',
        b"{" * 9000,
        b"[" * 100_000 + b"\n",
    ],
)
async def test_who_says_anything_else_gets_no_socket(place: Path, said: bytes) -> None:
    async with old(place) as it:
        reader, writer = await asyncio.open_unix_connection(it.meeting.path)
        writer.write(said)
        writer.write_eof()
        answer = await reader.read()
        assert b"listeners" not in answer
        writer.close()
        before = await it.ask()
        await before.relieve()
        close(before)


@pytest.mark.parametrize("limit", ["_QUESTION_S", "_PREPARED_S"])
async def test_who_says_nothing_more_does_not_keep_others_from_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(takeover, limit, 0.05)
    async with old(place) as it:
        if limit == "_QUESTION_S":
            _, silent = await asyncio.open_unix_connection(it.meeting.path)
        else:
            first = await it.ask()
        before = await it.ask()
        await before.relieve()
        assert it.relieved_by == [os.getpid()]
        close(before)
        if limit == "_QUESTION_S":
            silent.close()
        else:
            close(first)
            first._line.close()


async def test_another_user_gets_no_socket(place: Path) -> None:
    async with old(place, uid=os.geteuid() + 1) as it:
        with pytest.raises(OSError, match="cannot take over: the running process has hung up"):
            await it.ask()


async def scripted(place: Path, answer: bytes) -> str:
    """What a process says of a predecessor that answers like this."""
    path = place / "m.sock"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(answer)
        writer.close()

    async with await asyncio.start_unix_server(serve, path):
        with pytest.raises(OSError, match="cannot take over: ") as refused:
            await asyncio.to_thread(takeover.ask, path)
    return str(refused.value.strerror)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "the running process has hung up"),
        (b'{"listen', "the running process has hung up"),
        (b'{"error": "not now"}\n', "not now"),
        (b'{"version": 2}\n', "the running process is of another version"),
        (
            b'{"pid": 1, "listeners": [], "state": {}}\n',
            "the running process is of another version",
        ),
    ],
)
async def test_an_answer_without_sockets_is_told_in_one_line(
    place: Path, answer: bytes, why: str
) -> None:
    assert await scripted(place, answer) == f"cannot take over: {why}"


async def test_a_path_that_no_socket_can_have_is_told(place: Path) -> None:
    with pytest.raises(OSError, match=r"cannot take over: .* path too long"):
        await asyncio.to_thread(takeover.ask, place / ("x" * 200))


# Real processes


@dataclass
class Chain:
    """Processes of one configuration, each of which may take over from the one before."""

    path: Path
    stack: contextlib.AsyncExitStack
    env: dict[str, str]
    url: str = ""
    admin: str = ""

    async def start(self, *args: str, ready: bool = True) -> Process:
        command = ("serve", "--config", str(self.path), *args)
        process = await self.stack.enter_async_context(started(*command, env=self.env))
        if ready:
            line = await process.logged("listening")
            self.url, self.admin = line["clients"][0], line["admin"][0]
            await process.logged("ready")
        return process


@contextlib.asynccontextmanager
async def chain(place: Path, *nodes: SimNode, **sections: Any) -> AsyncIterator[Chain]:
    path = place / "router.yaml"
    write(path, settings(*nodes, **sections))
    async with contextlib.AsyncExitStack() as stack:
        yield Chain(path, stack, {"XDG_RUNTIME_DIR": str(place)})


async def ask(url: str) -> str | None:
    """Which process answers: the part of a request's id that is one run's own."""
    async with talk(url) as client:
        await client.send(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = await client.answer()
        assert answer.status == 200
        return run_of(answer.header("X-Ollamux-Request-Id"))


def run_of(request_id: str | None) -> str:
    assert request_id is not None
    return request_id.partition("-")[0]


async def test_takes_the_addresses_over_and_the_old_process_ends(place: Path) -> None:
    async with SimNode(spec()) as node, chain(place, node) as it:
        first = await it.start()
        url, admin, run = it.url, it.admin, await ask(it.url)
        second = await it.start("--takeover")
        assert (it.url, it.admin) == (url, admin)
        assert (await first.logged("handed over"))["to"] == second.pid
        assert await first.ended() == 0
        assert (await second.logged("taken over"))["of"] == first.pid
        assert await ask(it.url) != run
        second.signal(signal.SIGTERM)
        assert await second.ended() == 0
        assert not [name for name in os.listdir(place) if name.endswith(".sock")]
        assert not [line for p in (first, second) for line in p.log if line["level"] == "error"]


async def test_with_nobody_to_take_over_from_it_says_what_to_do(place: Path) -> None:
    path = place / "router.yaml"
    write(path, {**settings(), "nodes": ["127.0.0.1:1"]})
    env = {"XDG_RUNTIME_DIR": str(place)}
    code, out, err = await ran("serve", "--takeover", "--config", str(path), env=env)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert err.startswith("ollamux: cannot take over: no process serves this configuration")
    assert err.endswith("start without --takeover")


async def test_where_nobody_could_meet_it_serves_all_the_same_and_says_so(place: Path) -> None:
    async with SimNode(spec()) as node, chain(place, node) as it:
        it.env["XDG_RUNTIME_DIR"] = str(place / "missing")
        process = await it.start()
        await process.logged("no process can take over", level="warning")
        assert await ask(it.url)


async def test_a_second_start_does_not_steal_the_place_of_the_first(place: Path) -> None:
    async with SimNode(spec()) as node, chain(place, node) as it:
        first = await it.start()  # port 0: both can have their own
        second = await it.start()
        await second.logged("no process can take over")
        second.signal(signal.SIGTERM)
        assert await second.ended() == 0
        third = await it.start("--takeover")
        assert (await third.logged("taken over"))["of"] == first.pid


async def test_one_that_dies_before_it_serves_leaves_the_old_one_as_it_was(place: Path) -> None:
    async with SimNode(spec()) as node, chain(place, node, probe={"timeout_s": 3600}) as it:
        first = await it.start()
        run = await ask(it.url)
        node.fault = Fault(FaultKind.HANG, path="/api/version")
        for number in (signal.SIGKILL, signal.SIGTERM):
            second = await it.start("--takeover", ready=False)
            await second.logged("listening")
            await node.until(lambda: node.held > 0)
            assert await ask(it.url) == run
            second.signal(number)
            await second.ended()
            await first.logged("takeover failed, this process goes on")
        assert await ask(it.url) == run
        node.fault = None
        node.release()
        third = await it.start("--takeover")
        assert (await third.logged("taken over"))["of"] == first.pid
        assert await first.ended() == 0


async def test_an_address_that_only_the_new_configuration_has_is_opened_and_others_are_closed(
    place: Path,
) -> None:
    async with SimNode(spec()) as node, chain(place, node) as it:
        await it.start()
        clients, admin = it.url, it.admin
        write(it.path, settings(node, listen=["127.0.0.1:0", "[::1]:0"], admin="localhost:0"))
        second = await it.start("--takeover")
        line = next(one for one in second.log if one["event"] == "listening")
        assert line["clients"][0] == clients
        assert len(line["clients"]) == 2
        assert admin not in line["admin"]
        for url in line["clients"]:
            if "[" not in url:
                assert await ask(url)
        with pytest.raises(ConnectionRefusedError):
            async with talk(admin):
                pass


async def test_an_address_that_cannot_be_had_ends_the_takeover_and_not_the_old_process(
    place: Path,
) -> None:
    async with SimNode(spec()) as node, chain(place, node) as it:
        first = await it.start()
        run = await ask(it.url)
        with listening() as taken:
            write(it.path, settings(node, listen=["127.0.0.1:0", f"127.0.0.1:{port(taken)}"]))
            second = await it.start("--takeover", ready=False)
            assert await second.ended() == 1
            assert str(second.err).endswith("address already in use")
        await first.logged("takeover failed, this process goes on")
        assert await ask(it.url) == run
        write(it.path, settings(node))
        await it.start("--takeover")
        assert await ask(it.url) != run


async def test_a_kept_connection_is_answered_once_more_and_told_to_close(place: Path) -> None:
    async with SimNode(spec()) as node, chain(place, node) as it:
        first = await it.start()
        async with talk(it.url) as kept, talk(it.admin) as scraper:
            for one in (kept, scraper):
                await one.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert (await one.answer()).header("Connection") is None
            await it.start("--takeover")
            await first.logged("stopping", in_flight=0)
            await kept.post("/api/chat", CHAT)
            answer = await kept.answer()
            assert (answer.status, answer.header("Connection")) == (200, "close")
            assert answer.whole
            assert await kept.rest() == b""
            assert first.running
            await scraper.send(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = await scraper.answer()
            # Who asks here asks for the service, and that is there.
            assert (answer.status, answer.header("Connection")) == (200, "close")
            assert await first.ended() == 0


async def test_a_signal_after_a_takeover_waits_for_requests_and_no_more_for_idle_connections(
    place: Path,
) -> None:
    async with SimNode(spec(num_parallel=4)) as node, chain(place, node) as it:
        node.fault = STALL
        first = await it.start()
        async with talk(it.url) as kept, talk(it.url) as busy:
            await kept.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await kept.answer()
            await busy.post("/api/chat", CHAT)
            await busy.head()
            await it.start("--takeover")
            await first.logged("stopping", in_flight=1)
            first.signal(signal.SIGTERM)
            await node.until(lambda: node.held == 1)
            assert first.running
            node.release()
            while await busy.chunk():
                pass
            assert await first.ended() == 0
            assert await kept.rest() == b""


async def test_an_idle_connection_is_closed_in_time_and_a_busy_one_is_not() -> None:
    async with rig() as r:
        r.nodes[0].fault = Fault(FaultKind.HANG)
        async with talk(r.url) as idle, talk(r.url) as busy, talk(r.url) as silent:
            await idle.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await idle.answer()
            await busy.post("/api/chat", CHAT)
            await r.nodes[0].until(lambda: r.nodes[0].held == 1)
            async with asyncio.TaskGroup() as group:
                left = group.create_task(r.app._server.deserted(0.05))
                assert await idle.rest() == b""
                assert await silent.rest() == b""
                assert not left.done()
                r.nodes[0].fault = None
                r.nodes[0].release()
                answer = await busy.answer()
                assert (answer.status, answer.whole) == (200, True)
                assert await busy.rest() == b""
            assert not r.app._server.connections


async def test_a_connection_that_is_not_idle_for_long_enough_is_left_alone() -> None:
    async with rig() as r, talk(r.url) as kept, asyncio.TaskGroup() as group:
        left = group.create_task(r.app._server.deserted(3600))
        for _ in range(3):
            await kept.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await kept.answer()).status == 200
        assert not left.done()
        kept.leave()


async def let_in(turns: int) -> None:
    """Stop accepting while nine connections come, `turns` turns of the loop after that."""
    async with rig() as r:
        clients, _ = r.app.listeners
        beside = socket.socket(fileno=os.dup(clients.sock.fileno()))
        address = beside.getsockname()
        came = [socket.create_connection(address) for _ in range(9)]
        for _ in range(turns):
            await asyncio.sleep(0)
        await r.app.hand_over()
        queued = 0
        with beside, contextlib.suppress(BlockingIOError):
            beside.setblocking(False)
            while True:
                beside.accept()[0].close()
                queued += 1
        assert len(r.app._server.connections) + queued == 9
        for sock in came:
            sock.close()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("turns", range(6))
def test_whoever_comes_in_the_moment_of_the_stop_is_served_or_left_in_the_queue(
    loop: str, turns: int
) -> None:
    make = uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=make) as runner:
        runner.run(let_in(turns))


# Sockets of systemd

_AS_SYSTEMD = """
import fcntl, os, sys
fds, path = sys.argv[1:]
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in fds.split(",")]
for at, fd in enumerate(high):
    os.dup2(fd, 3 + at)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "router", "serve", "--config", path])
"""


async def under_systemd(
    stack: contextlib.AsyncExitStack, path: Path, socks: Sequence[socket.socket], names: str = ""
) -> Process:
    """Start a process as systemd does: its sockets are the descriptors from 3 on."""
    fds = [sock.fileno() for sock in socks]
    env = {"LISTEN_FDS": str(len(socks)), "XDG_RUNTIME_DIR": str(path.parent)}
    if names:
        env["LISTEN_FDNAMES"] = names
    transport, process = await asyncio.get_running_loop().subprocess_exec(
        Process, sys.executable, "-c", _AS_SYSTEMD, ",".join(map(str, fds)), str(path),
        stdin=subprocess.DEVNULL, env=environment(env), cwd=ROOT, pass_fds=fds,
    )  # fmt: skip

    async def end() -> None:
        if process.running:
            transport.kill()
        await process.ended()
        transport.close()

    stack.push_async_callback(end)
    return process


@pytest.mark.parametrize("named", [True, False])
async def test_serves_on_the_sockets_that_systemd_keeps(place: Path, named: bool) -> None:
    path = place / "router.yaml"
    async with SimNode(spec()) as node, contextlib.AsyncExitStack() as stack:
        clients, admin = listening(), listening()
        stack.callback(clients.close)
        stack.callback(admin.close)
        # `listen` is an address that this process could not have.
        write(path, settings(node, listen="192.0.2.1:1", admin=f"127.0.0.1:{port(admin)}"))
        socks = [admin, clients] if named else [clients, admin]
        names = "admin:clients" if named else "ollamux.socket:ollamux.socket"
        for _ in range(2):
            # Who comes before it serves waits in the queue that systemd keeps.
            async with talk(f"http://127.0.0.1:{port(clients)}") as early:
                await early.send(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
                process = await under_systemd(stack, path, socks, names)
                line = await process.logged("listening")
                assert line["clients"] == [f"http://127.0.0.1:{port(clients)}"]
                assert line["admin"] == [f"http://127.0.0.1:{port(admin)}"]
                assert (await early.answer()).status == 200
            async with talk(line["admin"][0]) as scraper:
                await scraper.send(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert (await scraper.answer()).body == b"ready\n"
            process.signal(signal.SIGTERM)
            assert await process.ended() == 0


async def test_sockets_of_systemd_go_on_from_process_to_process(place: Path) -> None:
    async with SimNode(spec()) as node, chain(place, node) as it:
        with listening() as clients:
            first = await under_systemd(it.stack, it.path, [clients])
            await first.logged("ready")
            await it.start("--takeover")
            assert it.url == f"http://127.0.0.1:{port(clients)}"
            assert await first.ended() == 0


# Nothing lost


@dataclass
class Load:
    """Clients that never stop asking. Whatever is not a whole 200 ends the test."""

    url: str
    fresh: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    turned: int = 0
    over: bool = False

    async def ask_afresh(self) -> None:
        """A connection for each request."""
        while not self.over:
            async with talk(self.url) as client:
                run, _ = await self._asked(client, "Connection: close")
                self.fresh.append(run)
            await asyncio.sleep(0.05)

    async def ask_again(self) -> None:
        """One connection, until an answer says that it is the last on it."""
        while not self.over:
            async with talk(self.url) as client:
                await self._use_up(client)

    async def has_met(self, count: int) -> None:
        """Wait until so many processes have answered, on both kinds of connections."""
        while min(len({*self.fresh}), len({*self.kept})) < count:  # noqa: ASYNC110 - as below
            await asyncio.sleep(0.05)

    async def _use_up(self, client: Talk) -> None:
        while not self.over:
            run, last = await self._asked(client)
            self.kept.append(run)
            await asyncio.sleep(0.05)
            if last:
                self.turned += 1
                return

    async def _asked(self, client: Talk, *headers: str) -> tuple[str, bool]:
        """(who answered, whether it was the last answer on this connection)."""
        body = json.dumps({"model": QUICK, "prompt": "x", "stream": False}).encode()
        await client.post("/api/generate", body, *headers)
        answer = await client.answer()
        assert (answer.status, answer.whole) == (200, True)
        assert json.loads(answer.body)["done"] is True
        run = run_of(answer.header("X-Ollamux-Request-Id"))
        return run, answer.header("Connection") == "close"


@dataclass
class Streams:
    """Chats that begin at one process and end when it has long been replaced."""

    url: str
    session: aiohttp.ClientSession
    begun: int = 0
    runs: list[str] = field(default_factory=list)

    async def one(self, node: str) -> None:
        body = {"model": f"{MODEL}@{node}", "messages": [{"role": "user", "content": "tell me"}]}
        async with self.session.post(f"{self.url}/api/chat", json=body) as answer:
            assert answer.status == 200
            records = []
            async for line in answer.content:
                records.append(json.loads(line))
                self.begun += len(records) == 1
        *parts, final = records
        assert final["done"] is True
        assert final["eval_count"] == len([part for part in parts if part["message"]["content"]])
        self.runs.append(run_of(answer.headers["X-Ollamux-Request-Id"]))

    async def have_begun(self, count: int) -> None:
        while self.begun < count:  # noqa: ASYNC110 - nothing tells of a change
            await asyncio.sleep(0.01)


async def restart_five_times(
    it: Chain, first: Process, streams: Streams, group: asyncio.TaskGroup
) -> list[Process]:
    """One process after the other takes over, and 40 streams begin at each before that."""
    processes = [first]
    for number in range(1, 6):
        for node in ("n1", "n2") * 20:
            group.create_task(streams.one(node))
        await streams.have_begun(40 * number)
        processes.append(await it.start("--takeover"))
        # At least those that the first node holds.
        assert (await processes[-2].logged("stopping"))["in_flight"] >= 20
    return processes


async def test_kept_connections_lose_nothing_where_no_request_holds_the_old_process(
    place: Path,
) -> None:
    async with SimNode(spec(model(QUICK), num_parallel=64)) as node, chain(place, node) as it:
        processes = [await it.start()]
        load = Load(it.url)
        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(load.ask_again())
            for _ in range(3):
                processes.append(await it.start("--takeover"))
                # Nobody waits long for clients that come back at once.
                assert await processes[-2].ended() == 0
            load.over = True
    assert load.turned >= 3 * 8
    lines = [line for process in processes for line in process.log]
    outcomes = [line["outcome"] for line in lines if line["event"] == "request"]
    assert outcomes == ["ok"] * len(load.kept)


async def test_not_one_request_is_lost_over_five_restarts(place: Path) -> None:
    models = model(decode_tps=8), model(QUICK)
    busy = {"num_parallel": 512, "answer_tokens": (24, 24), "memory_bytes": 1 << 50}
    async with (
        SimNode(spec(*models, **busy)) as held,
        SimNode(spec(*models, **busy)) as flowing,
        chain(place, held, flowing) as it,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session,
    ):
        held.fault = STALL  # its streams cross every restart that comes
        process = await it.start()
        load, streams = Load(it.url), Streams(it.url, session)
        async with asyncio.TaskGroup() as group:
            for ask_on in (load.ask_afresh, load.ask_again) * 4:
                group.create_task(ask_on())
            processes = await restart_five_times(it, process, streams, group)
            await load.has_met(6)
            held.fault = None
            while len(streams.runs) < 200:
                held.release()
                await asyncio.sleep(0.05)
            load.over = True
        await session.close()
        for process in processes[:-1]:
            assert await process.ended() == 0
        last = processes[-1]
        last.signal(signal.SIGTERM)
        assert await last.ended() == 0
    lines = [line for process in processes for line in process.log]
    requests = [line for line in lines if line["event"] == "request"]
    assert not [line for line in lines if line["level"] != "info"]
    assert {line["outcome"] for line in requests} == {"ok"}
    runs = {run_of(line["id"]) for line in requests}
    assert len(runs) == len({process.pid for process in processes}) == 6
    assert runs == {*load.fresh} == {*load.kept}
    assert len(streams.runs) == 200
    assert runs > {*streams.runs}
    assert len({*streams.runs}) == 5
    assert min(len(load.fresh), len(load.kept)) > 200
    assert load.turned >= 5 * 4  # each of the four was told at each restart
    assert len(requests) == len(load.fresh) + len(load.kept) + 200
