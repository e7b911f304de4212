"""The JavaScript clients, under Node.js, are told the same by the router as by a node."""

import asyncio
import json
import shutil
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

import pytest

from router.sim import Fault, FaultKind, SimNode
from tests.clients.asked import ASKED, PNG, SCHEMA, TOOL, TOOLED
from tests.clients.pair import EMBED, pair
from tests.clients.transcript import comparable
from tests.rig import MODEL, rig, spec

_HERE = Path(__file__).parent
_NODE = shutil.which("node")
_ASKED = {
    "ASKED": ASKED,
    "EMBED": EMBED,
    "IMAGE": PNG,
    "MODEL": MODEL,
    "SCHEMA": SCHEMA,
    "TOOL": TOOL,
    "TOOLED": TOOLED,
}

pytestmark = pytest.mark.skipif(
    _NODE is None or not (_HERE / "node_modules" / "openai").is_dir(),
    reason="the JavaScript clients need node and npm (`make test` installs them where npm is)",
)


async def told(script: str, url: str) -> list[Any]:
    """The transcript of a script, comparable."""
    assert _NODE is not None
    path = str(_HERE / script)
    process = await asyncio.create_subprocess_exec(
        _NODE, path, url, json.dumps(_ASKED), stdout=PIPE, stderr=PIPE
    )
    try:
        output, complaints = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, complaints.decode()
    # The client of Ollama prints lines of its own.
    return [comparable(entry) for entry in json.loads(output.splitlines()[-1])]


def failures(entries: list[Any]) -> list[str]:
    return [name for name, _, failure in entries if failure]


async def test_ollama_js_is_told_the_same_by_router_and_node() -> None:
    async with pair() as (node, router):
        expected = await told("ollama.mjs", node)
        assert await told("ollama.mjs", router) == expected
    assert failures(expected) == [
        "chat missing",
        "chat missing stream",
        "chat nameless",
        "generate nameless",
        "show missing",
        "pull missing",
        "pull missing stream",
        "delete missing",
    ]


async def test_openai_js_is_told_the_same_by_router_and_node() -> None:
    async with pair() as (node, router):
        expected = await told("openai.mjs", node)
        assert await told("openai.mjs", router) == expected
    assert failures(expected) == [
        "chat missing",
        "chat missing stream",
        "chat empty",
        "model missing",
    ]


async def test_a_stream_that_is_aborted_ends_on_the_node() -> None:
    async with SimNode(spec()) as alone, rig() as r:
        for node in (alone, *r.nodes):
            node.fault = Fault(FaultKind.STALL, after=3)
        expected = await told("aborting.mjs", alone.url)
        assert await told("aborting.mjs", r.url) == expected
        assert [len(records) for _, records, _ in expected] == [3, 3]
        seen = [r.nodes[0].calls(path)[0] for path in ("/api/chat", "/v1/chat/completions")]
        await r.nodes[0].until(lambda: all(one.outcome == "cancelled" for one in seen))
