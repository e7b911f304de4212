"""The servers under test: how each is started, on one core, in front of the emitter."""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

OLLAMUX = "ollamux"
SERVER_CORE, LOAD_CORE = "0", "1"
_READY_S = 20
_TICKS = os.sysconf("SC_CLK_TCK")
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Server:
    """A server under test. `command` builds its command line from (port, upstream, folder)."""

    name: str
    command: Callable[[int, str, Path], Sequence[str]]
    version: Callable[[], str]
    program: str = sys.executable

    @property
    def installed(self) -> bool:
        return shutil.which(self.program) is not None


@dataclass
class Running:
    """A started server: where it is, and what it has used so far."""

    url: str
    pid: int

    def _family(self) -> list[int]:
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [self.pid, *map(int, children)]

    def cpu_s(self) -> float:
        """User and system time of the process and its workers."""
        used = 0
        for pid in self._family():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            used += int(fields[11]) + int(fields[12])
        return used / _TICKS

    def rss_bytes(self) -> int:
        pages = 0
        for pid in self._family():
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def raise_descriptor_limit() -> None:
    """For the load, the emitter and every server alike: they inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def ollamux(policy: str) -> Server:
    """The relay: whatever chooses the node, there is one, and nothing waits for it."""

    def command(port: int, upstream: str, folder: Path) -> Sequence[str]:
        file = folder / "router.yaml"
        file.write_text(
            f"listen: 127.0.0.1:{port}\nadmin: 127.0.0.1:{port + 1}\n"
            f"nodes:\n  - {{name: bench, url: '{upstream}', slots: 100000}}\n"
            f"routing: {{policy: {policy}}}\n"
            "log: {format: json, level: info, requests: true}\n"
        )
        return [sys.executable, "-m", "router", "serve", "--config", str(file)]

    return Server(OLLAMUX, command, _said(sys.executable, "-m", "router", "version"))


def _baseline(port: int, upstream: str, folder: Path) -> Sequence[str]:
    return [sys.executable, "-m", "bench.relay.baseline", str(port), upstream]


def _nginx(port: int, upstream: str, folder: Path) -> Sequence[str]:
    (folder / "nginx.conf").write_text(f"""
daemon off; worker_processes 1; pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 18000; }}
http {{
  access_log {folder}/access.log; client_max_body_size 0; client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  keepalive_requests 100000000; keepalive_timeout 600s; tcp_nodelay on;
  upstream nodes {{ server {upstream.removeprefix("http://")}; keepalive 4096;
                    keepalive_requests 100000000; }}
  server {{ listen 127.0.0.1:{port} backlog=16384; location / {{
    proxy_pass http://nodes; proxy_http_version 1.1; proxy_set_header Connection "";
    proxy_buffering off; proxy_request_buffering off; proxy_read_timeout 600s; }} }}
}}
""")
    return ["nginx", "-c", str(folder / "nginx.conf"), "-p", str(folder)]


def _haproxy(port: int, upstream: str, folder: Path) -> Sequence[str]:
    (folder / "haproxy.cfg").write_text(f"""
global
  nbthread 1
  maxconn 9000
  log {folder}/log.sock local0
defaults
  mode http
  log global
  option httplog
  option http-no-delay
  option http-keep-alive
  http-reuse always
  timeout connect 5s
  timeout client 600s
  timeout server 600s
frontend clients
  bind 127.0.0.1:{port} backlog 16384
  default_backend nodes
backend nodes
  server node {upstream.removeprefix("http://")} maxconn 9000 pool-max-conn 4096
""")
    return ["haproxy", "-db", "-q", "-f", str(folder / "haproxy.cfg")]


def _said(*command: str) -> Callable[[], str]:
    def ask() -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return (done.stdout + done.stderr).strip().splitlines()[0]

    return ask


BASELINE = Server(
    "aiohttp + aiohttp",
    _baseline,
    _said(sys.executable, "-c", "import aiohttp; print('aiohttp', aiohttp.__version__)"),
)
NGINX = Server("nginx", _nginx, _said("nginx", "-v"), "nginx")
HAPROXY = Server("haproxy", _haproxy, _said("haproxy", "-v"), "haproxy")


@contextmanager
def started(command: Sequence[str], core: str, log: Path | None = None) -> Iterator[int]:
    """Run a command on one core; gives its process id, ends it by that id."""
    out = log.open("wb") if log is not None else subprocess.DEVNULL
    process = subprocess.Popen(["taskset", "-c", core, *command], stdout=out, stderr=out)
    try:
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_ready(url: str) -> None:
    """Until the server relays, or lists, what the emitter has."""
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        try:
            with _OPENER.open(f"{url}/api/version", timeout=1) as answer:
                if answer.status == 200:
                    return
        except (OSError, urllib.error.URLError):
            time.sleep(0.05)
    raise RuntimeError(f"{url} was not ready within {_READY_S} s")


@contextmanager
def running(server: Server, port: int, upstream: str) -> Iterator[Running]:
    """A server under test, ready."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = server.command(port, upstream, folder)
        with started(command, SERVER_CORE, folder / "output.log") as pid:
            url = f"http://127.0.0.1:{port}"
            wait_ready(url)
            yield Running(url, pid)
