"""The client: sends the requests of a trace over HTTP at their times, and times the answers."""

import asyncio
import json
import math
from collections.abc import Collection, Sequence

import aiohttp

from bench.routing.experiment import Served
from bench.routing.fleet import NUM_CTX
from bench.routing.trace import BLOCK_TOKENS, Row
from bench.routing.workload import Request

_CHARS = 4  # of a token
# What the simulated template puts around a prompt that is one message of a user.
_BEFORE, _BEHIND = len("<|user|>"), len("<|assistant|>")
FLOW_HEADER = "X-OpenWebUI-User-Id"
_PATIENCE_S = 4 * 3600.0  # of the trace, after its last arrival
_SETTLE_S = 1.0
_READY_S = 30.0
_TRIES = 300
_READ_BYTES = 1 << 20


def body(request: Request) -> bytes:
    """The request as a client writes it. Nodes learn the true length of the answer by a schema
    that only one answer fits, as long as that; routers, by `num_predict`, the limit alone."""
    ask, row = request.ask, request.row
    value: dict[str, object] = {
        "model": ask.model,
        "messages": [{"role": "user", "content": content(row)}],
        "stream": True,
        "format": {"enum": ["a" * (_CHARS * row.answer_tokens - 2)]},  # with its quotation marks
    }
    options = {"num_predict": ask.max_tokens, "num_ctx": ask.num_ctx}
    return json.dumps({**value, "options": {k: v for k, v in options.items() if v}}).encode()


def content(row: Row) -> str:
    """A prompt of the true length, of which each whole block is the same text wherever it has the
    same hash. One longer than the context is without its oldest part, as `World` has it."""
    tokens, blocks = row.prompt_tokens, row.blocks
    if tokens > NUM_CTX:
        tokens, blocks = NUM_CTX, blocks[len(blocks) - NUM_CTX // BLOCK_TOKENS :]
    size = _CHARS * tokens - _BEFORE - _BEHIND
    step = _CHARS * BLOCK_TOKENS
    text = "".join(_filled(f"{block} ", step) for block in blocks)[_BEFORE:]
    rest = max(size - len(text), 0)
    return (text + _filled(f"{row.session} {row.at} ", rest))[: max(size, 1)]


def _filled(word: str, size: int) -> str:
    """Repeated, so that each part of it tells it from others."""
    return (word * (size // len(word) + 1))[:size]


async def replay(url: str, requests: Sequence[Request], speed: float) -> Sequence[Served]:
    """One entry for each request, in seconds of the trace; infinite for what never came."""
    begin, end = requests[0].ask.at, requests[-1].ask.at
    served = [
        Served(one.ask.flow, one.ask.model, math.inf, math.inf, one.ask.at - begin)
        for one in requests
    ]
    loop = asyncio.get_running_loop()
    start = loop.time() + _SETTLE_S

    async def one(place: int, request: Request) -> None:
        due = start + (request.ask.at - begin) / speed
        await asyncio.sleep(due - loop.time())
        first, last = await _ask(session, url, request)
        served[place] = served[place]._replace(
            first_s=(first - due) * speed, total_s=(last - due) * speed
        )

    limit_s = _SETTLE_S + (end - begin + _PATIENCE_S) / speed
    async with client(limit_s) as session:
        await asyncio.gather(*(one(*numbered) for numbered in enumerate(requests)))
    return served


def client(limit_s: float) -> aiohttp.ClientSession:
    """One that opens a connection wherever it wants one."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=limit_s),
        headers={"Content-Type": "application/json"},
    )


async def _ask(session: aiohttp.ClientSession, url: str, request: Request) -> tuple[float, float]:
    """When the first piece of the answer came and when the last, on the loop's clock."""
    clock = asyncio.get_running_loop().time
    first, tail = math.inf, b""
    sent = session.post(
        f"{url}/api/chat",
        data=body(request),
        headers={FLOW_HEADER: request.ask.flow},
        read_bufsize=_READ_BYTES,
    )
    try:
        async with sent as answer:
            if answer.status != 200:
                return math.inf, math.inf
            async for piece in answer.content.iter_any():
                first = min(first, clock())
                tail = (tail + piece)[-1000:]
    except (aiohttp.ClientError, TimeoutError):
        return first, math.inf
    return first, clock() if b'"done":true' in tail else math.inf


async def listed(url: str, models: Collection[str]) -> None:
    """Wait until a router knows of these models. Raises TimeoutError."""
    async with client(_READY_S) as session:
        for _ in range(_TRIES):
            if await _lists(session, url, models):
                return
            await asyncio.sleep(_READY_S / _TRIES)
    raise TimeoutError(f"{url} does not list the models")


async def _lists(session: aiohttp.ClientSession, url: str, models: Collection[str]) -> bool:
    try:
        async with session.get(f"{url}/api/tags") as answer:
            found = await answer.json(content_type=None)
    except (aiohttp.ClientError, ValueError):
        return False
    return set(models) <= {one.get("name") for one in found.get("models") or ()}


async def loads(nodes: Sequence[str]) -> int:
    """How often the nodes have loaded a model so far."""
    count = 0
    async with client(_READY_S) as session:
        for url in nodes:
            async with session.get(f"{url}/sim/state") as answer:
                count += (await answer.json())["loads"]
    return count
