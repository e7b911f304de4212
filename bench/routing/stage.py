"""The processes of a run on real sockets: the simulated nodes, and the router under test."""

import json
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.relay.servers import Running
from bench.routing.experiment import Case
from bench.routing.fleet import fleet, view
from bench.routing.replay import FLOW_HEADER
from bench.routing.routers import FleetView
from bench.routing.scenario import SCENARIOS

# The policies of this project, as `routing.policy` calls them.
OURS: Mapping[str, str] = {
    "ollamux-least-in-flight": "least-in-flight",
    "ollamux": "expected-delay",
}
_STOP_S = 10.0
# Limits that would tell of this machine's hiccups, not of nodes: none fails here.
_FAR_S = 36_000
_PROBE_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Contender:
    """A router that is not one of `OURS`: where it listens, or what starts it. In a `command`,
    {port} is where it shall listen, {nodes} the nodes' URLs with commas between them, {config} a
    router.yaml, which tells their slots and memory too."""

    name: str
    command: str = ""
    url: str = ""


@dataclass(frozen=True, slots=True)
class Setting:
    """How many times faster than the trace all clocks run, and the port of the first node (0: any
    that are free)."""

    speed: float = 20.0
    first_port: int = 0


@dataclass(frozen=True, slots=True)
class Stage:
    """What runs: the router under test, nodes by their URLs, and what can be watched of it."""

    url: str
    nodes: Sequence[str]
    watched: Mapping[str, Running]


def contender(text: str) -> Contender:
    """NAME=URL or NAME=COMMAND. Raises ValueError for what is neither."""
    name, _, what = text.partition("=")
    if not name or not what:
        raise ValueError(f"not NAME=COMMAND or NAME=URL: {text}")
    return Contender(name, url=what.rstrip("/")) if _is_url(what) else Contender(name, what)


@contextmanager
def staged(case: Case, seed: int, setting: Setting, other: Contender | None) -> Iterator[Stage]:
    """Nodes that listen and a router that was started. Raises RuntimeError for nodes that fail."""
    with tempfile.TemporaryDirectory() as name, _nodes(case, seed, setting, Path(name)) as found:
        urls, nodes = found
        if other is not None and other.url:
            yield Stage(other.url, urls, {"nodes": nodes})
            return
        port = _free_port()
        file = Path(name) / "router.yaml"
        specs = fleet(case.layout, seed, SCENARIOS[case.scenario].models)
        policy = OURS.get(case.router, "least-in-flight")
        file.write_text(json.dumps(config(view(specs), urls, port, policy)))
        command = _command(other, port, urls, file, setting.speed)
        with _started(command, Path(name) / "router.log") as process:
            url = f"http://127.0.0.1:{port}"
            yield Stage(url, urls, {"router": Running(url, process.pid), "nodes": nodes})


def config(nodes: FleetView, urls: Sequence[str], port: int, policy: str) -> object:
    """A router.yaml, in JSON. Nodes are asked what is in memory as often as in `World`."""
    waits = ("first_byte_s", "first_byte_min_s", "between_records_s", "silent_down_s", "busy_s")
    entries = [
        {"name": node.name, "url": url, "slots": node.slots, "gpus": list(node.gpus)}
        for node, url in zip(nodes, urls, strict=True)
    ]
    return {
        "listen": f"127.0.0.1:{port}",
        "admin": f"127.0.0.1:{_free_port()}",
        "nodes": entries,
        "routing": {"policy": policy, "flow_header": FLOW_HEADER},
        "trusted": ["127.0.0.1"],
        "probe": {
            "timeout_s": _PROBE_TIMEOUT_S,
            "interval_s": 30,
            "ps_interval_s": 2,
            "tags_interval_s": 300,
        },
        "timeouts": {"connect_s": _PROBE_TIMEOUT_S, **dict.fromkeys(waits, _FAR_S)},
        "log": {"level": "warning", "requests": False},
    }


def _command(
    other: Contender | None, port: int, nodes: Sequence[str], file: Path, speed: float
) -> Sequence[str]:
    if other is None:
        return _hurried(speed, "router", "serve", "--config", str(file))
    told = {"port": str(port), "nodes": ",".join(nodes), "config": str(file)}
    return [word.format_map(told) for word in shlex.split(other.command)]


def _hurried(speed: float, *command: str) -> Sequence[str]:
    return [sys.executable, "-m", "bench.routing.hurry", str(speed), *command]


@contextmanager
def _nodes(
    case: Case, seed: int, setting: Setting, folder: Path
) -> Iterator[tuple[Sequence[str], Running]]:
    """The nodes' URLs, and their process."""
    told = [case.layout.value, str(seed), case.scenario, str(setting.first_port)]
    command = _hurried(setting.speed, "bench.routing.nodes", *told)
    log = folder / "nodes.log"
    with _started(command, log, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(log.read_text())
        urls: Sequence[str] = json.loads(line)
        yield urls, Running(urls[0], process.pid)


@contextmanager
def _started(
    command: Sequence[str], log: Path, stdout: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command; ends it by its process id, and shows what it wrote where it failed first."""
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=stdout or errors, stderr=errors)
        try:
            yield process
        finally:
            if process.poll() is not None:
                sys.stderr.write(log.read_text())
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _is_url(what: str) -> bool:
    return what.startswith(("http://", "https://"))


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
