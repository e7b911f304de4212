"""python -m router.sim: one simulated node as a process."""

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace

from router.sim.models import GB, PRESETS, SimModel, SimSpec
from router.sim.server import SimNode


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; prints the node's URL on one line when it listens."""
    options = _parser().parse_args(argv)
    try:
        models = tuple(_model(name, options) for name in options.models.split(",") if name)
    except KeyError as error:
        known = ", ".join(PRESETS)
        sys.stderr.write(f"no preset {error}; there are: {known}\n")
        return 2
    spec = SimSpec(
        models=models,
        num_parallel=options.num_parallel,
        max_loaded=options.max_loaded,
        max_queue=options.max_queue,
        memory_bytes=int(options.memory_gb * GB),
        keep_alive_s=options.keep_alive,
        version=options.version,
        warm=tuple(name for name in options.warm.split(",") if name),
        answer_tokens=(options.min_tokens, options.max_tokens),
    )
    asyncio.run(_serve(SimNode(spec, port=options.port, host=options.host)))
    return 0


async def _serve(node: SimNode) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with node:
        sys.stdout.write(f"{node.url}\n")
        sys.stdout.flush()
        await stop.wait()


def _model(name: str, options: argparse.Namespace) -> SimModel:
    """A preset with the speeds of the command line. Raises KeyError."""
    model = PRESETS[name if ":" in name else f"{name}:latest"]
    given = {
        "load_s": options.load_s,
        "prefill_tps": options.prefill_tps,
        "decode_tps": options.decode_tps,
    }
    return replace(model, **{key: value for key, value in given.items() if value is not None})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m router.sim", description=__doc__)
    default = SimSpec()
    add = parser.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=11434, help="0 takes a free one")
    add("--models", default="llama3:8b,qwen2.5:0.5b,nomic-embed-text", help="presets, by commas")
    add("--warm", default="", help="models loaded at the start, separated by commas")
    add("--load-s", type=float, help="seconds a load takes, instead of the preset's")
    add("--prefill-tps", type=float, help="prompt tokens per second")
    add("--decode-tps", type=float, help="answer tokens per second")
    add("--num-parallel", type=int, default=default.num_parallel)
    add("--max-loaded", type=int, default=default.max_loaded)
    add("--max-queue", type=int, default=default.max_queue)
    add("--memory-gb", type=float, default=default.memory_bytes / GB)
    add("--keep-alive", type=float, default=default.keep_alive_s, help="seconds")
    add("--version", default=default.version, help="what /api/version tells")
    add("--min-tokens", type=int, default=default.answer_tokens[0])
    add("--max-tokens", type=int, default=default.answer_tokens[1])
    return parser


if __name__ == "__main__":
    sys.exit(main())
