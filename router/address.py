"""Where the router listens, and where a node is: `host:port` and URLs, in one form each."""

import ipaddress
import re
from dataclasses import dataclass
from typing import Self

from pydantic_core import PydanticCustomError

_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+))(?::([0-9]{1,5}))?")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?")
_URL = re.compile(r"(?:([A-Za-z][A-Za-z0-9+.-]*)://)?([^/?#]*)([^?#]*)(.*)", re.DOTALL)
_SEGMENT = re.compile(r"(?!\.\.?\Z)(?:[A-Za-z0-9._~!$&'()*+,;=:-]|%[0-9A-Fa-f]{2})+")
_ANY_HOST = ("0.0.0.0", "::")


def _authority(text: str) -> tuple[str, int | None]:
    """Split `host[:port]`; the host comes back in lower case and without brackets."""
    match = _AUTHORITY.fullmatch(text)
    if match is None:
        raise ValueError("host:port is expected, with an IPv6 address in brackets")
    v6, host, port = match[1], (match[2] or "").lower(), int(match[3]) if match[3] else None
    try:
        if v6:
            host = str(ipaddress.IPv6Address(v6))
        elif re.fullmatch("[0-9.]+", host):
            host = str(ipaddress.IPv4Address(host))
    except ValueError:
        raise ValueError("this is no IP address") from None
    labels = host.removesuffix(".").split(".")
    if not v6 and (len(host) > 253 or not all(map(_LABEL.fullmatch, labels))):
        raise ValueError("this is no host name (letters, digits, - and dots; IDNs as punycode)")
    if port is not None and port > 65535:
        raise ValueError("a port is at most 65535")
    return host, port


@dataclass(frozen=True, slots=True)
class Address:
    """Where the router listens. Port 0: any that is free."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: object) -> Self:
        host, port = _authority(as_text(text))
        if port is None:
            raise ValueError("a port is missing: host:port is expected")
        return cls(host, port)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def takes(self, other: "Address") -> bool:
        """Whether both cannot be listened on at once."""
        hosts = {"127.0.0.1" if a.host == "localhost" else a.host for a in (self, other)}
        family = (":" in self.host) == (":" in other.host)
        alike = len(hosts) == 1 or (family and not hosts.isdisjoint(_ANY_HOST))
        return alike and 0 != self.port == other.port

    def reached_by(self, url: "Url") -> bool:
        """Whether who connects to the node's URL ends up here."""
        hosts = {self.host, url.host}
        local = all(map(_is_local, hosts)) and not hosts.isdisjoint((*_ANY_HOST, "localhost"))
        return (len(hosts) == 1 or local) and 0 != self.port == url.port


def _is_local(host: str) -> bool:
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return ip.is_loopback or ip.is_unspecified


@dataclass(frozen=True, slots=True)
class Url:
    """Where a node is: `scheme://host[:port][/prefix]`, each in the one form it is compared in."""

    scheme: str
    host: str
    port: int
    prefix: str = ""

    @classmethod
    def parse(cls, text: object) -> Self:
        """Read a URL, or `host[:port]` as Ollama's clients do: http, port 11434."""
        match = _URL.fullmatch(as_text(text))
        assert match is not None  # the pattern matches any text
        scheme = (match[1] or "http").lower()
        if scheme not in ("http", "https"):
            raise ValueError("an http or https URL is expected")
        if "@" in match[2]:
            raise ValueError("a URL holds no user or password here: use headers")
        if match[4]:
            raise ValueError("a URL has no query and no fragment here")
        host, port = _authority(match[2])
        if port == 0:
            raise ValueError("a node's port is at least 1")
        prefix = match[3].removesuffix("/")
        if not all(map(_SEGMENT.fullmatch, prefix.split("/")[1:])):
            raise ValueError("the path must be plain: no empty parts, no dots alone, no spaces")
        default = 11434 if match[1] is None else 443 if scheme == "https" else 80
        return cls(scheme, host, port or default, prefix)

    @property
    def address(self) -> str:
        return str(Address(self.host, self.port))

    def __str__(self) -> str:
        usual = self.port == (443 if self.scheme == "https" else 80)
        address = self.address.removesuffix(f":{self.port}") if usual else self.address
        return f"{self.scheme}://{address}{self.prefix}"


def as_text(value: object) -> str:
    if not isinstance(value, str):
        raise PydanticCustomError("string_type", "a string is expected")
    return value
