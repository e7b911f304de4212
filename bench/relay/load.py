"""The load generator: raw protocol on uvloop; prints one JSON object of what it saw.

python -m bench.relay.load requests URL CONNECTIONS SECONDS
python -m bench.relay.load streams URL STREAMS RECORDS_PER_SECOND SECONDS
python -m bench.relay.load latency URL REQUESTS_PER_SECOND SECONDS
python -m bench.relay.load image URL MEGABYTES TIMES
"""

import asyncio
import json
import statistics
import sys
from collections.abc import Callable, Coroutine, Sequence
from time import perf_counter
from typing import cast
from urllib.parse import urlsplit

import uvloop

from bench.relay.emitter import MODEL

_MARK = b'"done":'
_QUESTION = "Why is the sky blue? " * 12
_PROBE_S = 0.002


class Client(asyncio.Protocol):
    """One connection; `ask` writes a request and waits for the whole response."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] | None = None
        self.first_at = self.last_at = 0.0
        self.records = 0
        self.longest_gap_s = 0.0
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    async def ask(self, request: bytes) -> None:
        self._done = self._loop.create_future()
        self._head = b""
        self._tail = b""
        self._left = -1
        self.first_at = 0.0
        self.transport.write(request)
        await self._done

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        if not self.first_at:
            self.first_at = now
        else:
            self.longest_gap_s = max(self.longest_gap_s, now - self.last_at)
        self.last_at = now
        if self._left == -1:
            data = self._read_head(data)
            if self._left == -1:
                return
        seen = self._tail + data
        self.records += seen.count(_MARK)
        if self._left == -2:
            ended = seen.endswith(b"\r\n0\r\n\r\n") or seen == b"0\r\n\r\n"
        else:
            self._left -= len(data)
            ended = self._left <= 0
        # Short enough to hold no whole mark, so that none is counted twice.
        self._tail = seen[-6:]
        if ended and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _read_head(self, data: bytes) -> bytes:
        self._head += data
        head, mark, rest = self._head.partition(b"\r\n\r\n")
        if not mark:
            return b""
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(head.decode("latin-1"))
        lower = head.lower()
        at = lower.find(b"content-length:")
        self._left = int(lower[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else -2
        return rest

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self.lost = True
            self._done.set_result(None)


class Target:
    """Where requests go, and how they look."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self.prefix = parts.path.rstrip("/")

    async def connect(self) -> Client:
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(Client, self.host, self.port)
        return client

    def request(self, *, stream: bool, bench: str = "", content: str = _QUESTION) -> bytes:
        messages = [{"role": "user", "content": content}]
        return self._post({"model": MODEL, "messages": messages, "stream": stream}, bench)

    def image(self, megabytes: int) -> bytes:
        message = {"role": "user", "content": "what is this", "images": ["A" * (megabytes << 20)]}
        return self._post({"model": MODEL, "messages": [message], "stream": False}, "")

    def _post(self, value: object, bench: str) -> bytes:
        body = json.dumps(value).encode()
        extra = f"X-Bench: {bench}\r\n" if bench else ""
        head = (
            f"POST {self.prefix}/api/chat HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n"
            "User-Agent: ollama-python/0.6.0\r\nAccept: application/json\r\n"
            f"Content-Type: application/json\r\n{extra}Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


async def requests(url: str, connections: str, seconds: str) -> object:
    target = Target(url)
    request = target.request(stream=False)
    clients = [await target.connect() for _ in range(int(connections))]
    started = perf_counter()
    deadline = started + float(seconds)

    async def work(client: Client) -> int:
        count = 0
        while perf_counter() < deadline:
            await client.ask(request)
            count += 1
        return count

    counts = await asyncio.gather(*(work(client) for client in clients))
    return {"requests": sum(counts), "seconds": perf_counter() - started}


async def streams(url: str, wanted: str, rate: str, seconds: str) -> object:
    target = Target(url)
    records = max(1, int(float(seconds) * int(rate)))
    request = target.request(stream=True, bench=f"{records} {rate}")
    clients: list[Client] = []
    running = []
    async with asyncio.TaskGroup() as group:
        for _ in range(int(wanted)):
            clients.append(await target.connect())
            running.append(group.create_task(clients[-1].ask(request)))
            if len(clients) % 50 == 0:
                await asyncio.sleep(0.01)
        opened = perf_counter()
        print(json.dumps({"open": len(clients)}), flush=True)
    return {
        "records": sum(client.records for client in clients),
        "expected": (records + 1) * len(clients),
        "lost": sum(client.lost for client in clients),
        "longest_gap_s": max(client.longest_gap_s for client in clients),
        "stalled": sum(client.longest_gap_s > 1 + 1 / int(rate) for client in clients),
        "seconds": perf_counter() - opened,
    }


async def latency(url: str, rate: str, seconds: str) -> object:
    target = Target(url)
    request = target.request(stream=True, bench="1 1000")
    idle = [await target.connect() for _ in range(20)]
    samples: list[float] = []

    async def one() -> None:
        client = idle.pop() if idle else await target.connect()
        sent = perf_counter()
        await client.ask(request)
        samples.append(client.first_at - sent)
        idle.append(client)

    async with asyncio.TaskGroup() as group:
        started = perf_counter()
        for number in range(int(float(seconds) * int(rate))):
            await asyncio.sleep(max(0.0, started + number / int(rate) - perf_counter()))
            group.create_task(one())
    return {"samples": len(samples), **_spread(samples)}


async def image(url: str, megabytes: str, times: str) -> object:
    """Large bodies one after the other, while small requests measure how long the loop blocks."""
    target = Target(url)
    large, small = target.image(int(megabytes)), target.request(stream=False)
    sender, prober = await target.connect(), await target.connect()
    waits: list[float] = []
    busy = True

    async def probe() -> None:
        while busy:
            sent = perf_counter()
            await prober.ask(small)
            waits.append(perf_counter() - sent)
            await asyncio.sleep(_PROBE_S)

    took = []
    async with asyncio.TaskGroup() as group:
        group.create_task(probe())
        for _ in range(int(times)):
            sent = perf_counter()
            await sender.ask(large)
            took.append(perf_counter() - sent)
        busy = False
    return {"seconds": statistics.median(took), "small": _spread(waits), "max_s": max(waits)}


def _spread(samples: Sequence[float]) -> dict[str, float]:
    ordered = sorted(samples)
    return {
        "p50_s": ordered[len(ordered) // 2],
        "p99_s": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
    }


_MODES: dict[str, Callable[..., Coroutine[None, None, object]]] = {
    "requests": requests,
    "streams": streams,
    "latency": latency,
    "image": image,
}

if __name__ == "__main__":
    print(json.dumps(uvloop.run(_MODES[sys.argv[1]](*sys.argv[2:]))), flush=True)
