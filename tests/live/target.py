"""What the contract is asked of: one node, or a router in front of two."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.rig import Answer, Rig, talk

# No node has it, and no registry: nothing here may pull.
NOBODYS = "ollamux-nobodys-model"
ASKED: Sequence[Mapping[str, str]] = [{"role": "user", "content": "Say hello."}]
# What asks for an answer says how long it may be.
SHORT: Mapping[str, Any] = {"num_predict": 4, "seed": 1, "temperature": 0}
_WAIT_S = 30.0


@dataclass(frozen=True)
class Reply:
    """A response: its status, headers and body as they came."""

    raw: Answer

    @property
    def status(self) -> int:
        return self.raw.status

    @property
    def body(self) -> bytes:
        return self.raw.body

    @property
    def text(self) -> str:
        return self.raw.body.decode()

    @property
    def type(self) -> str | None:
        """Its Content-Type."""
        return self.raw.header("Content-Type")

    def header(self, name: str) -> str | None:
        return self.raw.header(name)

    @property
    def json(self) -> Any:
        """The one JSON value that the body is."""
        return json.loads(self.raw.body)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records of an NDJSON stream; a blank or an unfinished line fails the test."""
        assert self.raw.body.endswith(b"\n"), self.raw
        return [json.loads(line) for line in self.raw.body[:-1].split(b"\n")]

    @property
    def events(self) -> list[tuple[str, Any]]:
        """(name, value) of each event of a stream; `[DONE]` stays a text."""
        assert self.raw.body.endswith(b"\n\n"), self.raw
        return [_event(block) for block in self.text[:-2].split("\n\n")]


def _event(block: str) -> tuple[str, Any]:
    *named, data = block.split("\n")
    value = data.removeprefix("data: ")
    name = named[0].removeprefix("event: ") if named else ""
    return name, value if value == "[DONE]" else json.loads(value)


@dataclass(frozen=True)
class Target:
    """Where requests go. `names` are the nodes behind a router, empty for a node itself.

    `chats` can chat, `embeds` can embed, each on all nodes; empty where there is none. An answer
    of `slow` takes long enough that a client can leave in the middle. `own_rules`: its
    cross-origin rules are Ollama's own, and not what some user has set.
    """

    url: str
    chats: str
    embeds: str
    slow: str
    version: tuple[int, ...]
    names: Sequence[str] = ()
    own_rules: bool = True
    live: bool = False
    rig: Rig | None = None

    @property
    def model(self) -> str:
        """A model that can chat; skips the test where there is none."""
        return self.chats or pytest.skip("no model that can chat is on every node")

    @property
    def embedder(self) -> str:
        """A model that can embed; skips the test where there is none."""
        return self.embeds or pytest.skip("no model that can embed is on every node")

    @property
    def routed(self) -> bool:
        return bool(self.names)

    @property
    def host(self) -> str:
        return self.url.partition("://")[2]

    def pinned(self, model: str) -> str:
        """The model on the first node, whoever else has it."""
        return self.everywhere(model)[0]

    def everywhere(self, model: str) -> Sequence[str]:
        """The model on each of the nodes."""
        return [f"{model}@{name}" for name in self.names] or [model]

    async def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *headers: str,
        version: str = "1.1",
    ) -> Reply:
        """Send one request over a connection of its own. `body` is bytes, or anything JSON."""
        request = self.request(method, path, body, *headers, version=version)
        return await self.exchange(request, bodiless=method == "HEAD")

    async def exchange(self, request: bytes, *, bodiless: bool = False) -> Reply:
        """Send a request as it is over a connection of its own."""
        async with talk(self.url) as connection:
            await connection.send(request)
            return Reply(await connection.answer(bodiless=bodiless))

    def request(
        self, method: str, path: str, body: object = None, *headers: str, version: str = "1.1"
    ) -> bytes:
        """A request as it goes over the wire."""
        lines = [f"{method} {path} HTTP/{version}", f"Host: {self.host}", *headers]
        data = b""
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            lines.append(f"Content-Length: {len(data)}")
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + data

    async def get(self, path: str, *headers: str) -> Reply:
        return await self.ask("GET", path, None, *headers)

    async def post(self, path: str, body: object, *headers: str) -> Reply:
        return await self.ask("POST", path, body, *headers)

    async def load(self, model: str, **fields: Any) -> Reply:
        """Load a model, and nothing else."""
        return await self.post("/api/generate", {"model": model, **fields})

    async def resident(self) -> dict[str, dict[str, Any]]:
        """What `/api/ps` lists now, by name."""
        return {one["name"]: one for one in (await self.get("/api/ps")).json["models"]}

    async def resident_when(
        self, holds: Callable[[Mapping[str, dict[str, Any]]], bool]
    ) -> dict[str, dict[str, Any]]:
        """What is listed once it `holds`: a real node unloads beside its answer, and a router may
        be a probe behind."""
        given_up = time.monotonic() + _WAIT_S
        while True:
            if self.rig is not None:
                await self.rig.look()
            shown = await self.resident()
            if holds(shown) or not self.live or time.monotonic() > given_up:
                assert holds(shown), shown
                return shown

    async def unload(self, model: str) -> None:
        """Have it unloaded on every node."""
        for name in self.everywhere(model):
            answer = await self.load(name, keep_alive=0)
            assert (answer.status, answer.json["done_reason"]) == (200, "unload")
