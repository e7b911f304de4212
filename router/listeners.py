"""The sockets that this process listens on: opened here, or given by who had them before."""

import asyncio
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from router.address import Address
from router.downstream import Server

Role = Literal["clients", "admin"]


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket that listens, and for whom. `address`: the one of the configuration that it stands
    for; None stands for all of its role, whatever the configuration names."""

    role: Role
    address: str | None
    sock: socket.socket


async def close(*servers: asyncio.Server) -> None:
    """Accept no more; what was accepted has its protocol when this returns.

    asyncio drops a connection whose server is closed between its accept and its task.
    """
    loop = asyncio.get_running_loop()
    for server in servers:
        for sock in server.sockets:
            loop.remove_reader(sock.fileno())
    for _ in range(2):
        await asyncio.sleep(0)
    for server in servers:
        server.close()
    await asyncio.sleep(0)


@dataclass(slots=True)
class Listeners:
    """All listeners of one server. `bound` is told each address, with its port.

    Those that another process has had do not accept before `accept`: until this one can serve,
    connections wait in the kernel, or go to the other process.
    """

    role: Role
    server: Server
    bound: Callable[[Iterable[tuple[str, int]]], None]
    _open: list[tuple[str | None, asyncio.Server]] = field(default_factory=list)
    _held: list[asyncio.Server] = field(default_factory=list)

    async def open(
        self, wanted: Sequence[Address], given: Sequence[Listener] = ()
    ) -> Sequence[Listener]:
        """Listen on every wanted address; where a socket was given for it, on that one. Says
        which of those given are used.

        Raises OSError for an address that cannot be had.
        """
        texts = {str(address) for address in wanted}
        mine = [one for one in given if one.role == self.role]
        whole = [one for one in mine if one.address is None]
        used = whole or [one for one in mine if one.address in texts]
        for one in used:
            await self._adopt(one)
        had = {one.address for one in used}
        for address in () if whole else wanted:
            if str(address) not in had:
                await self._bind(address)
        return used

    async def accept(self) -> None:
        """Accept on the sockets that were given, too."""
        held, self._held = self._held, []
        for server in held:
            await server.start_serving()

    async def stop(self) -> None:
        """Accept no more; what was accepted is known to the server when this returns.

        A socket that another process has as well keeps what it has queued.
        """
        stopped, self._open, self._held = self._open, [], []
        await close(*(server for _, server in stopped))

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """(address, port) of every socket."""
        return [one.sock.getsockname()[:2] for one in self.all()]

    def all(self) -> list[Listener]:
        return [
            Listener(self.role, address, sock)
            for address, server in self._open
            for sock in server.sockets
        ]

    async def _adopt(self, given: Listener) -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            self.server, sock=given.sock, backlog=self.server.room.backlog, start_serving=False
        )
        self._add(given.address, server)
        self._held.append(server)

    async def _bind(self, address: Address) -> None:
        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(
                self.server, address.host, address.port, backlog=self.server.room.backlog
            )
        except OSError as error:
            # asyncio's own text names the address a second time; a failed look-up has none.
            lookup = isinstance(error, socket.gaierror)
            why = error.strerror if lookup else os.strerror(error.errno or 0).lower()
            raise OSError(error.errno, f"cannot listen on {address}: {why}") from error
        self._add(str(address), server)

    def _add(self, address: str | None, server: asyncio.Server) -> None:
        self._open.append((address, server))
        self.bound(sock.getsockname()[:2] for sock in server.sockets)
