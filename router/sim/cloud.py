"""What a node does at ollama.com: who is signed in, web search and fetch, recommendations."""

from router.sim.exchange import Exchange
from router.sim.native import JSON

_RECOMMENDED = (
    ("gpt-oss:120b-cloud", "Reasoning and tools, run at ollama.com"),
    ("llama3:8b", "General use on one GPU"),
)


async def status(exchange: Exchange) -> None:
    """GET /api/status."""
    disabled = exchange.machine.spec.cloud_disabled
    value = {"cloud": {"disabled": disabled, "source": "env" if disabled else "none"}}
    await exchange.whole(value, content_type=JSON)


async def me(exchange: Exchange) -> None:
    """POST /api/me."""
    account = exchange.machine.account
    account.require_user()
    user = account.user
    value = {"id": f"user-{user}", "email": f"{user}@example.com", "name": user, "plan": "free"}
    await exchange.whole(value, content_type=JSON)


async def sign_out(exchange: Exchange) -> None:
    """POST /api/signout and DELETE /api/user/keys/:key, whatever the key."""
    account = exchange.machine.account
    account.require_user()
    account.user = ""
    await exchange.whole(None, content_type=JSON)


async def recommendations(exchange: Exchange) -> None:
    """GET /api/experimental/model-recommendations."""
    models = [{"model": model, "description": about} for model, about in _RECOMMENDED]
    await exchange.whole({"recommendations": models}, content_type=JSON)


async def web_search(exchange: Exchange) -> None:
    """POST /api/experimental/web_search; every result names the node."""
    here = _reached(exchange, "web search is unavailable")
    result = {"title": f"A result of {here}", "url": here, "content": f"Found by {here}."}
    await exchange.whole({"results": [result]})


async def web_fetch(exchange: Exchange) -> None:
    """POST /api/experimental/web_fetch; the page names the node."""
    here = _reached(exchange, "web fetch is unavailable")
    value = {"title": f"A page of {here}", "content": f"Fetched by {here}.", "links": [here]}
    await exchange.whole(value)


def _reached(exchange: Exchange, what: str) -> str:
    """The node's own address, if it may talk to ollama.com. Raises Refused."""
    account = exchange.machine.account
    account.require_cloud(what)
    account.require_user()
    return exchange.here
