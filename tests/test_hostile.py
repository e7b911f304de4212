"""What clients and nodes may do to harm others, and what it comes to."""

import asyncio
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from router import log, watch
from router.core import dialect, peek
from router.core.dialect import find, parse
from router.downstream import _address
from router.sim import Fault, FaultKind
from tests.rig import MODEL, Peer, rig, scripted, spec, talk

CHAT = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}).encode()
HEAD = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\n"


# Clients


async def test_a_body_that_stalls_is_given_up() -> None:
    async with rig(timeouts={"stalled_body_s": 0.02}) as r, talk(r.url) as client:
        await client.send(HEAD + b"Content-Length: 100\r\n\r\n{")
        assert (await client.answer()).status == 408
        assert await client.rest() == b""


async def test_who_leaves_behind_many_pipelined_requests_is_seen_to_leave() -> None:
    async with rig() as r:
        r.nodes[0].fault = Fault(FaultKind.HANG)
        async with talk(r.url) as client:
            await client.send(HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(CHAT), CHAT))
            await r.nodes[0].until(lambda: r.nodes[0].held == 1)
            await client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
            await r.nodes[0].until(lambda: r.nodes[0].in_flight == 0)
        await r.until(lambda: r.app.pool.in_flight == 0)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
        (b"GET / HTTP/0.9\r\nHost: localhost\r\n\r\n", 505),
        (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    ],
)
async def test_what_is_spoken_otherwise_is_refused(head: bytes, status: int) -> None:
    async with rig() as r, talk(r.url) as client:
        await client.send(head)
        assert (await client.answer()).status == status


async def test_an_http_1_0_client_is_not_told_to_continue() -> None:
    body = b"Content-Length: %d\r\n\r\n%b" % (len(CHAT), CHAT)
    async with rig() as r, talk(r.url) as client:
        head = b"POST /api/chat HTTP/1.0\r\nExpect: 100-continue\r\n"
        await client.send(head + body)
        assert (await client.answer()).status == 200


def test_an_address_holds_no_words() -> None:
    assert _address("fe80::1%x outcome=ok") is None


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m",' + b'"":1,' * 600_000 + b'"x":1}z',
        b'{"model":"m","x":[' + b"[]," * 600_000 + b"0]}z",
        b'{"x":0,"model":"' + b"m" * 5_000_000 + b'"}z',
    ],
)
def test_more_parts_than_any_client_writes_are_not_read(body: bytes) -> None:
    route = find("/api/chat")
    assert route is not None
    assert parse(route, body).model == ""


@pytest.mark.parametrize("value", [b'"' + b'\\"' * 400_000 + b'"', b"[" + b'"",' * 400_000 + b"0]"])
def test_long_values_are_passed_over(value: bytes) -> None:
    body = b'{"x":%b,"model":"m"}z' % value
    assert set(peek.top_level(body)) == {"x", "model"}


@pytest.mark.parametrize("body", [b'{"a":"\\"', b'{"a":["x', b'{"a":["\\"', b'{"a":[1'])
def test_what_never_ends_is_unreadable(body: bytes) -> None:
    with pytest.raises(peek.Unreadable):
        peek.top_level(body)


async def test_a_large_body_is_read_beside_the_loop() -> None:
    async with rig() as r:
        content = "x" * dialect.QUICK_BYTES
        async with r.chat(
            messages=[{"role": "user", "content": content}], model=f"{MODEL}@n1"
        ) as a:
            assert a.status == 200
        body = json.loads(r.nodes[0].calls("/api/chat")[0].body)
        assert (body["model"], body["messages"][0]["content"]) == (MODEL, content)


async def test_keys_by_other_names_are_not_sent_on_either() -> None:
    headers = {"X-Goog-Api-Key": "s", "X-Auth-Token": "s", "X-Authorization": "s", "X-Kept": "k"}
    async with rig() as r:
        async with r.session.post(f"{r.url}/api/chat", data=CHAT, headers=headers) as answer:
            assert answer.status == 200
        seen = {name.lower() for name, _ in r.nodes[0].calls("/api/chat")[0].headers}
        assert "x-kept" in seen
        assert seen.isdisjoint(name.lower() for name in headers if name != "X-Kept")


# Nodes


async def test_a_node_cannot_speak_for_the_router() -> None:
    async def script(peer: Peer) -> None:
        own = b"X-Ollamux-Node: fake\r\nAccess-Control-Allow-Origin: *\r\nX-Own: 1\r\n"
        peer.writer.write(b"HTTP/1.1 200 OK\r\n" + own + b"Content-Length: 2\r\n\r\n{}")

    async with scripted(script) as url, rig(entries=[{"url": url}]) as r, r.chat() as answer:
        assert answer.headers.getall("X-Ollamux-Node") == ["n1"]
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert answer.headers["X-Own"] == "1"


async def test_a_status_below_100_is_no_answer() -> None:
    async def script(peer: Peer) -> None:
        peer.writer.write(b"HTTP/1.1 099 X\r\n\r\n")

    async with scripted(script) as url, rig(entries=[{"url": url}]) as r, r.chat() as answer:
        assert answer.status == 502


@pytest.mark.parametrize("version", [None, {}, "0.²", "x" * 60, "", 5])
async def test_a_server_without_a_version_is_no_node(version: object) -> None:
    async with scripted(_silent, _probes(version=version)) as url, rig(entries=[{"url": url}]) as r:
        (node,) = r.app.pool.registry.snapshot()
        assert (node.up, node.version) == (False, "")


@pytest.mark.parametrize(
    "entry",
    [{"name": None}, {"name": 5}, {"name": "big", "x": "y" * 70_000}, [], "text"],
    ids=["null", "number", "large", "list", "string"],
)
async def test_an_entry_that_is_none_does_not_spoil_the_list(entry: object) -> None:
    listed = _probes(tags=[entry, {"name": "good"}])
    async with scripted(_silent, listed) as url, rig(entries=[{"url": url}]) as r:
        (node,) = r.app.pool.registry.snapshot()
        assert list(node.present) == ["good:latest"]


async def test_a_list_that_is_no_json_is_not_taken() -> None:
    listed = _probes(tags=[{"name": "odd", "x": float("nan")}])
    async with scripted(_silent, listed) as url, rig(entries=[{"url": url}]) as r:
        (node,) = r.app.pool.registry.snapshot()
        assert (node.up, dict(node.present)) == (True, {})


async def _silent(peer: Peer) -> None:
    raise AssertionError


def _probes(version: object = "0.33.0", tags: object = ()) -> Mapping[bytes, Any]:
    models = list(tags) if isinstance(tags, (list, tuple)) else tags
    return {
        b"/api/version": {"version": version},
        b"/api/tags": {"models": models},
        b"/api/ps": {"models": []},
    }


# The machine


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


async def test_a_log_that_cannot_be_written_costs_no_request() -> None:
    async with rig(spec()) as r:
        log.setup("info", "json", Full())
        async with r.chat() as answer:
            assert answer.status == 200
        await r.nodes[0].refuse()
        await r.look()
        assert not r.app.pool.registry.any_up


def test_a_traceback_shows_no_values() -> None:
    out = io.StringIO()
    log.setup("info", "json", out)
    prompt = "SECRET"
    try:
        raise RuntimeError(len(prompt))
    except RuntimeError:
        log.logger().exception("broken")
    assert "RuntimeError" in out.getvalue()
    assert "SECRET" not in out.getvalue()


async def test_a_pipe_in_the_place_of_the_file_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    os.mkfifo(path)
    assert await asyncio.to_thread(watch.read, path) is None
