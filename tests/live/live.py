"""Real Ollama nodes to test against, given or started here, and a router process before them."""

import contextlib
import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from router.address import Url
from router.sim import names
from tests.live.target import Target
from tests.process import ROOT, environment

HOW = (
    "no Ollama to test against: give OLLAMA_HOSTS=http://a:11434,http://b:11434, "
    "or put ollama on the PATH"
)
_START_S = 30.0
_NEWEST = (1000,)
_STORES = (Path.home() / ".ollama/models", Path("/usr/share/ollama/.ollama/models"))
# A proxy of the environment is none for nodes.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Nodes:
    """Nodes that answer. `model` and `embedder` are on all of them; empty where none is.

    `own`: started here, with Ollama's defaults.
    """

    urls: Sequence[str]
    model: str
    embedder: str
    version: tuple[int, ...]
    own: bool

    def target(self, router: str | None) -> Target:
        """The router at that address, or the first node."""
        called = [f"n{number}" for number, _ in enumerate(self.urls, 1)] if router else ()
        return Target(
            router or self.urls[0],
            self.model,
            self.embedder,
            self.model,
            self.version,
            called,
            own_rules=self.own or router is not None,
            live=True,
        )


@contextlib.contextmanager
def nodes(folder: Path) -> Iterator[Nodes]:
    """The nodes of OLLAMA_HOSTS, else two of our own in `folder`; skips where there is neither."""
    hosts = os.environ.get("OLLAMA_HOSTS", "")
    wanted = os.environ.get("OLLAMA_TEST_MODEL", "")
    program = shutil.which("ollama")
    if hosts:
        urls = [str(Url.parse(text.strip())) for text in hosts.split(",")]
        if not all(url.startswith("http://") and url.count("/") == 2 for url in urls):
            pytest.fail("OLLAMA_HOSTS holds plain http addresses without a path", pytrace=False)
        yield _found(urls, wanted, own=False)
    elif program is None:
        pytest.skip(HOW)
    else:
        with contextlib.ExitStack() as stack:
            urls = [
                stack.enter_context(_served(program, folder / name, wanted))
                for name in ("n1", "n2")
            ]
            yield _found(urls, wanted, own=True)


def _found(urls: Sequence[str], wanted: str, *, own: bool) -> Nodes:
    """What is on all of the nodes: the wanted model, else the smallest that can do the job."""
    listed = [_listed(url) for url in urls]
    common = [name for name in sorted(listed[0], key=listed[0].__getitem__)
              if all(name in one for one in listed)]  # fmt: skip
    able = {name: _capabilities(urls[0], name) for name in common}
    chats = [name for name in common if "completion" in able[name]]
    embeds = [name for name in common if "embedding" in able[name]]
    if wanted:
        wanted = str(names.parse(wanted))
        if wanted not in common:
            pytest.fail(f"not on every node: OLLAMA_TEST_MODEL={wanted}", pytrace=False)
        chats = [wanted]
    # Most models that chat can embed, though they do not say so.
    embeds += [name for name in chats[:1] if not embeds and _can_embed(urls[0], name)]
    return Nodes(
        urls,
        model=chats[0] if chats else "",
        embedder=embeds[0] if embeds else "",
        version=min(_version(url) for url in urls),
        own=own,
    )


def _listed(url: str) -> Mapping[str, int]:
    """Size by name of what a node has; models that run elsewhere are none."""
    models = _asked(f"{url}/api/tags")["models"]
    return {one["name"]: one["size"] for one in models if "remote_host" not in one}


def _capabilities(url: str, name: str) -> Sequence[str]:
    shown: Sequence[str] = _asked(f"{url}/api/show", {"model": name}).get("capabilities", ())
    return shown


def _can_embed(url: str, name: str) -> bool:
    try:
        return bool(_asked(f"{url}/api/embed", {"model": name, "input": "one"})["embeddings"])
    except urllib.error.HTTPError:
        return False


def _version(url: str) -> tuple[int, ...]:
    told: str = _asked(f"{url}/api/version")["version"]
    numbers = tuple(int(part) for part in told.partition("-")[0].split("."))
    return numbers if any(numbers) else _NEWEST  # a build of one's own says 0.0.0


def _asked(url: str, body: object = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    with _direct.open(url, data=data, timeout=_START_S) as answer:
        value: dict[str, Any] = json.load(answer)
        return value


@contextlib.contextmanager
def _served(program: str, folder: Path, wanted: str) -> Iterator[str]:
    """A node with a home and a store of its own; gives its address."""
    folder.mkdir()
    store = folder / "models"
    if wanted:
        _lend(wanted, store)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    env = {"OLLAMA_HOST": host, "OLLAMA_MODELS": str(store), "HOME": str(folder)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, "serve"], env=environment(env), cwd=folder,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        _wait(process, f"http://{host}/api/version", folder / "log")
        yield f"http://{host}"
    finally:
        _stop(process)


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    for _ in range(int(_START_S / 0.1)):
        with contextlib.suppress(OSError):
            _asked(url)
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            break
    pytest.fail(f"ollama does not answer:\n{log.read_text()}", pytrace=False)


def _stop(process: "subprocess.Popen[bytes]") -> int:
    process.terminate()
    try:
        return process.wait(_START_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _lend(wanted: str, to: Path) -> None:
    """Put a model of the user's store into another one. Its blobs are links there: whatever a
    node does to them, the user's own stay."""
    name = names.parse(wanted)
    if name is None:
        pytest.fail(f"no model's name: OLLAMA_TEST_MODEL={wanted}", pytrace=False)
    given = os.environ.get("OLLAMA_MODELS")
    manifest = Path("manifests", *name)
    for store in (Path(given),) if given else _STORES:
        if (store / manifest).is_file():
            break
    else:
        pytest.fail(f"not in the store of this machine: {wanted}", pytrace=False)
    (to / manifest).parent.mkdir(parents=True)
    (to / "blobs").mkdir()
    shutil.copyfile(store / manifest, to / manifest)
    parts = json.loads((to / manifest).read_text())
    for digest in {one["digest"].replace(":", "-") for one in (parts["config"], *parts["layers"])}:
        (to / "blobs" / digest).symlink_to((store / "blobs" / digest).resolve())


@contextlib.contextmanager
def router(pool: Nodes, path: Path) -> Iterator[str]:
    """Run `ollamux serve` over the nodes n1, n2, …; gives its address for clients.

    At its end it must stop in order, and have said nothing but JSON.
    """
    entries = [{"name": f"n{at}", "url": url, "slots": 1} for at, url in enumerate(pool.urls, 1)]
    probe = {"interval_s": 0.5, "ps_interval_s": 0.2, "tags_interval_s": 0.2}
    settings = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "nodes": entries, "probe": probe}
    path.write_text(json.dumps(settings))
    process = subprocess.Popen(
        [sys.executable, "-m", "router", "serve", "--config", str(path)],
        env=environment({}), cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    lines: queue.Queue[bytes] = queue.Queue()
    reader = threading.Thread(target=_drain, args=(process, lines), daemon=True)
    reader.start()
    try:
        url: str = _logged(lines, "listening")["clients"][0]
        _logged(lines, "ready")
        yield url
    finally:
        code = _stop(process)
        reader.join()
    said = [json.loads(line) for line in lines.queue]
    raised = [line["exception"] for line in said if "exception" in line]
    assert not raised, raised[0]
    assert code == 0


def _drain(process: "subprocess.Popen[bytes]", lines: "queue.Queue[bytes]") -> None:
    assert process.stderr is not None
    with process.stderr as pipe:
        for line in pipe:
            lines.put(line)


def _logged(lines: "queue.Queue[bytes]", event: str) -> dict[str, Any]:
    """The next line about `event`."""
    while True:
        line: dict[str, Any] = json.loads(lines.get(timeout=_START_S))
        if line["event"] == event:
            return line
