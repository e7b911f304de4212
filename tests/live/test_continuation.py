"""An answer that breaks off is finished as it would have been, by whatever model is asked.

A model whose template closes the assistant's message, and starts a new one where it should go on,
fails here: put it into `continuation.models` of the configuration with `!` before its name.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.live.target import ASKED, Reply, Target
from tests.rig import Rig, rig, spec

OPTIONS = {"num_predict": 24, "seed": 1, "temperature": 0}
BODIES: dict[str, dict[str, Any]] = {
    "/api/chat": {"messages": ASKED, "options": OPTIONS},
    "/api/generate": {"prompt": "Here are ten numbers:\n", "raw": True, "options": OPTIONS},
    "/v1/chat/completions": {
        "messages": ASKED, "max_tokens": 24, "seed": 1, "temperature": 0, "stream": True,
    },
}  # fmt: skip
_CHUNK_END = b"\n\r\n"  # of a record, a blank line or none, and the end of its chunk


class _Wire:
    """One connection to a target. Of the answer to the first POST, only `after` records pass."""

    def __init__(self, after: int) -> None:
        self._ends = after + 1  # that of its head is one, too
        self._posted = False
        self._passed = b""

    async def ask(self, reader: asyncio.StreamReader, onward: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            self._posted = self._posted or data.startswith(b"POST ")
            onward.write(data)
        onward.close()

    async def answer(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            data = self._cut(data)
            back.write(data)
            if self._ends <= 0:
                break
        back.close()

    def _cut(self, data: bytes) -> bytes:
        if not self._posted:
            return data
        *whole, rest = (self._passed + data).split(_CHUNK_END)
        if len(whole) < self._ends:
            self._ends -= len(whole)
            self._passed = rest
            return data
        left = sum(map(len, whole[: self._ends])) + self._ends * len(_CHUNK_END)
        self._ends = 0
        return data[: left - len(self._passed)]


@contextlib.asynccontextmanager
async def cut_off(target: Target, after: int) -> AsyncIterator[str]:
    """The target under another address, where answers end after so many records."""
    host, _, port = target.host.partition(":")
    calls: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        calls.add(task)
        wire = _Wire(after)
        try:
            answers, onward = await asyncio.open_connection(host, int(port))
            async with asyncio.TaskGroup() as group:
                group.create_task(wire.ask(reader, onward))
                await wire.answer(answers, writer)
                onward.transport.abort()
        finally:
            calls.discard(task)
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


@contextlib.asynccontextmanager
async def breaking(target: Target, after: int) -> AsyncIterator[Rig]:
    """A router whose first node breaks off after some records, and whose second is the target."""
    async with cut_off(target, after) as url:
        entries = [{"url": url}, {"url": target.url}]
        async with rig(spec(), spec(), entries=entries) as r:
            yield r


def texts(answer: Reply) -> Sequence[str]:
    """What each record of a whole answer says."""
    assert answer.status == 200, answer.text
    if answer.type == "text/event-stream":
        assert answer.events[-1][1] == "[DONE]"
        choices = [value["choices"] for _, value in answer.events[:-1]]
        return [(one[0]["delta"].get("content") or "") if one else "" for one in choices]
    *others, last = answer.records
    assert last["done"] is True
    assert not any(one["done"] for one in others)
    return [one.get("response", one.get("message", {}).get("content", "")) for one in others]


def places(said: Sequence[str]) -> Sequence[int]:
    """After how many records to cut: what comes before has begun to answer, and is not all."""
    within = [at for at, text in enumerate(said, 1) if text][:-1]
    return sorted({within[len(within) * part // 5] for part in range(5)})


@pytest.mark.parametrize("path", BODIES)
async def test_an_answer_that_breaks_off_is_finished_as_it_would_have_been(
    target: Target, path: str
) -> None:
    body = {"model": target.model, **BODIES[path]}
    said = texts(await target.post(path, body))
    if sum(bool(text) for text in said) < 3:
        pytest.skip("the model says too little to be cut off")
    for after in places(said):
        async with breaking(target, after) as r:
            answer = await replace(target, url=r.url).post(path, body)
            await r.until(lambda r=r: r.requests != [])  # type: ignore[misc]
            assert r.requests[0].get("continuations") == ["continued"], r.requests
        told = json.dumps("".join(texts(answer)))
        assert told == json.dumps("".join(said)), f"cut after {after} records"
