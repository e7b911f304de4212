"""The Host and Origin checks of a node that is bound to loopback."""

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

_HOST_ENDS = (".localhost", ".local", ".internal")
_LOCAL_ORIGINS = ("localhost", "127.0.0.1", "0.0.0.0")
_APP_SCHEMES = ("app", "file", "tauri", "vscode-webview", "vscode-file")


def admits(headers: Mapping[str, str], origins: tuple[str, ...]) -> bool:
    """The request's Host and Origin are ones the node talks to. `origins` are allowed as well."""
    host = headers.get("Host", "")
    return _host_ok(host) and _origin_ok(headers.get("Origin", ""), host, origins)


def _host_ok(host: str) -> bool:
    name = urlsplit(f"//{host}").hostname or ""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name in ("", "localhost") or name.endswith(_HOST_ENDS)
    return address.is_private or address.is_loopback or address.is_unspecified


def _origin_ok(origin: str, host: str, origins: tuple[str, ...]) -> bool:
    parts = urlsplit(origin)
    return (
        not origin
        or origin in origins
        or "*" in origins
        or parts.scheme in _APP_SCHEMES
        or (parts.scheme in ("http", "https") and parts.hostname in _LOCAL_ORIGINS)
        or origin in (f"http://{host}", f"https://{host}")
    )
