"""A process hands its listening sockets to the one that takes its place, over a Unix socket.

The new process asks and gets the sockets and what else it should know. It prepares while the old
one serves, begins to serve, and only then says so: until that, its end changes nothing. Then the
old one accepts no more, and answers. Every message is one line of JSON; the descriptors come with
the first byte of their line.
"""

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import socket
import stat
import struct
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from router import log
from router.listeners import Listener

State = Mapping[str, Any]
_VERSION = 1
_ANSWER_S = 10.0
_QUESTION_S = 1.0
_PREPARED_S = 60.0  # the other one starts, and looks at every node
_PAUSE_S = 1.0
_FDS_MAX = 253  # as many as Linux sends at once
_LINE_MAX_BYTES = 8 << 20
_PIECE_BYTES = 65536
_HUNG_UP = "the running process has hung up"


def meeting_point(env: Mapping[str, str], config: Path | None) -> Path:
    """Where the processes of one configuration find each other.

    Raises OSError where nobody but this user could be kept out.
    """
    name = "environment" if config is None else os.path.abspath(config)
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:16]
    return _directory(env) / f"ollamux-{digest}.sock"


def _directory(env: Mapping[str, str]) -> Path:
    given = env.get("RUNTIME_DIRECTORY", "").split(":")[0] or env.get("XDG_RUNTIME_DIR", "")
    return Path(given) if given else _own_directory(Path(tempfile.gettempdir()))


def _own_directory(parent: Path) -> Path:
    """A directory below one that everybody may write to. Raises OSError if it is not ours."""
    path = parent / f"ollamux-{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    private = stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o700
    if not private or found.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, f"{path} is no directory of this user alone")
    return path


@dataclass(slots=True)
class Meeting:
    """The socket at the meeting point. It goes from hand to hand, and listens all the time;
    `promised` while another process has it as well, and may be the one to stay."""

    path: Path
    sock: socket.socket
    promised: bool = False

    def close(self) -> None:
        """Nobody can take over from here any more."""
        self.sock.close()
        if not self.promised:
            self.path.unlink(missing_ok=True)


def meet(path: Path) -> Meeting:
    """Wait at the meeting point for whoever takes over.

    The socket of a dead process is replaced. Raises OSError where a live one waits already.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _abandoned(path):
            path.unlink()
        sock.bind(str(path))
        path.chmod(0o600)  # before it listens: nobody else ever gets through
        sock.listen(8)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return Meeting(path, sock)


def _abandoned(path: Path) -> bool:
    """Whether a dead process has left its socket there."""
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
        trial.setblocking(False)  # a live one whose queue is full would make this one wait
        return trial.connect_ex(str(path)) == errno.ECONNREFUSED


@dataclass(slots=True)
class Predecessor:
    """The running process that this one takes over from, and what came from it."""

    pid: int
    listeners: Sequence[Listener]
    meeting: Meeting
    state: State
    _line: "_Line"

    async def relieve(self) -> State:
        """Say that this process serves; once this returns, the other accepts no more. Gives its
        last state: what it had sent, if it has died in between."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                await self._line.send({"serving": True})
                return _mapping((await self._line.receive()).get("state"))
        except (OSError, ValueError):
            return self.state
        finally:
            self._line.close()
            self.meeting.promised = False


def ask(path: Path) -> Predecessor:
    """Ask the running process for its sockets; it goes on as it is. Blocks for up to 10 s.

    Raises OSError, with the reason in words, where that comes to nothing.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(_ANSWER_S)
    try:
        return _ask(sock, path)
    except (FileNotFoundError, ConnectionRefusedError):
        why = f"no process serves this configuration ({path}): start without --takeover"
    except TimeoutError:
        why = f"the running process does not answer at {path}: is another takeover going on?"
    except ValueError as error:
        why = str(error)
    except (ConnectionResetError, BrokenPipeError):
        why = _HUNG_UP
    except OSError as error:
        why = f"{path}: {(error.strerror or str(error)).lower()}"
    sock.close()
    raise OSError(errno.ECONNREFUSED, f"cannot take over: {why}")


def _ask(sock: socket.socket, path: Path) -> Predecessor:
    sock.connect(str(path))
    if _peer_uid(sock) not in (None, os.geteuid()):
        raise ValueError(f"the process at {path} is another user's")
    sock.sendall(_encoded({"version": _VERSION, "pid": os.getpid()}))
    fds: list[int] = []
    data = b""
    while not data.endswith(b"\n"):
        piece, came, _, _ = socket.recv_fds(sock, _PIECE_BYTES, _FDS_MAX)
        fds += came
        data += piece
        if not piece:
            break
    socks = [_received(fd) for fd in fds]
    try:
        answer = _decoded(data)
        described = answer["listeners"]
        *mine, meeting = socks
        listeners = [
            Listener(one["role"], one["address"], sock)
            for one, sock in zip(described, mine, strict=True)
        ]
        pid, state = int(answer["pid"]), _mapping(answer["state"])
    except (ValueError, KeyError, TypeError):
        for one in socks:
            one.close()
        raise ValueError(_refusal(data)) from None
    sock.setblocking(False)
    return Predecessor(pid, listeners, Meeting(path, meeting, promised=True), state, _Line(sock))


def _refusal(data: bytes) -> str:
    with contextlib.suppress(ValueError):
        return str(_decoded(data).get("error", "the running process is of another version"))
    return _HUNG_UP


def _received(fd: int) -> socket.socket:
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock


@dataclass(frozen=True, slots=True)
class Succession:
    """What a process begins with: `listeners` that listen already, the process `before` it that
    it takes over from, and the `meeting` at which the next one asks; or why this is the `last`."""

    listeners: Sequence[Listener] = ()
    before: Predecessor | None = None
    meeting: Meeting | None = None
    last: str = ""


@dataclass(slots=True)
class Handover:
    """Where this process waits for the one that takes over from it.

    `listeners` and `state` are what it gets. `relieved` is told the pid of the one that has begun
    to serve, and returns when nothing is accepted here any more.
    """

    meeting: Meeting
    listeners: Callable[[], Sequence[Listener]]
    state: Callable[[], State]
    relieved: Callable[[int], Awaitable[None]]
    uid: int = field(default_factory=os.geteuid)

    async def run(self) -> None:
        """Return once another process has taken over; what fails before that changes nothing."""
        while not await self._meet():
            pass
        # Open, it would keep those waiting who come when the other one is gone.
        self.meeting.close()

    async def _meet(self) -> bool:
        """Whether the next one that comes has taken over."""
        try:
            sock, _ = await asyncio.get_running_loop().sock_accept(self.meeting.sock)
        except OSError:  # no descriptor is left
            await asyncio.sleep(_PAUSE_S)
            return False
        line = _Line(sock)
        try:
            return await self._serve(line)
        except (OSError, ValueError) as error:
            reason = str(error) or "it says nothing"
            log.logger().warning("takeover failed, this process goes on", reason=reason)
            self.meeting.promised = False
            return False
        finally:
            line.close()

    async def _serve(self, line: "_Line") -> bool:
        """Lead one process from its question to its service."""
        if _peer_uid(line.sock) not in (None, self.uid):
            raise PermissionError("a process of another user asked")
        async with asyncio.timeout(_QUESTION_S):
            asked = await line.receive()
        if not asked:
            return False  # it only looked whether anybody is here
        pid = asked.get("pid")
        if asked.get("version") != _VERSION or not isinstance(pid, int):
            await line.send({"error": f"the running process speaks version {_VERSION} only"})
            raise ValueError("it speaks another version of the takeover")
        log.logger().info("takeover begins", to=pid)
        self.meeting.promised = True
        await self._send_sockets(line)
        async with asyncio.timeout(_PREPARED_S):
            ready = await line.receive()
        if not ready.get("serving"):
            raise ValueError(f"process {pid} ended before it served")
        await self.relieved(pid)
        with contextlib.suppress(OSError):  # it serves, even if it does not live to hear of this
            await line.send({"state": self.state()})
        return True

    async def _send_sockets(self, line: "_Line") -> None:
        listeners = self.listeners()
        answer = {
            "version": _VERSION,
            "pid": os.getpid(),
            "listeners": [{"role": one.role, "address": one.address} for one in listeners],
            "state": self.state(),
        }
        fds = [*(one.sock.fileno() for one in listeners), self.meeting.sock.fileno()]
        await line.send(answer, fds)


@dataclass(slots=True)
class _Line:
    """Messages over a connected socket that does not block."""

    sock: socket.socket

    async def send(self, message: State, fds: Sequence[int] = ()) -> None:
        data = _encoded(message)
        if fds:
            # Nothing has been sent before: one byte always fits.
            socket.send_fds(self.sock, [data[:1]], fds)
            data = data[1:]
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def receive(self) -> State:
        """The next message; an empty one stands for the end."""
        loop = asyncio.get_running_loop()
        data = b""
        while not data.endswith(b"\n"):
            piece = await loop.sock_recv(self.sock, _PIECE_BYTES)
            if not piece:
                return {}
            data += piece
            if len(data) > _LINE_MAX_BYTES:
                raise ValueError("a message without end")
        return _decoded(data)

    def close(self) -> None:
        self.sock.close()


def _encoded(message: State) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _decoded(data: bytes) -> State:
    """Raises ValueError for what is no message."""
    try:
        return _mapping(json.loads(data))
    except RecursionError:
        raise ValueError("this is no message of a takeover") from None


def _mapping(value: object) -> State:
    if not isinstance(value, dict):
        raise ValueError("this is no message of a takeover")
    return value


def _peer_uid(sock: socket.socket) -> int | None:
    """Who is at the other end; None where the system does not tell."""
    if sys.platform != "linux":
        return None
    pid_uid_gid = struct.Struct("3i")
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, pid_uid_gid.size)
    uid: int = pid_uid_gid.unpack(data)[1]
    return uid
