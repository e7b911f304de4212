"""Which Host a request to a loopback listener may name, as Ollama has it.

A page in a browser can let its own host's name stand for 127.0.0.1, and is then of the same origin
as whatever listens there (DNS rebinding). What it cannot change is the Host that it sends.
"""

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import cast

from aiohttp import web

from router.downstream import Connection, Request

_AUTHORITY = re.compile(r"\[([^\[\]]*)\](?::\d*)?|([^:]*)(?::[^:]*)?")
_ENDS = (".localhost", ".local", ".internal")
_PRIVATE = [
    ipaddress.ip_network(one)
    for one in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
]
_Answered = Awaitable[web.StreamResponse]


class Guard:
    """`machine` is this machine's own name. `loopback` are the listeners' addresses at which it is
    checked: what has come to one that is bound elsewhere is nobody's own host."""

    def __init__(self, machine: str) -> None:
        self.loopback: set[tuple[str, int]] = set()
        self._names = frozenset(("", "localhost", machine.lower()))

    def watch(self, bound: Iterable[tuple[str, int]]) -> None:
        """Check what comes to those of these addresses that are on loopback."""
        self.loopback |= {
            address[:2] for address in bound if ipaddress.ip_address(address[0]).is_loopback
        }

    def admits(self, request: Request) -> bool:
        """Whether the request may be answered. A connection that goes on as it began is asked
        once."""
        connection = cast(Connection, request.protocol)
        host = request.called
        if host == connection.admitted:
            return True
        if connection.local in self.loopback and not self.knows(host):
            return False
        connection.admitted = host
        return True

    def knows(self, authority: str) -> bool:
        """Whether this host, with a port or not, is none that a stranger can have."""
        match = _AUTHORITY.fullmatch(authority)
        host = (match[1] or match[2] or "") if match else authority
        host = host.lower()
        return host in self._names or host.endswith(_ENDS) or _is_near(host)

    def before(self, handler: Callable[[Request], _Answered]) -> Callable[[Request], _Answered]:
        """A handler that is asked only what may be answered."""

        async def guarded(request: Request) -> web.StreamResponse:
            return await handler(request) if self.admits(request) else web.Response(status=403)

        return guarded


def _is_near(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    private = any(address in network for network in _PRIVATE)
    return private or address.is_loopback or address.is_unspecified or _is_own(address)


def _is_own(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether this machine has the address: only then may a socket have it."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except (OSError, TypeError):  # a zone that no socket takes
        return False
    return True
