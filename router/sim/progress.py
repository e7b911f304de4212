"""The answer to a long job (pull, push, create): a line per step, or its outcome alone."""

import asyncio
from collections.abc import Awaitable, Callable

from router.sim import gojson
from router.sim.exchange import Exchange
from router.sim.native import JSON
from router.sim.recipe import Layer
from router.sim.request import Fields

_NDJSON = "application/x-ndjson"


class Failed(Exception):
    """The job failed. `status` is told only when nothing was sent before."""

    def __init__(self, message: str, status: int = 500) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


class Progress:
    """Tells how a job goes on: in lines when the client wants a stream, else not at all."""

    def __init__(self, exchange: Exchange, *, stream: bool) -> None:
        self.exchange = exchange
        self._stream = stream
        self._begun = False

    async def say(self, status: str, **fields: object) -> None:
        """Tell of one step."""
        if self._stream:
            await self._line({"status": status, **fields})

    async def move(self, verb: str, layer: Layer) -> None:
        """Have a layer pass between node and registry; takes the time that the spec says."""
        machine = self.exchange.machine
        fields = {"digest": layer.digest, "total": layer.size}
        status = f"{verb} {layer.short}"
        await self.say(status, **fields)
        started = asyncio.get_running_loop().time()
        steps = machine.spec.transfer_records
        for step in range(1, steps + 1):
            done = layer.size * step // steps
            took = done / machine.spec.transfer_bps * self.exchange.pace
            await machine.driver.until(started + took)
            await self.say(status, **fields, completed=done)

    async def succeed(self) -> None:
        """End with success."""
        if self._stream:
            await self._line({"status": "success"})
            await self.exchange.end()
        else:
            await self.exchange.whole({"status": "success"})

    async def fail(self, error: Failed) -> None:
        """End with an error: a status while there is one to give, then a line."""
        value: dict[str, object] = {"error": error.message}
        if self._begun:
            await self._line(value)
            await self.exchange.end()
            return
        content_type = "application/json" if self._stream else JSON
        await self.exchange.whole(value, status=error.status, content_type=content_type)

    async def _line(self, value: dict[str, object]) -> None:
        exchange = self.exchange
        if not self._begun:
            self._begun = True
            if exchange.fault is not None:
                exchange.failure_record = gojson.line({"error": exchange.fault.message})
            await exchange.begin(_NDJSON)
        await exchange.record(gojson.line(value))


async def report(
    exchange: Exchange, fields: Fields, job: Callable[[Progress], Awaitable[None]]
) -> None:
    """Do `job` and answer with how it went; it may raise Failed."""
    progress = Progress(exchange, stream=fields.flag("stream", default=True))
    try:
        await job(progress)
    except Failed as error:
        await progress.fail(error)
    else:
        await progress.succeed()
