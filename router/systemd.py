"""What passes between systemd and this process, without a library: sd_notify(3) tells how it is,
sd_listen_fds(3) brings sockets."""

import asyncio
import itertools
import os
import socket
import time
from collections.abc import Mapping, MutableMapping

from router.listeners import Listener, Role

_FIRST_FD = 3
_NAMED: Mapping[str, Role] = {"clients": "clients", "admin": "admin"}


class Notifier:
    """Sends states to the socket that the environment names; without one, nothing happens."""

    def __init__(self, env: Mapping[str, str]) -> None:
        path = env.get("NOTIFY_SOCKET", "")
        # A leading "@" stands for the abstract namespace, whose names begin with a NUL.
        self._path = "\0" + path[1:] if path.startswith("@") else path
        usec = env.get("WATCHDOG_USEC", "")
        mine = env.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_s = int(usec) / 1e6 if usec.isdigit() and mine else 0.0

    def send(self, **states: str) -> None:
        """`send(READY="1", STATUS="3 of 4 nodes up")`. A supervisor that is gone is no error."""
        if not self._path:
            return
        message = "\n".join(f"{key}={value}" for key, value in states.items()).encode()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            try:
                sock.connect(self._path)
                sock.send(message)
            except OSError:
                return

    def reloading(self) -> None:
        usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.send(RELOADING="1", MONOTONIC_USEC=str(usec))

    async def feed_watchdog(self) -> None:
        """Ping at half the limit, so that an event loop that hangs is noticed."""
        while self.watchdog_s:
            self.send(WATCHDOG="1")
            await asyncio.sleep(self.watchdog_s / 2)


def sockets(env: MutableMapping[str, str], admin_port: int) -> list[Listener]:
    """The sockets that systemd keeps for this process; takes what tells of them out of `env`.

    `FileDescriptorName=` says for whom one is: `clients` or `admin`. Without that, the one with
    the admin listener's port is the admin's, and all others are the clients'. Raises OSError for
    one that no client could connect to.
    """
    pid, count, names = (
        env.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
    )
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    fds = range(_FIRST_FD, _FIRST_FD + int(count))
    named = itertools.zip_longest(fds, names.split(":")[: len(fds)])
    return [_given(fd, name, admin_port) for fd, name in named]


def _given(fd: int, name: str | None, admin_port: int) -> Listener:
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    sock.setblocking(False)
    tcp = sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM
    if not tcp or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.close()
        raise OSError(f"systemd gives a socket that does not listen for TCP: {name or fd}")
    by_port: Role = "admin" if sock.getsockname()[1] == admin_port else "clients"
    return Listener(_NAMED.get(name or "", by_port), None, sock)
