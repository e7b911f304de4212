"""Answers of the router's own making: errors in the caller's dialect, and what is no endpoint."""

import math
import re
import secrets
from urllib.parse import quote

from aiohttp import hdrs, web

from router.core import dialect, wording
from router.core.dialect import Family, Route

RETRY_S = 1.0
_LATER = (429, 503)


def plain(status: int, text: str, **headers: str) -> web.Response:
    """Plain text, as Ollama answers what is no endpoint."""
    return web.Response(status=status, body=text.encode(), headers={
        hdrs.CONTENT_TYPE: "text/plain", **headers
    })  # fmt: skip


def error(family: Family, status: int, message: str, *, retry_s: float = RETRY_S) -> web.Response:
    """An error in the caller's dialect. Where another try may do better, it says when."""
    headers = {hdrs.CONTENT_TYPE: wording.error_type(family)}
    if later := retry_after(status, retry_s):
        headers[hdrs.RETRY_AFTER] = later
    body = wording.error_body(family, status, message, new_request_id())
    return web.Response(status=status, body=body, headers=headers)


def retry_after(status: int, retry_s: float = RETRY_S) -> str:
    """In how many seconds another try may do better; empty for an error that stays."""
    return str(max(1, math.ceil(retry_s))) if status in _LATER else ""


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
