"""The demo as a real process: what it prints, and that what it prints is true."""

import asyncio
import json
import re
import shlex
import signal

import aiohttp

from tests.process import ran, started


async def test_once_prints_the_answer_who_gave_it_and_where_to_go_on() -> None:
    code, out, err = await ran("demo", "--once")
    assert (code, err) == (0, "")
    urls = dict(re.findall(r"^simulated node (\S+) at (http://\S+)$", out, re.MULTILINE))
    assert list(urls) == ["gpu-1", "gpu-2", "gpu-3"]
    found = re.search(
        r"^> Why is the sky blue\?\n(.+)\n\nanswered by (\S+) \(why: (\S+), attempts: 1\)$",
        out, re.MULTILINE,
    )  # fmt: skip
    assert found is not None, out
    answer, node, why = found.groups()
    assert len(answer.split()) > 5
    assert node in urls
    assert why == "load"
    assert re.search(
        r"^clients  (http://\S+)    \(OLLAMA_HOST=\1 ollama list\)$", out, re.MULTILINE
    )
    assert re.search(r"^admin    (http://\S+)/status    \(ollamux nodes --admin \1\)$", out, re.M)
    assert re.search(r"^metrics  http://\S+/metrics$", out, re.MULTILINE)
    assert re.search(r"^curl http://\S+/api/chat -d '\{.*\}'$", out, re.MULTILINE)


async def test_without_once_it_runs_until_ctrl_c() -> None:
    async with asyncio.timeout(60), started("demo") as process, aiohttp.ClientSession() as session:
        _, url, _, body = shlex.split(await process.out.next(lambda line: line.startswith("curl ")))
        await process.out.next(lambda line: line == "Ctrl-C stops it.")
        async with session.post(url, data=body) as answer:
            assert answer.status == 200
            records = [json.loads(line) for line in (await answer.read()).splitlines()]
        text = "".join(record["message"]["content"] for record in records)
        assert text in str(process.out)
        assert records[-1]["done"] is True
        for name in ("admin", "metrics"):
            line = next(line for line in process.out.lines if line.startswith(f"{name} "))
            async with session.get(line.split()[1]) as page:
                assert page.status == 200
        admin = line.split()[1].removesuffix("/metrics")
        async with session.post(f"{admin}/reload") as refused:
            assert refused.status == 422
        process.signal(signal.SIGINT)
        assert await process.ended() == 0
        assert process.out.lines[-1] == "stopping"
        assert "Traceback" not in process.text
