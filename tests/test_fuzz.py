"""Whatever clients send, the router answers it, harms no node, and keeps nothing of it."""

import asyncio
import gzip
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from router.core import dialect, wording
from router.core.dialect import Family
from tests.rig import MODEL, Answer, Rig, model, rig, spec, talk

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

KEPT = "kept:latest"  # no request names it
PLAIN = {301, 307, 404, 405, 431}  # Ollama's own, in plain text
bounded = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@dataclass(frozen=True)
class Sent:
    """One request. `path` with its query, as it stands in the first line."""

    method: str
    path: str
    body: bytes
    headers: tuple[bytes, ...] = ()

    @property
    def data(self) -> bytes:
        first = f"{self.method} {self.path} HTTP/1.1\r\nHost: localhost\r\n".encode()
        own = b"Content-Length: %d\r\n" % len(self.body)
        return first + own + b"".join(line + b"\r\n" for line in self.headers) + b"\r\n" + self.body


NAMES = st.sampled_from(
    [
        MODEL, MODEL, MODEL, "LLAMA3:8B", "llama3", "other", "chat", "", " llama3:8b ",
        "ollama/llama3:8b",
        "m:cloud", "x:20b-cloud", "x:cloud:local", "hf.co/a/b:Q4", "a/b/c/d", "library/other",
        "://", "@", "\ud800", "\x00", "l\u212alama3", "x" * 400, "-", ":", "/", "http://x/y:z",
    ]
) | st.text(max_size=20)  # fmt: skip
PINS = st.sampled_from(
    ["", "", "", "@n1", "@n2", "@n3", "@10.0.0.1", "@[::1]:1", "@http://n1", "@@", "@n1@n2", "@"]
)
NAMED = st.builds(lambda name, pin: name + pin, NAMES, PINS)
NUMBERS = st.integers() | st.floats()
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=10) | NAMED
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "tool", ""]), "content": VALUES},
        optional={"images": VALUES, "model": NAMED, "tool_calls": VALUES},
    ),
    max_size=3,
)
STREAMS: st.SearchStrategy[Any] = st.sampled_from([True, False, None, "true", 1, [], {}])
KEYS = st.sampled_from(
    ["Model", "MODEL", "stream", "Stream", "stream_options", "options", "keep_alive", "format",
     "tools", "think", "raw", "context", "files", "adapters", "insecure", "max_tokens", "x", ""]
)  # fmt: skip
USAGES: st.SearchStrategy[Any] = st.sampled_from(
    [{"include_usage": True}, {"include_usage": None}, {}, None, [], 5]
)
OBJECTS = st.builds(
    lambda fields, extra: fields | extra,
    st.fixed_dictionaries(
        {},
        optional={
            "model": NAMED | VALUES, "name": NAMED, "source": NAMED, "destination": NAMED,
            "from": NAMED, "messages": MESSAGES, "prompt": VALUES, "input": VALUES,
            "stream": STREAMS, "stream_options": USAGES, "max_tokens": st.just(8),
        },
    ),
    st.dictionaries(KEYS, VALUES, max_size=3),
)  # fmt: skip


def _json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _cut(body: bytes, at: int, put: bytes) -> bytes:
    at %= len(body) + 1
    return body[:at] + put + body[at + 1 :]


def _multipart(name: str, mark: str) -> bytes:
    lines = (
        f"--{mark}",
        'Content-Disposition: form-data; name="model"',
        "",
        name,
        f"--{mark}--",
        "",
    )
    return "\r\n".join(lines).encode("utf-8", "replace")


READABLE = OBJECTS.map(_json)
BODIES = st.one_of(
    READABLE,
    st.builds(_cut, READABLE, st.integers(0, 500), st.binary(max_size=3)),
    st.binary(max_size=60),
    st.builds(_multipart, NAMED, st.sampled_from(["b", "", "--", "b\r\n"])),
    st.integers(1, 12_000).map(lambda depth: b'{"model":"llama3:8b","x":' + b"[" * depth),
    st.integers(1, 5_000).map(lambda depth: b"[" * depth + b"]" * depth),
)
Coding = tuple[bytes, Callable[[bytes], bytes]]
CODINGS: st.SearchStrategy[Coding] = st.sampled_from(
    [(b"zstd", zstd.compress), (b"gzip", gzip.compress), (b"zstd", bytes), (b"ZSTD", zstd.compress),
     (b"identity", bytes), (b"zstd, gzip", bytes), (b"\xff", bytes)]
)  # fmt: skip
TOKENS = st.sampled_from([b"application/json", b"multipart/form-data; boundary=b",
    b'multipart/form-data; boundary="', b"text/plain", b"", b"*/*", b";;==", b"\xe9"])  # fmt: skip
HEADERS = st.lists(
    st.sampled_from(
        [b"Connection: x-y", b"Connection: close", b"Connection: ,", b"Origin: http://localhost",
         b"Origin: null", b"X-Ollamux-Via: x", b"Accept-Encoding: gzip", b"TE: trailers",
         b"No colon", b"Authorization: Bearer x", b"X-Y: \x01", b"\xff: x", b"X-Big: " + b"x" * 99]
    )
    | TOKENS.map(lambda value: b"Content-Type: " + value)
    | TOKENS.map(lambda value: b"X-Request-Id: " + value),
    max_size=3,
)  # fmt: skip
DIGEST = "sha256:" + "0" * 64
LASTS = st.sampled_from(["llama3:8b", "x@n2", DIGEST, "sha256-0", "%00", "%2F", "@n1", "a%20b"])
BEFORE = st.sampled_from(
    ["", "", "", "", "", "", "/@n1", "/@default", "/@nobody", "/@", "/%40n2", "/", "/@%00"]
)
AFTER = st.sampled_from(["", "", "", "?beta=true", "?", "/", "?%00", "?a=b&a=c#d"])


@st.composite
def requests(draw: st.DrawFn) -> Sent:
    """Any request for any endpoint, most of them with a method that it has."""
    route = draw(st.sampled_from(dialect.ROUTES))
    method = draw(st.sampled_from([*route.methods * 8, "PUT", "OPTIONS"]))
    path = "/".join(draw(LASTS) if part[:1] == ":" else part for part in route.path.split("/"))
    body, headers = draw(BODIES), tuple(draw(st.just([]) | HEADERS))
    if draw(st.integers(0, 4)) == 0:
        name, pack = draw(CODINGS)
        body, headers = pack(body), (*headers, b"Content-Encoding: " + name)
    return Sent(method, draw(BEFORE) + path + draw(AFTER), body, headers)


@bounded
@given(st.lists(requests(), min_size=10, max_size=10))
def test_any_request_is_answered_and_leaves_nothing_behind(batch: list[Sent]) -> None:
    asyncio.run(_all(batch))


@bounded
@given(st.sampled_from([route for route in dialect.ROUTES if "POST" in route.methods]), BODIES)
@example(dialect.ROUTES[0], b"")
def test_any_body_is_answered_in_the_dialect_of_its_route(
    route: dialect.Route, body: bytes
) -> None:
    path = route.path.replace(":digest", DIGEST)
    asyncio.run(_all([Sent("POST", path, body), Sent("POST", "/@n1" + path, body)]))


async def _all(batch: list[Sent]) -> None:
    specs = (spec(model(), model(KEPT)), spec(model(), model("other"), model(KEPT)))
    async with rig(*specs, aliases={"chat": f"{MODEL}@n1"}) as r:
        for sent in batch:
            async with asyncio.timeout(30), talk(r.url) as client:
                await client.send(sent.data)
                _check(sent, await client.answer(bodiless=sent.method == "HEAD"))
        await _unharmed(r)


def _check(sent: Sent, answer: Answer) -> None:
    assert answer.whole, sent
    node = answer.header("X-Ollamux-Node")
    # Every node is well: nothing that a client says may look like a failure of one.
    assert answer.status not in (502, 504), (sent, answer)
    if node is not None or answer.status < 400:
        return
    assert answer.status != 500, (sent, answer)
    kind = answer.header("Content-Type") or ""
    if kind.startswith("text/plain") or (answer.status == 403 and not answer.body):
        assert answer.status in PLAIN | {400, 403}, (sent, answer)
        return
    if sent.method != "HEAD":
        _check_dialect(sent, answer)


def _check_dialect(sent: Sent, answer: Answer) -> None:
    route = dialect.find(_route_path(sent.path))
    family = Family.NATIVE if route is None else route.family
    value = json.loads(answer.body)
    native = isinstance(value["error"], str)
    if any(line.lower().startswith(b"content-encoding") for line in sent.headers) and native:
        return  # what cannot be unpacked is refused before the dialect, as Ollama does
    assert value.keys() == json.loads(wording.error_body(family, 400, "", "")).keys(), (
        sent,
        answer,
    )
    assert native == (family is Family.NATIVE), (sent, answer)


def _route_path(path: str) -> str:
    path = path.partition("?")[0].replace("%40", "@")
    return "/" + path.split("/", 2)[2] if path.startswith("/@") and path.count("/") > 1 else path


async def _unharmed(r: Rig) -> None:
    """Both nodes answer, nothing is in flight anywhere, and nothing was an error of ours."""
    for name in ("n1", "n2"):
        async with r.chat(model=f"{KEPT}@{name}") as answer:
            assert answer.status == 200
            await answer.read()
    async with asyncio.timeout(30):
        await r.until(lambda: r.app.pool.in_flight == 0)
        await r.until(lambda: all(node.in_flight == 0 for node in r.nodes))
        await r.app._gate.idle()
    assert all(node.up for node in r.app.pool.registry.snapshot())
    assert not [line for line in r.lines if line["level"] in ("error", "critical")]
