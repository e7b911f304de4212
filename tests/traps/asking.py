"""How the tests of the contract's traps ask a router, and what they ask for."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from yarl import URL

from router.core import dialect
from router.core.dialect import Framing
from router.sim import SimNode
from tests.rig import MODEL, Peer, Rig

HELLO = [{"role": "user", "content": "hello"}]
GENERATING: Mapping[str, Mapping[str, Any]] = {
    "/api/chat": {"messages": HELLO},
    "/api/generate": {"prompt": "hello"},
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "hello"},
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 64},
}
ASKING: Mapping[str, Mapping[str, Any]] = {
    **GENERATING,
    "/api/embed": {"input": "hello"},
    "/api/embeddings": {"prompt": "hello"},
    "/v1/embeddings": {"input": "hello"},
    "/api/show": {},
}
NATIVE = tuple(path for path in GENERATING if path.startswith("/api/"))
FOREIGN = tuple(path for path in GENERATING if path.startswith("/v1/"))
KINDS = {"application/x-ndjson": Framing.NDJSON, "text/event-stream": Framing.SSE}


@dataclass(frozen=True)
class Told:
    """A whole answer. `node`: who gave it, empty for the router."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def node(self) -> str:
        return self.headers.get("X-Ollamux-Node", "")

    @property
    def framing(self) -> Framing:
        return KINDS.get(self.headers["Content-Type"].partition(";")[0], Framing.WHOLE)

    @property
    def value(self) -> Any:
        return json.loads(self.body)

    @property
    def value_of_last(self) -> Any:
        """The last line of a stream."""
        return json.loads(self.body.splitlines()[-1])

    @property
    def error(self) -> str:
        """The text of an error, whatever the dialect."""
        error = self.value["error"]
        return str(error if isinstance(error, str) else error["message"])


async def send(
    r: Rig, path: str, body: bytes | Mapping[str, Any] = b"", *, method: str = "POST",
    **headers: str,
) -> Told:  # fmt: skip
    """Send one request to the router, or to a node where `path` is a whole url."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    url = path if "://" in path else r.url + path
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with r.session.request(
        method, URL(url, encoded=True), data=data or None, headers=named, allow_redirects=False
    ) as answer:
        return Told(answer.status, answer.headers, await answer.read())


async def ask(r: Rig, path: str, name: str = MODEL, **fields: Any) -> Told:
    """Ask for an answer of the model `name`."""
    return await send(r, path, {"model": name, **ASKING[path], **fields})


def bodies(node: SimNode) -> list[bytes]:
    """The bodies of the POSTs that have reached a node."""
    return [seen.body for seen in node.seen if seen.method == "POST"]


def posts(r: Rig) -> int:
    """How many POSTs have reached any node."""
    return sum(len(bodies(node)) for node in r.nodes)


async def answer(
    peer: Peer, body: bytes, kind: str = "application/json", status: int = 200
) -> None:
    """Have a scripted node answer with a whole body."""
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    await peer.say(head.encode() + body)


def family(path: str) -> dialect.Family:
    """Whose API a path belongs to."""
    route = dialect.find(path)
    assert route is not None
    return route.family
