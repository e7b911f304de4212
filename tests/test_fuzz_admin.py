"""The admin listener does what its OpenAPI document says, whatever it is asked."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings

from router.admin import ReloadResult
from router.app import App
from router.sim import SimNode
from tests.rig import model, parsed, spec

DOCUMENT = Path(__file__).parents[1] / "docs" / "admin.openapi.yaml"
TOKEN = "hush-hush"
RESULTS = (
    ReloadResult("ok", changes=["node added: http://n2"], restart_needed=["listen"]),
    ReloadResult("unchanged"),
    ReloadResult("refused", mistakes=["router.yaml:1: nodes: too few"]),
)
Case = schemathesis.Case[Any]
schema = schemathesis.openapi.from_path(DOCUMENT)
bounded = settings(
    max_examples=15,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


class Running:
    """A router in a thread of its own: the calls of schemathesis block."""

    def __init__(self, token: str | None) -> None:
        self._token = token
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._reloads = 0

    def __enter__(self) -> str:
        self._thread.start()
        self._ready.wait()
        return self._url

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    async def _run(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        admin = {"listen": "127.0.0.1:0"} | ({"token": self._token} if self._token else {})
        async with AsyncExitStack() as stack:
            nodes = [
                await stack.enter_async_context(SimNode(spec(model(digest=mark * 64))))
                for mark in "ab"
            ]
            named = {"name": "gpu-1", "url": nodes[0].url}  # the document's example
            entries = [named, nodes[1].url, "http://127.0.0.1:1"]
            value = {"listen": "127.0.0.1:0", "admin": admin, "nodes": entries}
            app = await stack.enter_async_context(App(parsed(value), self._reload))
            for one in app.pool.registry.specs():
                await app.prober.look(one, ("version", "tags", "ps"))
            self._url = app.admins[0]
            self._ready.set()
            await self._over.wait()

    async def _reload(self) -> ReloadResult:
        self._reloads += 1
        return RESULTS[self._reloads % len(RESULTS)]


@pytest.fixture(scope="module")
def opened() -> Iterator[str]:
    with Running(None) as url:
        yield url


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    with Running(TOKEN) as url:
        yield url


@schema.parametrize()
@bounded
def test_every_answer_is_as_documented(case: Case, opened: str) -> None:
    case.call_and_validate(base_url=opened)


@schema.parametrize()
@bounded
def test_a_token_is_needed_for_what_changes_and_for_nothing_else(case: Case, guarded: str) -> None:
    case.headers.pop("Authorization", None)
    without = case.call(base_url=guarded)
    assert (without.status_code == 401) == (case.method not in ("GET", "HEAD"))
    answer = case.call(base_url=guarded, headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code != 401
    case.validate_response(answer, headers={"Authorization": f"Bearer {TOKEN}"})
