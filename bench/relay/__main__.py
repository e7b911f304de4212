"""Run the relay benchmark: every server in turn, in interleaved rounds, and print a table.

make bench-relay [ROUNDS=5] [ARGS="--only cpu --other NAME='COMMAND {port} {upstream}'"]
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench.relay.servers import (
    BASELINE,
    HAPROXY,
    LOAD_CORE,
    NGINX,
    OLLAMUX,
    Running,
    Server,
    ollamux,
    raise_descriptor_limit,
    running,
    started,
    wait_ready,
)
from router.core.types import Policy

_PORT, _EMITTER_PORT = 18435, 18434
_UPSTREAM = f"http://127.0.0.1:{_EMITTER_PORT}"
# A stream takes two descriptors of the server: the last step is what the usual limit allows.
_STEPS = (2000, 4000, 6000, 8000)
Figures = dict[str, float]

# name -> (unit, whether a ratio to nginx and to the baseline says something)
_ROWS: Mapping[str, tuple[str, bool]] = {
    "CPU per request": ("µs", True),
    "CPU per chunk, 200 streams": ("µs", True),
    "CPU per chunk, 2,000 streams": ("µs", True),
    "added p50 to first byte": ("ms", False),
    "added p99 to first byte": ("ms", False),
    "5,000 streams: stalled over 1 s": ("", False),
    "5,000 streams: lost": ("", False),
    "5,000 streams: longest gap": ("s", False),
    "peak streams with no stall": ("", False),
    "idle process": ("MB", False),
    "memory per open stream": ("KB", False),
    "50 MB image": ("ms", False),
    "50 MB image: CPU": ("ms", True),
    "50 MB image: longest wait of others": ("ms", False),
}


def _command(*arguments: object) -> list[str]:
    load = ["taskset", "-c", LOAD_CORE, sys.executable, "-m", "bench.relay.load"]
    return [*load, *map(str, arguments)]


def _load(*arguments: object) -> Figures:
    done = subprocess.run(_command(*arguments), capture_output=True, text=True, check=True)
    seen: Figures = json.loads(done.stdout.splitlines()[-1])
    return seen


def _while_open(
    server: Running, streams: int, rate: int, look: Callable[[], float]
) -> tuple[float, Figures]:
    """What `look` sees while all streams are open, and what the load saw in the end."""
    command = _command("streams", server.url, streams, rate, 6)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as load:
        assert load.stdout is not None
        load.stdout.readline()
        seen = look()
        return seen, json.loads(load.stdout.read())


def _cpu(server: Running) -> Figures:
    figures = {"idle process": server.rss_bytes() / 1e6}
    _load("requests", server.url, 32, 1)
    before = server.cpu_s()
    done = _load("requests", server.url, 32, 3)
    figures["CPU per request"] = (server.cpu_s() - before) / done["requests"] * 1e6
    # So many per stream that the machine, with the load beside it, is not the limit.
    for streams, rate in ((200, 50), (2000, 5)):
        figures[f"CPU per chunk, {streams:,} streams"] = _per_chunk(server, streams, rate)
    return figures


def _per_chunk(server: Running, streams: int, rate: int) -> float:
    """µs of CPU per record while all streams run: without what opening and ending them costs."""

    def per_second() -> float:
        started, before = time.monotonic(), server.cpu_s()
        time.sleep(3)
        return (server.cpu_s() - before) / (time.monotonic() - started)

    used, _ = _while_open(server, streams, rate, per_second)
    return used / (streams * rate) * 1e6


def _latency(server: Running) -> Figures:
    _load("latency", server.url, 200, 1)
    direct = _load("latency", _UPSTREAM, 200, 3)
    through = _load("latency", server.url, 200, 3)
    return {
        f"added p{n} to first byte": (through[f"p{n}_s"] - direct[f"p{n}_s"]) * 1e3
        for n in (50, 99)
    }


def _many(server: Running) -> Figures:
    idle = server.rss_bytes()
    held, done = _while_open(server, 5000, 2, server.rss_bytes)
    name = "5,000 streams:"
    return {
        "memory per open stream": (held - idle) / 5000 / 1e3,
        f"{name} stalled over 1 s": done["stalled"],
        f"{name} lost": done["lost"] + (done["expected"] - done["records"]),
        f"{name} longest gap": done["longest_gap_s"],
    }


def _peak(server: Running) -> Figures:
    """How many streams of 2/s it holds, in steps: none stalled over 1 s, none lost."""
    held = 0
    for streams in _STEPS:
        done = _load("streams", server.url, streams, 2, 6)
        if done["stalled"] or done["lost"] or done["records"] < done["expected"]:
            break
        held = streams
    return {"peak streams with no stall": held}


def _image(server: Running) -> Figures:
    before = server.cpu_s()
    done = _load("image", server.url, 50, 3)
    return {
        "50 MB image": done["seconds"] * 1e3,
        "50 MB image: CPU": (server.cpu_s() - before) / 3 * 1e3,
        "50 MB image: longest wait of others": done["max_s"] * 1e3,
    }


_PARTS: Mapping[str, Callable[[Running], Figures]] = {
    "cpu": _cpu,
    "latency": _latency,
    "many": _many,
    "peak": _peak,
    "image": _image,
}


def _median(samples: Sequence[float]) -> float:
    return statistics.median(samples) if samples else float("nan")


def _cell(samples: Sequence[float], unit: str) -> str:
    if not samples:
        return "-"
    spread = max(samples) - min(samples)
    digits = 0 if not unit else 1 if _median(samples) >= 10 else 2
    return f"{_median(samples):.{digits}f} ± {spread / 2:.{digits}f}"


def _table(servers: Sequence[Server], seen: Mapping[str, Mapping[str, list[float]]]) -> str:
    names = [server.name for server in servers]
    lines = ["| | " + " | ".join(names) + " | ollamux ÷ nginx | ollamux ÷ baseline |"]
    lines.append("|---" * (len(names) + 3) + "|")
    measured = {row for figures in seen.values() for row in figures}
    for row, (unit, compared) in _ROWS.items():
        if row not in measured:
            continue
        cells = [_cell(seen[name].get(row, []), unit) for name in names]
        ratios = ["", ""]
        if compared:
            mine = _median(seen[OLLAMUX].get(row, []))
            theirs = (_median(seen[name].get(row, [])) for name in (NGINX.name, BASELINE.name))
            ratios = [f"{mine / value:.2f}" if value else "" for value in theirs]
        label = f"{row}, {unit}" if unit else row
        lines.append(f"| {label} | " + " | ".join([*cells, *ratios]) + " |")
    return "\n".join(lines)


def _machine() -> str:
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), "unknown CPU",
    )  # fmt: skip
    python = platform.python_version()
    return f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, Python {python}"


def _other(text: str) -> Server:
    name, _, command = text.partition("=")
    words = shlex.split(command)

    def build(port: int, upstream: str, folder: Path) -> Sequence[str]:
        return [word.format(port=port, upstream=upstream, folder=folder) for word in words]

    return Server(name, build, lambda: name, words[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=_PARTS, action="append", help="default: all parts")
    parser.add_argument(
        "--policy", choices=list(Policy), type=Policy, default=Policy.LEAST_IN_FLIGHT,
        help="of ollamux; the default is what the figures in docs/benchmarks.md were measured with",
    )  # fmt: skip
    parser.add_argument("--servers", help="comma-separated names; default: all that are installed")
    parser.add_argument("--other", action="append", default=[], type=_other)
    args = parser.parse_args()
    raise_descriptor_limit()
    known = [ollamux(args.policy), NGINX, HAPROXY, BASELINE, *args.other]
    wanted = args.servers.split(",") if args.servers else [server.name for server in known]
    servers = [server for server in known if server.name in wanted]
    for server in [server for server in servers if not server.installed]:
        print(f"skipped: {server.name} is not installed ({server.program})")
        servers.remove(server)
    seen: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    emitter = [sys.executable, "-m", "bench.relay.emitter", str(_EMITTER_PORT)]
    with started(emitter, LOAD_CORE):
        wait_ready(_UPSTREAM)
        for number in range(args.rounds):
            for server in servers:
                print(f"round {number + 1}: {server.name}", file=sys.stderr)
                for part in args.only or _PARTS:
                    with running(server, _PORT, _UPSTREAM) as one:
                        for row, value in _PARTS[part](one).items():
                            seen[server.name][row].append(value)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {args.rounds} rounds, median ± half the spread.")
    print(f"{_machine()}.")
    print("; ".join(server.version() for server in servers) + ".\n")
    print(_table(servers, seen))


if __name__ == "__main__":
    main()
