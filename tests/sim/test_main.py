"""The simulated node as a process of its own."""

import asyncio
import signal
import sys

import aiohttp
import pytest

from router.sim.__main__ import main


async def start(*options: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "router.sim", *options, stdout=asyncio.subprocess.PIPE
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_process_tells_its_url_serves_and_stops(number: signal.Signals) -> None:
    process = await start("--port", "0", "--models", "qwen2.5:0.5b", "--load-s", "0")
    assert process.stdout is not None
    url = (await process.stdout.readline()).decode().strip()
    async with aiohttp.ClientSession(url) as web, web.get("/api/tags") as response:
        assert (await response.json())["models"][0]["name"] == "qwen2.5:0.5b"
    process.send_signal(number)
    assert await process.wait() == 0


def test_unknown_preset_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--models", "nope"]) == 2
    assert "llama3:8b" in capsys.readouterr().err
