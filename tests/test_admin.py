"""The admin listener: what it shows, and who may change something."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from router import __version__
from router.admin import ReloadResult
from router.app import App
from router.metrics import CONTENT_TYPE
from tests.rig import MODEL, model, parsed, rig, spec, talk

TOKEN = "hush-hush"


@dataclass
class Guarded:
    """A router whose admin listener is as a test wants it; `url` is how loopback reaches it."""

    url: str
    session: aiohttp.ClientSession
    reloads: int = 0
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def reload(self, token: str | None = None, scheme: str = "Bearer") -> tuple[int, Any]:
        headers = {} if token is None else {"Authorization": f"{scheme} {token}"}
        async with self.session.post(f"{self.url}/reload", headers=headers) as answer:
            return answer.status, await answer.json()


@asynccontextmanager
async def guarded(listen: str, token: str | None = None) -> AsyncIterator[Guarded]:
    admin = {"listen": listen} | ({} if token is None else {"token": token})
    value = {"listen": "127.0.0.1:0", "admin": admin, "nodes": ["127.0.0.1:1"]}

    async def reload() -> ReloadResult:
        made.begun.set()
        await made.go_on.wait()
        made.reloads += 1
        return ReloadResult("ok", changes=["node added: http://n2"], restart_needed=["listen"])

    async with App(parsed(value), reload) as app, aiohttp.ClientSession() as session:
        made = Guarded(app.admins[0].replace("0.0.0.0", "127.0.0.1"), session)
        made.go_on.set()
        yield made


async def test_healthy_from_the_start_and_ready_with_a_node() -> None:
    async with rig() as r:
        for path, text in (("/healthz", "ok\n"), ("/readyz", "ready\n")):
            async with r.session.get(r.admin + path) as answer:
                assert (answer.status, await answer.text()) == (200, text)
                assert "Server" not in answer.headers


async def test_not_ready_without_a_node_or_while_draining() -> None:
    async with rig() as r:
        await r.app.drain()
        async with r.session.get(f"{r.admin}/readyz") as answer:
            assert (answer.status, await answer.text()) == (503, "draining\n")
    async with rig(entries=[{"url": "http://127.0.0.1:1"}]) as r:
        async with r.session.get(f"{r.admin}/readyz") as answer:
            assert (answer.status, await answer.text()) == (503, "no node is up\n")
        async with r.session.get(f"{r.admin}/healthz") as answer:
            assert answer.status == 200


async def test_metrics_are_prometheus_text() -> None:
    async with rig() as r:
        async with r.chat(stream=False) as answer:
            await answer.read()
        async with r.session.get(f"{r.admin}/metrics") as answer:
            assert answer.headers["Content-Type"] == CONTENT_TYPE
            text = await answer.text()
        assert 'ollamux_node_up{node="n1"} 1.0' in text
        assert f'model="{MODEL}",node="n1",outcome="ok"}} 1.0' in text
        assert f'version="{__version__}"' in text


async def test_status_shows_nodes_models_and_configuration() -> None:
    other = model("other:latest")
    labels = {"gpu": "h100"}
    async with rig(
        spec(model(), other, warm=("other",)), spec(num_parallel=3), entries=[{"labels": labels}]
    ) as r:
        async with r.session.get(f"{r.admin}/status") as answer:
            assert answer.headers["Content-Type"] == "application/json"
            shown = json.loads(await answer.read())
        assert list(shown) == [
            "version", "draining", "in_flight", "config", "nodes", "models", "digest_conflicts"
        ]  # fmt: skip
        assert (shown["version"], shown["draining"], shown["in_flight"]) == (__version__, False, 0)
        config = shown["config"]
        assert list(config) == ["generation", "source", "taken_at", "last_reload"]
        assert config["generation"] == 1
        assert list(config["last_reload"]) == ["result", "at", "mistakes", "restart_needed"]
        first, second = shown["nodes"]
        assert first.pop("for_s") >= 0
        assert first == {
            "name": "n1", "url": r.nodes[0].url, "pool": "default", "state": "up",
            "detail": "answers", "in_flight": 0, "slots": 1, "weight": 1.0, "labels": labels,
            "version": "0.33.0", "present": [MODEL, "other:latest"], "resident": ["other:latest"],
        }  # fmt: skip
        assert (second["name"], second["slots"], second["resident"]) == ("n2", 3, [])
        assert shown["models"] == {
            MODEL: {"nodes": ["n1", "n2"], "resident": []},
            "other:latest": {"nodes": ["n1"], "resident": ["n1"]},
        }
        assert shown["digest_conflicts"] == []


async def test_loopback_may_reload_without_a_token() -> None:
    async with guarded("127.0.0.1:0") as admin:
        assert await admin.reload() == (
            200,
            {
                "result": "ok", "generation": 1, "changes": ["node added: http://n2"],
                "restart_needed": ["listen"], "mistakes": [],
            },
        )  # fmt: skip
        assert admin.reloads == 1


async def test_a_reload_goes_on_when_who_asked_for_it_leaves() -> None:
    async with guarded("127.0.0.1:0") as admin:
        admin.go_on.clear()
        async with talk(admin.url) as line:
            await line.post("/reload", b"")
            await admin.begun.wait()
        async with admin.session.get(f"{admin.url}/healthz") as answer:
            assert answer.status == 200
        admin.go_on.set()
        await admin.reload()
        assert admin.reloads == 2


async def test_a_listener_for_everybody_needs_a_token_for_what_changes() -> None:
    async with guarded("0.0.0.0:0") as admin:
        told = {"error": "set admin.token: this listener is not on loopback"}
        assert await admin.reload() == (403, told)
        assert await admin.reload("guessed") == (403, told)
        assert admin.reloads == 0
        async with admin.session.get(f"{admin.url}/status") as answer:
            assert answer.status == 200


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "0.0.0.0:0"])
async def test_a_configured_token_is_needed_for_what_changes(listen: str) -> None:
    async with guarded(listen, TOKEN) as admin:
        told = {"error": "the admin token is needed: Authorization: Bearer ..."}
        for wrong in (None, "", "wrong", TOKEN[:-1], f"{TOKEN}x", "\u00fc"):
            assert await admin.reload(wrong) == (401, told)
        assert await admin.reload(TOKEN, "Basic") == (401, told)
        async with talk(admin.url) as line:
            no_text = (
                b"POST /reload HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\r\n\r\n"
            )
            await line.send(no_text)
            assert (await line.answer()).status == 401
        assert admin.reloads == 0
        assert (await admin.reload(TOKEN))[0] == 200
        assert (await admin.reload(TOKEN, "bearer"))[0] == 200
        async with admin.session.get(f"{admin.url}/status") as answer:
            assert TOKEN not in await answer.text()
            assert answer.status == 200


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize("origin", ["http://localhost", "null", ""])
async def test_no_page_of_a_browser_may_act_here(method: str, origin: str) -> None:
    async with rig() as r:
        headers = {"Origin": origin}
        for path in ("/status", "/reload", "/nowhere"):
            async with r.session.request(method, r.admin + path, headers=headers) as answer:
                assert answer.status == 403
                assert "Access-Control-Allow-Origin" not in answer.headers


async def test_other_paths_and_methods_are_refused_plainly() -> None:
    async with rig() as r:
        for method, path, status, allow in (
            ("GET", "/", 404, None),
            ("GET", "/status/", 404, None),
            ("GET", "/api/tags", 404, None),
            ("GET", "/reload", 405, "POST"),
            ("POST", "/status", 405, "GET, HEAD"),
            ("DELETE", "/healthz", 405, "GET, HEAD"),
        ):
            async with r.session.request(method, r.admin + path) as answer:
                assert answer.status == status
                assert answer.headers.get("Allow") == allow
                assert "Server" not in answer.headers
                assert list(await answer.json()) == ["error"]


async def test_head_is_answered_without_a_body() -> None:
    async with rig() as r, r.session.head(f"{r.admin}/readyz") as answer:
        assert answer.status == 200
        assert await answer.read() == b""


@pytest.mark.parametrize(
    "head",
    [
        b"hush-hush\r\n\r\n",
        b"GET /status HTTP/1.1\r\nHost: localhost\r\nhush-hush\r\n\r\n",
        b"GET /status HTTP/1.1\r\nHost: localhost\r\nA: " + b"h" * 100_000 + b"\r\n\r\n",
        b"POST /reload HTTP/1.1\r\nHost: localhost\r\nContent-Length: hush-hush\r\n\r\n",
    ],
    ids=["line", "header", "size", "length"],
)
async def test_what_is_not_http_is_no_error_of_ours_and_not_echoed(head: bytes) -> None:
    async with rig() as r, talk(r.admin) as line:
        await line.send(head)
        said = await line.rest()
        assert said.startswith(b"HTTP/1.1 4")
        assert b"Server:" not in said
        assert b"hush" not in said
        assert b"hhhh" not in said
        assert not [entry for entry in r.lines if entry["level"] in ("warning", "error")]
