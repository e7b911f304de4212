"""Three simulated nodes and a router on loopback, and one streamed chat through them."""

import asyncio
import contextlib
import json
import signal
from collections.abc import Mapping

import aiohttp

from router import config, daemon, log
from router.admin import ReloadResult
from router.app import App
from router.settings import Config
from router.sim import GB, SimModel, SimNode, SimSpec

_QUESTION = "Why is the sky blue?"
_MODEL = "llama3:8b"
_CHAT = SimModel(_MODEL, size_bytes=5 * GB, load_s=1.0, prefill_tps=1500, decode_tps=40)
_EMBED = SimModel("nomic-embed-text", size_bytes=GB // 4, load_s=0.3, embedding=True)
_CODE = SimModel("qwen2.5-coder:7b", size_bytes=5 * GB, load_s=1.0, decode_tps=40)
_NODES = {
    "gpu-1": SimSpec(models=(_CHAT, _EMBED), num_parallel=2),
    "gpu-2": SimSpec(models=(_CHAT, _CODE), num_parallel=2),
    "gpu-3": SimSpec(models=(_CODE, _EMBED), num_parallel=2),
}


def run(*, once: bool) -> int:
    """Run the demo until Ctrl-C, or only for its one chat; returns the exit code."""
    log.setup("warning", "console")
    with asyncio.Runner(loop_factory=daemon.loop_factory()) as runner:
        return runner.run(_demo(once=once))


async def _demo(*, once: bool) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        urls = {}
        for name, spec in _NODES.items():
            urls[name] = (await stack.enter_async_context(SimNode(spec))).url
            print(f"simulated node {name} at {urls[name]}")
        app = await stack.enter_async_context(App(_settings(urls), _no_reload))
        group = await stack.enter_async_context(asyncio.TaskGroup())
        prober = group.create_task(app.prober.run())
        await app.prober.looked.wait()
        await _chat(app.clients[0])
        _tell(app)
        if not once:
            print("\nCtrl-C stops it.", flush=True)
            await stop.wait()
            print("stopping")
        prober.cancel()
    return 0


def _settings(urls: Mapping[str, str]) -> Config:
    nodes = [{"name": name, "url": url, "slots": 2} for name, url in urls.items()]
    text = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "nodes": nodes}
    return config.parse(json.dumps(text).encode(), "demo", {})


async def _no_reload() -> ReloadResult:
    return ReloadResult("refused", mistakes=["the demo has no file"])


async def _chat(url: str) -> None:
    """Ask one question and print the answer as it comes."""
    question = {"model": _MODEL, "messages": [{"role": "user", "content": _QUESTION}]}
    print(f"\n> {_QUESTION}")
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/api/chat", json=question) as answer,
    ):
        answer.raise_for_status()
        async for line in answer.content:
            print(json.loads(line)["message"]["content"], end="", flush=True)
        ours = answer.headers
    print(
        f"\n\nanswered by {ours['X-Ollamux-Node']}"
        f" (why: {ours['X-Ollamux-Reason']}, attempts: {ours['X-Ollamux-Attempts']})"
    )


def _tell(app: App) -> None:
    client, admin = app.clients[0], app.admins[0]
    body = json.dumps({"model": _MODEL, "messages": [{"role": "user", "content": _QUESTION}]})
    print(
        f"\nclients  {client}    (OLLAMA_HOST={client} ollama list)"
        f"\nadmin    {admin}/status    (ollamux nodes --admin {admin})"
        f"\nmetrics  {admin}/metrics"
        f"\n\ncurl {client}/api/chat -d '{body}'",
        flush=True,
    )
