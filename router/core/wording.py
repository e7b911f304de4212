"""How each API says that something failed, and how Go spaces JSON."""

import json
from collections.abc import Mapping

from router.core import names
from router.core.dialect import Family, Framing, Route
from router.core.types import Need, NodeSpec, Refusal, Rejected

_REFUSALS: Mapping[Refusal, tuple[int, str]] = {
    Refusal.BAD_NAME: (400, "invalid model name"),
    Refusal.UNKNOWN_PIN: (400, "no such node; the nodes are: {listed}"),
    Refusal.AMBIGUOUS_PIN: (400, "several nodes have that address, pin one by its name: {nodes}"),
    Refusal.PIN_DOWN: (503, "cannot connect to Ollama server at {url}"),
    Refusal.NOT_ON_PIN: (404, "model '{model}' not found on {url}"),
    Refusal.NO_MODEL: (404, "{missing}"),
    Refusal.NODES_DOWN: (503, "no node is up for {what}: {nodes}"),
    Refusal.ALL_TRIED: (503, "cannot connect to any node that has {what}: {nodes}"),
    Refusal.DRAINED: (503, "{drained}"),
    Refusal.BUSY: (503, "all nodes with {what} are busy: {nodes}"),
    Refusal.LATE: (503, "no node had room for {what} in time"),
    Refusal.FULL: (503, "too many requests wait already"),
    Refusal.CROWDED: (429, "too many of your requests wait already"),
    Refusal.BUDGET: (503, "too many requests are being tried again, this one is not"),
    Refusal.OUT_OF_SCOPE: (400, "the path leaves out the node that the model's name pins: {nodes}"),
    Refusal.NOT_PLACED: (400, "no node may have {what}: placement or models bar it from {nodes}"),
    Refusal.UNMARKED: (400, "{unmarked} {nodes}"),
    Refusal.TOO_OLD: (501, "{path} needs Ollama {since}: {versions}"),
}
_NO_PRIMARY = "no node is marked primary: set it on one of"
_NO_CLOUD = "no node may be asked for the cloud: it is not set on"
_DRAINED = "node {nodes} is being drained, it takes no new requests"
_ALL_DRAINED = "nodes {nodes} are being drained, they take no new requests"


def refusal(route: Route, model: str, rejected: Rejected) -> tuple[int, str]:
    """(status, text) for a request that gets no node; `model` without its pin."""
    status, text = _REFUSALS[rejected.refusal]
    nodes = rejected.nodes
    listed = ", ".join(node.name for node in nodes)
    versions = zip(nodes, rejected.versions, strict=False)
    name = _shown(model) if rejected.refusal is Refusal.NO_MODEL else ""
    return status, text.format(
        model=model,
        what=f"model '{model}'" if model else "any model",
        missing=route.missing.format(name=model, key=name),
        nodes=listed,
        listed=_listed(nodes),
        drained=(_DRAINED if len(nodes) == 1 else _ALL_DRAINED).format(nodes=listed),
        url=nodes[0].url if nodes else "",
        unmarked=_NO_PRIMARY if route.need is Need.PRIMARY else _NO_CLOUD,
        path=route.path,
        since=".".join(map(str, route.since)),
        versions=", ".join(f"{node.name} has {version}" for node, version in versions),
    )


def _shown(model: str) -> str:
    name = names.parse(model)
    return name.key if name.source else names.shortest(model.strip())


def _listed(nodes: tuple[NodeSpec, ...]) -> str:
    return ", ".join(f"{node.name} ({node.url})" for node in nodes)


_OPENAI_TYPES = {400: "invalid_request_error", 404: "not_found_error"}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


def error_body(family: Family, status: int, message: str, request_id: str) -> bytes:
    """An error as the API of `family` words it: one JSON object, UTF-8."""
    error: object
    match family:
        case Family.NATIVE:
            error = {"error": message}
        case Family.OPENAI:
            kind = _OPENAI_TYPES.get(status, "api_error")
            error = {"error": {"message": message, "type": kind, "param": None, "code": None}}
        case Family.ANTHROPIC:  # pragma: no branch
            kind = _ANTHROPIC_TYPES.get(status, "api_error")
            inner = {"type": kind, "message": message}
            error = {"type": "error", "error": inner, "request_id": request_id}
    return dumps(error)


def error_type(family: Family) -> str:
    """The Content-Type of an error that is answered directly."""
    return "application/json; charset=utf-8" if family is Family.NATIVE else "application/json"


def error_record(
    route: Route, framing: Framing, status: int, message: str, request_id: str
) -> bytes:
    """The record that ends a stream that cannot go on, in the stream's own framing.

    Ollama's clients raise on the one-line error; the OpenAI and Anthropic SDKs raise on these.
    """
    body = error_body(route.family, status, message, request_id)
    if framing is Framing.NDJSON:
        return body + b"\n"
    named = route.family is Family.ANTHROPIC or route.path == "/v1/responses"
    return (b"event: error\n" if named else b"") + b"data: " + body + b"\n\n"


_LINE_ENDS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}


def dumps(value: object) -> bytes:
    """JSON as Go's encoder spaces it, with non-ASCII text as it is."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False).translate(_LINE_ENDS)
    return text.encode("utf-8", "replace")
