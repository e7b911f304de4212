"""Which path and method a simulated node answers, and how it answers all others."""

from collections.abc import Awaitable, Callable, Mapping

from router.sim import (
    anthropic,
    audio,
    blobs,
    catalog,
    cloud,
    create,
    native,
    openai,
    registry,
    responses,
)
from router.sim.exchange import Exchange
from router.sim.versions import Release

Handler = Callable[[Exchange], Awaitable[None]]

ROUTES: Mapping[str, Mapping[str, Handler]] = {
    "/": {"HEAD": catalog.root, "GET": catalog.root},
    "/api/version": {"HEAD": catalog.version, "GET": catalog.version},
    "/api/tags": {"HEAD": catalog.tags, "GET": catalog.tags},
    "/api/status": {"GET": cloud.status},
    "/api/ps": {"GET": catalog.ps},
    "/api/show": {"POST": catalog.show},
    "/api/pull": {"POST": registry.pull},
    "/api/push": {"POST": registry.push},
    "/api/create": {"POST": create.create},
    "/api/copy": {"POST": create.copy},
    "/api/delete": {"DELETE": create.delete},
    "/api/me": {"POST": cloud.me},
    "/api/signout": {"POST": cloud.sign_out},
    "/api/experimental/model-recommendations": {"GET": cloud.recommendations},
    "/api/experimental/web_search": {"POST": cloud.web_search},
    "/api/experimental/web_fetch": {"POST": cloud.web_fetch},
    "/api/chat": {"POST": native.chat},
    "/api/generate": {"POST": native.generate},
    "/api/embed": {"POST": native.embed},
    "/api/embeddings": {"POST": native.embeddings},
    "/v1/chat/completions": {"POST": openai.chat_completions},
    "/v1/completions": {"POST": openai.completions},
    "/v1/embeddings": {"POST": openai.embeddings},
    "/v1/models": {"GET": catalog.openai_list},
    "/v1/messages": {"POST": anthropic.messages},
    "/v1/responses": {"POST": responses.responses},
    "/v1/audio/transcriptions": {"POST": audio.transcriptions},
}
# One more segment, which names what is meant.
_WITH_NAME: Mapping[str, Mapping[str, Handler]] = {
    "/v1/models/": {"GET": catalog.openai_one},
    blobs.PREFIX: {"HEAD": blobs.head, "POST": blobs.post},
    "/api/user/keys/": {"DELETE": cloud.sign_out},
}
INFERENCE = frozenset(
    (
        "/api/chat",
        "/api/generate",
        "/api/embed",
        "/api/embeddings",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/responses",
        "/v1/audio/transcriptions",
    )
)
# The release that first had an endpoint; what is not here is as old as any node.
_SINCE: Mapping[str, Release] = {
    "/api/ps": Release(0, 1, 38),
    "/v1/models": Release(0, 2, 0),
    "/v1/models/": Release(0, 2, 0),
    "/api/embed": Release(0, 2, 6),
    "/api/me": Release(0, 12, 0),
    "/api/signout": Release(0, 12, 0),
    "/api/user/keys/": Release(0, 12, 0),
    "/v1/responses": Release(0, 13, 3),
    "/v1/messages": Release(0, 14, 0),
    "/api/status": Release(0, 16, 2),
    "/api/experimental/web_search": Release(0, 18, 0),
    "/api/experimental/web_fetch": Release(0, 18, 0),
    "/v1/audio/transcriptions": Release(0, 20, 0),
    "/api/experimental/model-recommendations": Release(0, 22, 1),
}
_KNOWS_METHODS = Release(0, 7, 0)


async def serve(exchange: Exchange, method: str, query: str) -> None:
    """Answer one request. Raises Refused for what the endpoint refuses."""
    path = exchange.path
    release = exchange.machine.spec.release
    methods = _methods(path, release)
    if methods is not None:
        handler = methods.get(method)
        if handler is not None:
            await handler(exchange)
            return
        if release >= _KNOWS_METHODS:
            await exchange.plain("405 method not allowed", 405, Allow=", ".join(methods))
            return
    target = _cleaned(path)
    if target != path and _methods(target, release) is not None:
        location = target + (f"?{query}" if query else "")
        # A doubled slash is cleaned with 307 for every method.
        moved = 301 if method == "GET" and target == path.rstrip("/") else 307
        await exchange.empty(moved, Location=location)
        return
    await exchange.plain("404 page not found", 404)


def takes_uploads(method: str, path: str) -> bool:
    """The endpoint reads the body itself, piece by piece."""
    return method == "POST" and path.startswith(blobs.PREFIX)


def _methods(path: str, release: Release) -> Mapping[str, Handler] | None:
    """What a node of that release does with a path; None when it does not know it."""
    known, methods = path, ROUTES.get(path)
    if methods is None:
        known, methods = _with_name(path)
    if methods is None or release < _SINCE.get(known, release):
        return None
    return methods


def _with_name(path: str) -> tuple[str, Mapping[str, Handler] | None]:
    prefix, _, one = path.rpartition("/")
    prefix += "/"
    if not one or "%2f" in one.lower():
        return prefix, None
    return prefix, _WITH_NAME.get(prefix)


def _cleaned(path: str) -> str:
    while "//" in path:
        path = path.replace("//", "/")
    return path.rstrip("/") or "/"
