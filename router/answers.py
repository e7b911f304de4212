"""Answers of the router's own making: errors in the caller's dialect, and what is no endpoint."""

import re
import secrets
from urllib.parse import quote

from aiohttp import hdrs, web

from router.core import dialect, wording
from router.core.dialect import Family, Route


def plain(status: int, text: str, **headers: str) -> web.Response:
    """Plain text, as Ollama answers what is no endpoint."""
    return web.Response(status=status, body=text.encode(), headers={
        hdrs.CONTENT_TYPE: "text/plain", **headers
    })  # fmt: skip


def error(family: Family, status: int, message: str) -> web.Response:
    """An error in the caller's dialect."""
    return web.Response(
        status=status,
        body=wording.error_body(family, status, message, new_request_id()),
        headers={hdrs.CONTENT_TYPE: wording.error_type(family)},
    )


def new_request_id() -> str:
    """An id in the form that Anthropic's errors carry."""
    return f"req_{secrets.token_hex(12)}"


def no_route(path: str, query: str, method: str) -> web.Response:
    """What Ollama says of a path that is no endpoint: a redirect to one, or 404."""
    clean = re.sub(r"/{2,}", "/", path).rstrip("/") or "/"
    if clean != path and dialect.find(clean) is not None:
        status = 301 if method == "GET" and path.rstrip("/") == clean else 307
        return plain(status, "", Location=quote(clean, safe="/:@") + query)
    return plain(404, "404 page not found")


def wrong_method(route: Route) -> web.Response:
    return plain(405, "405 method not allowed", Allow=", ".join(route.methods))
