"""An Ollama that only emits tokens: raw protocol on uvloop, so that it is never the bottleneck.

`X-Bench: <records> <records per second>` on a request asks for a stream of that many records
after the first; any other POST gets one small JSON answer at once.
"""

import asyncio
import json
import re
import sys
from typing import cast

import uvloop

MODEL = "bench:latest"
_TICK_S = 0.001
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_BENCH = re.compile(rb"\r\nx-bench: *(\d+) (\d+)", re.IGNORECASE)
_STAMP = b'{"model":"bench:latest","created_at":"2026-01-01T00:00:00.123456789Z",'
_RECORD = _STAMP + b'"message":{"role":"assistant","content":" token"},"done":false}\n'
_COUNTS = (
    b'"done_reason":"stop","done":true,"total_duration":1000000,"load_duration":1000,'
    b'"prompt_eval_count":26,"prompt_eval_duration":1000,"eval_count":100,"eval_duration":1000}'
)
_LAST = _STAMP + b'"message":{"role":"assistant","content":""},' + _COUNTS + b"\n"
_WHOLE = _STAMP + b'"message":{"role":"assistant","content":"hello there"},' + _COUNTS
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
    b"Date: Thu, 01 Jan 2026 00:00:00 GMT\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _answer(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\n"
    date = b"Date: Thu, 01 Jan 2026 00:00:00 GMT\r\n"
    return head + date + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _json(value: object) -> bytes:
    return _answer(json.dumps(value).encode())


_ENTRY = {"name": MODEL, "model": MODEL, "digest": "0" * 64, "size": 1, "details": {}}
_LISTED = {"modified_at": "2026-01-01T00:00:00Z", **_ENTRY}
_LOADED = {"expires_at": "2036-01-01T00:00:00Z", "size_vram": 1, **_ENTRY}
_FIXED = {
    b"/api/version": _json({"version": "0.33.0"}),
    b"/api/tags": _json({"models": [_LISTED]}),
    b"/api/ps": _json({"models": [_LOADED]}),
}
_CHUNK, _END, _WHOLE_ANSWER = _chunk(_RECORD), _chunk(_LAST) + b"0\r\n\r\n", _answer(_WHOLE)


class Wheel:
    """All streams by the tick at which their next record is due; one timer drives them."""

    def __init__(self) -> None:
        self._slots: dict[int, list[Emitter]] = {}
        self._loop = asyncio.get_running_loop()
        self._tick = int(self._loop.time() / _TICK_S)
        self._loop.call_later(_TICK_S, self._turn)

    def add(self, stream: "Emitter", after_s: float) -> None:
        due = max(int((self._loop.time() + after_s) / _TICK_S), self._tick + 1)
        self._slots.setdefault(due, []).append(stream)

    def _turn(self) -> None:
        now = int(self._loop.time() / _TICK_S)
        while self._tick < now:
            self._tick += 1
            for stream in self._slots.pop(self._tick, ()):
                stream.emit()
        self._loop.call_later(_TICK_S, self._turn)


class Emitter(asyncio.Protocol):
    """One connection."""

    def __init__(self, wheel: Wheel) -> None:
        self._wheel = wheel
        self._buffer = bytearray()
        self._wanted = 0
        self._left = 0
        self._period_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while self._buffer and len(self._buffer) >= self._wanted:
            if not self._wanted:
                end = self._buffer.find(b"\r\n\r\n")
                if end < 0:
                    return
                length = _LENGTH.search(self._buffer, 0, end + 2)
                self._wanted = end + 4 + (int(length[1]) if length else 0)
                continue
            head = bytes(self._buffer[: self._buffer.index(b"\r\n\r\n")])
            del self._buffer[: self._wanted]
            self._wanted = 0
            self._reply(head)

    def _reply(self, head: bytes) -> None:
        path = head.split(b" ", 2)[1]
        bench = _BENCH.search(head)
        if bench is None:
            self._transport.write(_FIXED.get(path, _WHOLE_ANSWER))
            return
        self._left, rate = int(bench[1]), int(bench[2])
        self._period_s = 1 / rate
        self._transport.write(_STREAM_HEAD + _CHUNK)
        self._wheel.add(self, self._period_s)

    def emit(self) -> None:
        if self._transport.is_closing():
            return
        self._left -= 1
        if self._left <= 0:
            self._transport.write(_END)
            return
        self._transport.write(_CHUNK)
        self._wheel.add(self, self._period_s)


async def _serve(port: int) -> None:
    wheel = Wheel()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Emitter(wheel), "127.0.0.1", port, backlog=16384)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
