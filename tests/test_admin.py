"""The admin listener: what it shows, and who may change something."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import pytest

from router import __version__
from router.admin import ReloadResult
from router.app import App
from router.core.lease import Lease
from router.core.names import parse
from router.core.policy import Attempt, Target
from router.core.pool import Pool
from router.core.types import Outcome
from router.core.work import Work
from router.metrics import CONTENT_TYPE
from router.sim import Fault, FaultKind, SimNode
from tests.process import entry, serving, settings, write
from tests.rig import LEAST, MODEL, Rig, model, parsed, rig, spec, talk

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
        return await self.post("/reload", token, scheme)

    async def post(
        self, path: str, token: str | None = None, scheme: str = "Bearer"
    ) -> tuple[int, Any]:
        headers = {} if token is None else {"Authorization": f"{scheme} {token}"}
        async with self.session.post(f"{self.url}{path}", headers=headers) as answer:
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
            "version", "draining", "in_flight", "config", "nodes", "models", "warm",
            "digest_conflicts",
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
            "detail": "answers", "draining": False, "ejected": [], "in_flight": 0,
            "slots": 1, "slots_learned": {}, "weight": 1.0, "labels": labels,
            "version": "0.33.0", "present": [MODEL, "other:latest"], "resident": ["other:latest"],
        }  # fmt: skip
        assert (second["name"], second["slots"], second["resident"]) == ("n2", 3, [])
        assert shown["models"] == {
            MODEL: {"nodes": ["n1", "n2"], "resident": []},
            "other:latest": {"nodes": ["n1"], "resident": ["n1"]},
        }
        assert shown["warm"] == {}
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
        for path in ("/status", "/reload", "/drain?node=n1", "/nowhere"):
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
            ("GET", "/drain?node=n1", 405, "POST"),
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


# Draining a node


async def said(r: Rig, path: str) -> tuple[int, Any]:
    """(status, answer) of a POST to the admin listener."""
    async with r.session.post(r.admin + path) as answer:
        return answer.status, await answer.json()


async def entries(r: Rig) -> Mapping[str, dict[str, Any]]:
    """The nodes of `/status` by their names."""
    async with r.session.get(f"{r.admin}/status") as answer:
        return {node["name"]: node for node in (await answer.json())["nodes"]}


async def answered_by(r: Rig, **fields: Any) -> str:
    """The node that a chat went to, or why it went to none."""
    async with r.chat(stream=False, **fields) as answer:
        told = await answer.json()
        return str(answer.headers["X-Ollamux-Node"] if answer.status == 200 else told["error"])


async def test_a_drained_node_finishes_what_it_has_and_gets_no_more() -> None:
    async with rig(spec(), spec(), routing=LEAST) as r:
        r.nodes[0].fault = Fault(FaultKind.STALL, after=1, times=1)
        async with r.chat(model=f"{MODEL}@n1") as running:
            await running.content.readline()
            status, node = await said(r, "/drain?node=n1")
            assert (status, node["draining"], node["in_flight"]) == (200, True, 1)
            assert (await entries(r))["n1"].items() >= {"state": "up", "draining": True}.items()
            assert {await answered_by(r) for _ in range(6)} == {"n2"}
            r.nodes[0].release()
            last = (await running.read()).splitlines()[-1]
            assert json.loads(last)["done"] is True
        status, node = await said(r, "/undrain?node=n1")
        assert (status, node["draining"], node["in_flight"]) == (200, False, 0)
        assert {await answered_by(r) for _ in range(6)} == {"n1", "n2"}


async def test_draining_twice_is_draining_once_and_one_line() -> None:
    async with rig(spec(), spec()) as r:
        address = r.nodes[0].url.removeprefix("http://")
        for name in ("n1", "N1", address, r.nodes[0].url):
            status, node = await said(r, f"/drain?node={name}")
            assert (status, node["name"], node["draining"]) == (200, "n1", True)
        for _ in range(2):
            assert (await said(r, "/undrain?node=n1"))[0] == 200
        told = [line for line in r.lines if "drained" in line["event"]]
        assert [line["event"] for line in told] == ["node drained", "node undrained"]
        about = {"level": "info", "node": "n1", "in_flight": 0}
        assert all(line.items() >= about.items() for line in told)


@pytest.mark.parametrize("verb", ["drain", "undrain"])
async def test_only_one_node_that_there_is_can_be_drained(verb: str) -> None:
    same = "http://127.0.0.1:1"
    async with rig(spec(), spec(), entries=[{}, {"url": f"{same}/a"}]) as r:
        r.app.reconfigure(parsed({
            **r.settings, "nodes": [*r.settings["nodes"], {"name": "n3", "url": f"{same}/b"}],
        }))  # fmt: skip
        several = f"n2 ({same}/a), n3 ({same}/b)"
        which = "say which node: ?node=NAME"
        for query, status, error in (
            ("", 400, which),
            ("?node=", 400, which),
            ("?node=n1&node=n2", 400, which),
            ("?node=127.0.0.1:1", 400, f"'127.0.0.1:1' stands for several nodes: {several}"),
            ("?node=default", 400, "'default' stands for several nodes"),
            ("?node=n4", 404, f"'n4'; the nodes are: n1 ({r.nodes[0].url}), {several}"),
            ("?node=a%20b%0A", 404, "no node is named 'a b\n'; the nodes are: n1 "),
        ):
            found, told = await said(r, f"/{verb}{query}")
            assert found == status
            assert error in told["error"]
        assert not any(node["draining"] for node in (await entries(r)).values())


async def test_draining_needs_the_token() -> None:
    async with guarded("127.0.0.1:0", TOKEN) as admin:
        for path in ("/drain?node=127.0.0.1:1", "/undrain?node=127.0.0.1:1"):
            for wrong in (None, "wrong"):
                assert (await admin.post(path, wrong))[0] == 401
            assert (await admin.post(path, TOKEN))[0] == 200
    async with guarded("0.0.0.0:0") as admin:
        assert (await admin.post("/drain?node=127.0.0.1:1"))[0] == 403


async def test_not_ready_while_all_that_are_up_are_drained() -> None:
    async with rig(spec(), spec(), entries=[{}, {}]) as r:

        async def ready() -> tuple[int, str]:
            async with r.session.get(f"{r.admin}/readyz") as answer:
                return answer.status, await answer.text()

        await said(r, "/drain?node=n1")
        assert await ready() == (200, "ready\n")
        await said(r, "/drain?node=n2")
        assert await ready() == (503, "all nodes that are up are drained: n1, n2\n")
        await r.nodes[0].refuse()
        await r.look()
        assert await ready() == (503, "all nodes that are up are drained: n2\n")
        await said(r, "/undrain?node=n2")
        assert await ready() == (200, "ready\n")


async def test_draining_survives_a_reload_and_ends_with_the_node(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    async with SimNode(spec()) as one, SimNode(spec()) as two:
        write(path, settings(one, two))
        async with serving(path) as router:

            async def drained() -> Mapping[str, bool]:
                nodes = (await router.status())["nodes"]
                return {node["name"]: node["draining"] for node in nodes}

            async def reloaded(*nodes: dict[str, Any]) -> None:
                write(path, {**settings(), "nodes": list(nodes)})
                await router.reload()
                names = [node["name"] for node in nodes]
                await router.until(lambda shown: [n["name"] for n in shown["nodes"]] == names)

            async with router.session.post(f"{router.admin}/drain?node=n1") as answer:
                assert answer.status == 200
            await reloaded(entry(one, "renamed", weight=2), entry(two, "n2"))
            assert await drained() == {"renamed": True, "n2": False}
            for _ in range(4):
                async with router.chat(stream=False) as answer:
                    assert answer.headers["X-Ollamux-Node"] == "n2"
            await reloaded(entry(two, "n2"))
            await reloaded(entry(one, "n1"), entry(two, "n2"))
            assert await drained() == {"n1": False, "n2": False}


PINNED: Mapping[str, dict[str, Any]] = {
    "/api/chat": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9},
}


@pytest.mark.parametrize("path", PINNED)
async def test_a_pin_to_a_drained_node_is_a_503_that_says_so(path: str) -> None:
    async with rig(spec(), spec()) as r:
        await said(r, "/drain?node=n1")
        for where, name in ((path, f"{MODEL}@n1"), (f"/@n1{path}", MODEL)):
            body = {"model": name, **PINNED[path]}
            async with r.session.post(r.url + where, json=body) as answer:
                assert answer.status == 503
                assert int(answer.headers["Retry-After"]) >= 1
                error = (await answer.json())["error"]
            text = error if isinstance(error, str) else error["message"]
            assert "n1" in text
            assert "drained" in text
        assert not r.nodes[0].calls(path)
        assert {line["reason"] for line in r.requests} == {"drained"}


async def test_what_only_drained_nodes_have_is_not_listed_while_what_runs_there_is() -> None:
    own = model("own:latest")
    async with rig(spec(model(), own, warm=("own",)), spec()) as r:
        await said(r, "/drain?node=n1")

        async def listed(path: str, key: str = "models") -> list[str]:
            async with r.session.get(r.url + path) as answer:
                assert answer.status == 200
                return [one.get("name") or one["id"] for one in (await answer.json())[key]]

        assert await answered_by(r, model="own") == await answered_by(r, model="own@n1")
        assert await listed("/api/tags") == [MODEL]
        assert await listed("/v1/models", "data") == [MODEL]
        assert await listed("/api/ps") == await listed("/@n1/api/ps") == ["own:latest"]
        for path in ("/@n1/api/tags", "/@n1/v1/models"):
            async with r.session.get(r.url + path) as answer:
                assert answer.status == 503
                assert "drained" in await answer.text()
        await said(r, "/undrain?node=n1")
        assert sorted(await listed("/api/tags")) == [MODEL, "own:latest"]


# Ejections

LONG = {"resets": 1, "answers": 1, "back_off_s": 3600, "back_off_max_s": 3600, "jitter": 0.0}


async def fails(r: Rig, name: str, fault: Fault) -> None:
    """Have one request for a model meet a fault on the first node, and none other to ask. It is
    not pinned: what a node answers to those says nothing of it."""
    r.app.pool.registry.drain("n2", draining=True)
    r.nodes[0].fault = fault
    async with r.chat(model=name, stream=False) as answer:
        assert answer.status >= 500
    r.nodes[0].fault = None
    r.app.pool.registry.drain("n2", draining=False)


async def test_status_says_what_is_kept_away_from_why_and_until_when() -> None:
    full = model("full:latest")
    async with rig(spec(model(), full), spec(), breaker=LONG) as r:
        await fails(r, MODEL, Fault(FaultKind.STATUS, status=500))
        await fails(r, MODEL, Fault(FaultKind.DIE))
        r.nodes[0].fault = Fault(FaultKind.STATUS, status=503)
        waiting = asyncio.create_task(answered_by(r, model="full@n1"))
        await r.until(lambda: len(r.app.pool.registry.snapshot()[0].ejected) == 3)
        shown = await entries(r)
        waiting.cancel()
        assert shown["n2"]["ejected"] == []
        assert shown["n1"]["state"] == "up"
        node, busy, failed = shown["n1"]["ejected"]
        assert 3500 < node.pop("next_trial_s") <= 3600
        assert 3500 < failed.pop("next_trial_s") <= 3600
        assert busy.pop("next_trial_s") > 0
        no_trial = {"busy": False, "trial": False}
        assert "closed" in node["reason"] or "reset" in node["reason"]
        assert "500" in failed["reason"]
        assert node.items() >= {"model": None, **no_trial}.items()
        assert failed.items() >= {"model": MODEL, **no_trial}.items()
        assert busy == {"model": "full:latest", "reason": "busy", "busy": True, "trial": False}


@pytest.mark.parametrize(
    ("fault", "what", "scope"),
    [
        (Fault(FaultKind.STATUS, status=500), {"node": "n1", "model": MODEL}, "model"),
        (Fault(FaultKind.DIE), {"node": "n1"}, "node"),
    ],
    ids=["model", "node"],
)
async def test_every_flip_of_a_breaker_is_one_line_and_one_count(
    fault: Fault, what: dict[str, str], scope: str
) -> None:
    async with rig(breaker={**LONG, "back_off_s": 0.001}) as r:
        await fails(r, MODEL, fault)
        [ejected] = (await entries(r))["n1"]["ejected"]
        await r.until(lambda: r.app.pool.registry.snapshot()[0].ejected[0].until <= monotonic())
        assert (await entries(r))["n1"]["ejected"][0]["next_trial_s"] == 0
        r.nodes[0].fault = Fault(FaultKind.HANG)
        chat = asyncio.create_task(answered_by(r))
        await r.nodes[0].until(lambda: r.nodes[0].in_flight == 1)
        [trial] = (await entries(r))["n1"]["ejected"]
        assert (ejected["trial"], trial["trial"]) == (False, True)
        assert ejected["reason"] == trial["reason"] != ""
        r.nodes[0].release()
        assert await chat == "n1"
        assert (await entries(r))["n1"]["ejected"] == []
        told = [line for line in r.lines if line["event"].startswith(f"{scope} ")]
        told = [line for line in told if line["event"] != "node up"]
        assert [(line["level"], line["event"]) for line in told] == [
            ("warning", f"{scope} ejected"), ("info", f"{scope} on trial"),
            ("info", f"{scope} readmitted"),
        ]  # fmt: skip
        assert all(line.items() >= what.items() for line in told)
        assert ("model" in told[0]) == (scope == "model")
        assert told[0].items() >= {"reason": ejected["reason"], "retry_s": 0.0}.items()
        text = await r.metrics()
        for to in ("open", "trial", "closed"):
            assert f'flips_total{{node="n1",scope="{scope}",to="{to}"}} 1.0' in text


# What is decided, and what would be

DELAY = {"policy": "expected-delay"}


async def explained(r: Rig, **asked: Any) -> tuple[int, Any]:
    """(status, answer) of what is explained to who asks in JSON."""
    async with r.session.post(f"{r.admin}/explain", json={"model": MODEL, **asked}) as answer:
        return answer.status, await answer.json()


async def decided(r: Rig) -> list[dict[str, Any]]:
    async with r.session.get(f"{r.admin}/decisions") as answer:
        decisions: list[dict[str, Any]] = (await answer.json())["decisions"]
        return decisions


async def test_where_a_request_would_go_is_explained_node_by_node_and_not_done() -> None:
    warm = spec(model(), warm=(MODEL,))
    async with rig(spec(), warm, spec(model("other")), routing=DELAY) as r:
        status, told = await explained(r, prompt_tokens=2000, flow="team")
        assert status == 200
        assert list(told) == ["model", "policy", "verdict", "node", "reason", "wait_s", "nodes"]
        nodes = told.pop("nodes")
        assert told == {
            "model": MODEL, "policy": "expected-delay", "verdict": "now", "node": "n2",
            "reason": "warm", "wait_s": 0.0,
        }  # fmt: skip
        assert [one["name"] for one in nodes] == ["n2", "n1", "n3"]
        best, cold, other = nodes
        assert (best["wait_s"], best["load_s"], best["barred"]) == (0.0, 0.0, None)
        assert cold["load_s"] > 0
        assert best["total_s"] == best["answer_s"] < cold["total_s"]
        assert other.pop("barred") == "does not have the model"
        assert other == {
            "name": "n3", "total_s": None, "wait_s": None, "load_s": None, "answer_s": None
        }  # fmt: skip
        assert await answered_by(r) == "n2"
        assert len(await decided(r)) == 1


async def test_the_query_says_the_same_as_a_body() -> None:
    async with rig(spec(model(), warm=(MODEL,)), routing=DELAY) as r:
        asked = {"prompt_tokens": 10, "num_ctx": 8192, "max_tokens": 7, "flow": "f"}
        query = "&".join(f"{name}={value}" for name, value in asked.items())
        assert await said(r, f"/explain?model={MODEL}&{query}") == await explained(r, **asked)


async def test_what_would_wait_is_told_for_which_node_and_how_long() -> None:
    async with rig(spec(model(), warm=(MODEL,)), routing=DELAY) as r:
        r.nodes[0].fault = Fault(FaultKind.STALL, after=1)
        async with r.chat() as running:
            await running.content.readline()
            _, told = await explained(r)
            assert (told["verdict"], told["node"], told["reason"]) == ("waits", "n1", "warm")
            assert told["wait_s"] == told["nodes"][0]["wait_s"] > 0
            r.nodes[0].release()
            await running.read()
        _, told = await explained(r)
        assert told["verdict"] == "now"


async def test_a_flow_that_has_its_share_is_told_so_and_of_no_node() -> None:
    async with rig(spec(model(), warm=(MODEL,)), routing=DELAY) as r:
        pool, target = r.app.pool, Target(parse(MODEL))
        pool.leave(leased(pool, target, "other"), Outcome(), monotonic())
        while (told := (await explained(r, flow="f"))[1])["verdict"] == "now":
            leased(pool, target, "f")
        assert (told["verdict"], told["node"], told["wait_s"]) == ("waits", None, None)
        assert told["nodes"][0]["barred"] == "its flow has its share of the slots already"
        _, told = await explained(r, flow="g")
        assert (told["verdict"], told["node"]) == ("waits", "n1"), "the only slot"


def leased(pool: Pool, target: Target, flow: str) -> Attempt:
    """A request of a flow that has got a node, and does not end by itself."""
    attempt = Attempt(target, work=Work(flow))
    assert isinstance(pool.submit(attempt, monotonic()), Lease)
    return attempt


async def test_what_waiting_would_bring_is_told_of_later_pools() -> None:
    async with rig(spec(model(), warm=(MODEL,)), spec()) as r:
        first, second = ([one] for one in r.settings["nodes"])
        pools = [
            {"name": "a", "nodes": first, "policy": "expected-delay", "spill_after_s": 20},
            {"name": "b", "nodes": second, "policy": "least-in-flight"},
        ]
        others = {key: value for key, value in r.settings.items() if key != "nodes"}
        r.app.reconfigure(parsed({**others, "pools": pools}))
        await r.look()
        _, told = await explained(r)
        assert (told["policy"], told["node"], told["reason"]) == ("expected-delay", "n1", "warm")
        assert told["nodes"][1]["barred"] == "of a later pool: may be had after 20 s"
        await said(r, "/drain?node=n1")
        _, told = await explained(r)
        assert (told["policy"], told["node"], told["reason"]) == (
            "least-in-flight", "n2", "later-pool",
        )  # fmt: skip


async def test_a_flow_is_explained_with_the_priority_it_is_configured_to_have() -> None:
    flows = {"soon": {"priority": "interactive"}, "late": {"priority": "batch"}}
    routing = {**DELAY, "flow_header": "X-Team", "flows": flows}
    warm = spec(model(), warm=(MODEL,))
    async with rig(warm, routing=routing, trusted=["127.0.0.1"]) as r:
        r.nodes[0].fault = Fault(FaultKind.HANG, times=1)
        async with asyncio.TaskGroup() as group:
            group.create_task(answered_by(r))
            await r.until(lambda: r.nodes[0].held == 1)
            r.session.headers["X-Team"] = "other"
            group.create_task(answered_by(r))
            await r.until(lambda: r.app.pool.waiting == 1)
            waits = [(await explained(r, flow=flow))[1]["wait_s"] for flow in ("soon", "late")]
            assert waits[1] > 1.5 * waits[0]
            r.app.reconfigure(parsed({**r.settings, "routing": DELAY}))
            again = [(await explained(r, flow=flow))[1]["wait_s"] for flow in ("soon", "late")]
            assert again[1] < 1.5 * again[0]
            r.nodes[0].release()


async def test_without_a_wait_to_tell_of_none_is_told() -> None:
    async with rig(spec(), spec(), breaker={"jitter": 0.0}, routing=LEAST) as r:
        _, told = await explained(r)
        assert (told["policy"], told["verdict"]) == ("least-in-flight", "now")
        assert (told["node"], told["reason"]) == ("n1", "least-in-flight")
        assert [one["total_s"] for one in told["nodes"]] == [None, None]
        await said(r, "/drain?node=n2")
        r.nodes[0].fault = Fault(FaultKind.STATUS, status=503)
        waiting = asyncio.create_task(r.chat().__aenter__())
        await r.until(lambda: len(r.app.pool.registry.snapshot()[0].ejected) == 1)
        _, told = await explained(r)
        waiting.cancel()
        assert (told["verdict"], told["node"], told["wait_s"]) == ("waits", None, None)
        assert [one["barred"] for one in told["nodes"]] == ["busy", "drained"]


@pytest.mark.parametrize(
    ("name", "reason", "barred"),
    [
        ("nowhere", "no-model", "does not have the model"),
        ("nowhere@n1", "not-on-pin", "does not have the model"),
        (MODEL, "drained", "drained"),
    ],
)
async def test_what_would_be_refused_is_told_in_the_words_of_the_metrics(
    name: str, reason: str, barred: str
) -> None:
    async with rig() as r:
        if reason == "drained":
            await said(r, "/drain?node=n1")
        status, told = await explained(r, model=name)
        assert (status, told["verdict"], told["reason"]) == (200, "refused", reason)
        assert (told["node"], told["wait_s"]) == (None, None)
        assert [one["barred"] for one in told["nodes"]] == [barred]
        await answered_by(r, model=name)
        assert f'ollamux_decisions_total{{reason="{reason}"}} 1.0' in await r.metrics()


async def test_a_cloud_model_on_a_node_that_may_not_be_asked_for_it_is_refused() -> None:
    async with rig(spec(), spec(), entries=[{}, {"cloud": True}]) as r:
        status, told = await explained(r, model="big:cloud@n1")
        assert status == 200
        assert (told["verdict"], told["reason"], told["nodes"]) == ("refused", "unmarked", [])


async def test_what_placement_leaves_out_is_said_so() -> None:
    placement = [{"models": ["llama3*"], "nodes": ["n2"]}]
    async with rig(spec(), spec(), placement=placement) as r:
        _, told = await explained(r)
        assert (told["verdict"], told["node"]) == ("now", "n2")
        assert told["nodes"][1]["barred"] == "placement, path or marks leave it out"


@pytest.mark.parametrize(
    ("body", "query", "error"),
    [
        (b"", "", "required field `model`"),
        (b"{}", "", "required field `model`"),
        (b'{"model": ""}', "", "length >= 1"),
        (b'{"model": 1}', "", "`$.model`"),
        (b"\xff", "", "malformed"),
        (b'{"model": "m\xff"}', "", "utf-8"),
        (b"[]", "", "object"),
        (b'{"model":' + 30_000 * b"[", "", "recursion"),
        (b'{"model": "m", "promt_tokens": 1}', "", "`promt_tokens`"),
        (b'{"model": "m", "prompt_tokens": -1}', "", "`$.prompt_tokens`"),
        (b'{"model": "m", "num_ctx": 0}', "", "`$.num_ctx`"),
        (b'{"model": "m", "flow": "%b"}' % (b"f" * 201), "", "`$.flow`"),
        (b'{"model": "m"}', "?model=m", "not in both"),
        (b"", "?model=m&num_ctx=many", "`$.num_ctx`"),
        (b"", "?model=m&model=n", "model is given more than once"),
        (b'{"model": "a b"}', "", "invalid model name"),
        (b'{"model": "m@n9:1"}', "", "no such node; the nodes are: n1 (http://"),
    ],
)
async def test_a_mistake_in_what_is_to_be_explained_is_told(
    body: bytes, query: str, error: str
) -> None:
    async with rig() as r, r.session.post(f"{r.admin}/explain{query}", data=body) as answer:
        told = await answer.json()
        assert (answer.status, list(told)) == (400, ["error"])
        assert error in told["error"]


async def test_too_much_to_be_explained_is_not_read() -> None:
    async with rig() as r:
        assert (await explained(r, flow="f" * 70_000))[0] == 413


async def test_explaining_needs_the_token_and_a_post() -> None:
    async with guarded("127.0.0.1:0", TOKEN) as admin:
        for wrong in (None, "wrong"):
            assert (await admin.post(f"/explain?model={MODEL}", wrong))[0] == 401
        assert (await admin.post(f"/explain?model={MODEL}", TOKEN))[0] == 200
        async with admin.session.get(f"{admin.url}/explain?model={MODEL}") as answer:
            assert (answer.status, answer.headers["Allow"]) == (405, "POST")


async def test_the_last_decisions_are_told_the_latest_first() -> None:
    names = spec(model(), model("other"), warm=(MODEL,))
    async with rig(names, routing=DELAY) as r:
        before, reasons = time.time(), []
        for name in (MODEL, "other", "nowhere"):
            async with r.chat(model=name, stream=False) as answer:
                await answer.read()
                reasons.append(
                    (answer.headers["X-Ollamux-Reason"], answer.headers["X-Ollamux-Request-Id"])
                )
        load, warm = await decided(r)
        assert before - 1 < warm["at"] <= load["at"] < time.time() + 1
        assert [(one["reason"], one["request"]) for one in (warm, load)] == reasons[:2]
        assert [one.pop("model") for one in (warm, load)] == [MODEL, "other:latest"]
        assert [one["reason"] for one in (warm, load)] == ["warm", "load"]
        assert list(warm) == [
            "at", "request", "flow", "node", "reason", "waited_s", "expected_s",
        ]  # fmt: skip
        assert (warm["flow"], warm["node"], warm["waited_s"]) == ("127.0.0.1", "n1", 0.0)
        assert load["expected_s"] > warm["expected_s"] >= 0
        text = await r.metrics()
        for reason in ("warm", "load", "no-model"):
            assert f'ollamux_decisions_total{{reason="{reason}"}} 1.0' in text


async def test_a_known_beginning_of_a_prompt_is_a_reason_of_its_own() -> None:
    async with rig(spec(model(), warm=(MODEL,)), routing=DELAY) as r:
        for _ in range(2):
            async with r.chat(prompt="", messages=[{"role": "user", "content": "so " * 9000}]) as a:
                await a.read()
                reason = a.headers["X-Ollamux-Reason"]
        assert reason == "cached"
        assert [one["reason"] for one in await decided(r)] == ["cached", "warm"]
        assert 'ollamux_decisions_total{reason="cached"} 1.0' in await r.metrics()


async def test_no_more_decisions_are_kept_than_a_few_hundred() -> None:
    async with rig(spec(num_parallel=9)) as r:

        async def one() -> None:
            async with r.session.post(f"{r.url}/api/show", json={"model": MODEL}) as answer:
                await answer.read()

        for _ in range(65):
            await asyncio.gather(*(one() for _ in range(4)))
        found = await decided(r)
        assert len(found) == 256
        assert all(one["expected_s"] is None for one in found)
        assert all(one["flow"] is None for one in found)


async def test_how_long_a_request_has_waited_is_told() -> None:
    async with rig(spec(model(), warm=(MODEL,)), routing=DELAY) as r:
        r.nodes[0].fault = Fault(FaultKind.STALL, after=1, times=1)
        async with r.chat() as running:
            await running.content.readline()
            waiting = asyncio.create_task(answered_by(r))
            await r.until(lambda: r.app.pool.waiting == 1)
            r.nodes[0].release()
            await running.read()
        assert await waiting == "n1"
        second, first = await decided(r)
        assert first["waited_s"] == 0.0
        assert second["waited_s"] >= 0.0
        assert second["at"] >= first["at"]
