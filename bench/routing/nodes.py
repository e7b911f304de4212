"""All nodes of the pool as one process; prints their URLs as a JSON list when they listen.

python -m bench.routing.nodes LAYOUT SEED SCENARIO FIRST_PORT
"""

import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack

from bench.routing.fleet import Layout, fleet
from bench.routing.scenario import SCENARIOS
from router.sim import SimNode, SimSpec


async def serve(specs: Sequence[SimSpec], first_port: int) -> None:
    """Until SIGTERM or SIGINT. The ports follow each other; from 0 on, they are free ones."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        urls = []
        for place, spec in enumerate(specs):
            port = first_port + place if first_port else 0
            node = await stack.enter_async_context(SimNode(spec, port=port))
            urls.append(node.url)
        print(json.dumps(urls), flush=True)
        await stop.wait()


def main() -> None:
    layout, seed, scenario, first_port = sys.argv[1:]
    specs = fleet(Layout(layout), int(seed), SCENARIOS[scenario].models)
    asyncio.run(serve(specs, int(first_port)))


if __name__ == "__main__":
    main()
