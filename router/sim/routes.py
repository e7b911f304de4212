"""Which path and method a simulated node answers, and how it answers all others."""

from collections.abc import Awaitable, Callable, Mapping

from router.sim import anthropic, catalog, native, openai, responses
from router.sim.exchange import Exchange

Handler = Callable[[Exchange], Awaitable[None]]

ROUTES: Mapping[str, Mapping[str, Handler]] = {
    "/": {"HEAD": catalog.root, "GET": catalog.root},
    "/api/version": {"HEAD": catalog.version, "GET": catalog.version},
    "/api/tags": {"HEAD": catalog.tags, "GET": catalog.tags},
    "/api/status": {"GET": catalog.status},
    "/api/ps": {"GET": catalog.ps},
    "/api/show": {"POST": catalog.show},
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
}
_MODEL_PATH = "/v1/models/"
_MODEL = {"GET": catalog.openai_one}
INFERENCE = frozenset(
    path for path, methods in ROUTES.items() if "POST" in methods and path != "/api/show"
)


async def serve(exchange: Exchange, method: str, query: str) -> None:
    """Answer one request. Raises Refused for what the endpoint refuses."""
    path = exchange.path
    methods = _methods(path)
    if methods is not None:
        handler = methods.get(method)
        if handler is None:
            await exchange.plain("405 method not allowed", 405, Allow=", ".join(methods))
            return
        await handler(exchange)
        return
    target = _cleaned(path)
    if target != path and _methods(target) is not None:
        location = target + (f"?{query}" if query else "")
        # A doubled slash is cleaned with 307 for every method.
        moved = 301 if method == "GET" and target == path.rstrip("/") else 307
        await exchange.empty(moved, Location=location)
        return
    await exchange.plain("404 page not found", 404)


def _methods(path: str) -> Mapping[str, Handler] | None:
    if path in ROUTES:
        return ROUTES[path]
    one = path.removeprefix(_MODEL_PATH)
    if one != path and one and "/" not in one and "%2f" not in one.lower():
        return _MODEL
    return None


def _cleaned(path: str) -> str:
    while "//" in path:
        path = path.replace("//", "/")
    return path.rstrip("/") or "/"
