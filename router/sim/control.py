"""The paths under /sim/, by which another process commands a simulated node.

GET /sim/state tells what the node does; GET /sim/seen tells all requests that it remembers, with
the time of each arrival (monotonic: the same clock in all processes of a machine). POST /sim/fault
adds one fault (the fields of `Fault` as a JSON object), DELETE takes all away and releases what
hangs; POST /sim/release only releases; POST /sim/refuse {"for_s": seconds} closes the listening
socket for that long.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from aiohttp import web

from router.sim import faults, gojson
from router.sim.faults import Faults

PREFIX = "/sim/"


@dataclass(frozen=True, slots=True)
class Control:
    """What the commands act on."""

    faults: Faults
    state: Callable[[], Mapping[str, object]]
    seen: Callable[[], Sequence[Mapping[str, object]]]
    release: Callable[[], None]
    refuse_for: Callable[[float, web.Request], Awaitable[None]]

    async def serve(self, request: web.Request) -> web.Response:
        """Follow one command."""
        try:
            return await self._serve(request, await request.text())
        except (ValueError, TypeError) as error:
            return web.Response(status=400, text=str(error))

    async def _serve(self, request: web.Request, body: str) -> web.Response:
        match request.method, request.path:
            case "GET", "/sim/state":
                return _json(self.state())
            case "GET", "/sim/seen":
                return _json(self.seen())
            case "POST", "/sim/fault":
                self.faults.add(faults.from_json(_object(body)))
            case "DELETE", "/sim/fault":
                self.faults.clear()
                self.release()
            case "POST", "/sim/release":
                self.release()
            case "POST", "/sim/refuse":
                await self.refuse_for(float(str(_object(body).get("for_s"))), request)
            case _:
                return web.Response(status=404, text="no such command")
        return web.Response(status=204)


def _json(value: object) -> web.Response:
    return web.Response(body=gojson.dumps(value), content_type="application/json")


def _object(body: str) -> dict[str, object]:
    value = json.loads(body)
    if not isinstance(value, dict):
        raise ValueError("a JSON object is wanted")
    return value
