"""Tell systemd how the process is: sd_notify(3), without a library."""

import asyncio
import os
import socket
import time
from collections.abc import Mapping


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
