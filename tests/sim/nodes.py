"""Nodes without delays, and the small things every test of the server needs."""

import json
import math

import aiohttp

from router.sim import GB, SimModel, SimSpec


def quick(name: str, **changes: object) -> SimModel:
    """A model that takes no time for anything."""
    base: dict[str, object] = {
        "size_bytes": GB,
        "load_s": 0.0,
        "prefill_tps": math.inf,
        "decode_tps": math.inf,
    }
    return SimModel(name, **{**base, **changes})  # type: ignore[arg-type]


CHAT = quick("llama3:8b")
EMBED = quick("nomic-embed-text", embedding=True, embedding_length=8)
SPEC = SimSpec(models=(CHAT, EMBED), answer_tokens=(6, 6))
USER = [{"role": "user", "content": "hi"}]


def slow(**changes: object) -> SimSpec:
    """A node whose model takes an hour for a load and a minute for each token."""
    crawling = quick("llama3:8b", decode_tps=1 / 60, load_s=3600.0)
    base: dict[str, object] = {"models": (crawling, EMBED)}
    return SimSpec(**{**base, **changes})  # type: ignore[arg-type]


def chat_body(**changes: object) -> dict[str, object]:
    return {"model": "llama3:8b", "messages": USER, **changes}


async def records(response: aiohttp.ClientResponse) -> list[dict[str, object]]:
    """The NDJSON records of a stream."""
    return [json.loads(line) for line in (await response.text()).split("\n") if line]


async def events(response: aiohttp.ClientResponse) -> list[tuple[str, dict[str, object]]]:
    """The events of a stream; [DONE] is an event of that name."""
    found: list[tuple[str, dict[str, object]]] = []
    for block in (await response.text()).split("\n\n")[:-1]:
        name, _, data = block.rpartition("data: ")
        if data == "[DONE]":
            found.append(("[DONE]", {}))
        else:
            found.append((name.strip().removeprefix("event: "), json.loads(data)))
    return found
