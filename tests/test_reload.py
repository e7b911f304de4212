"""A configuration that changes while the router runs: what asks for it, and what stays."""

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from router import log
from router.daemon import Daemon
from router.sim import Fault, FaultKind, SimNode
from tests.process import Output, Router, entry, overwrite, remove, serving, settings, write
from tests.rig import MODEL, parsed, spec

BROKEN = b"nodes:\n  - url: ftp://n1\n    slots: none\ncolour: blue\n"
RESULT = "ollamux_config_reloads_total"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "router.yaml"


def names(shown: dict[str, Any]) -> list[str]:
    return [node["name"] for node in shown["nodes"]]


async def taken(router: Router, *changes: str) -> None:
    """Wait until a reload says exactly this difference."""
    await router.process.logged("reload ok", changes=list(changes))


class _Console(io.StringIO):
    """Somewhere to log to, and to wait for lines."""

    def __init__(self) -> None:
        super().__init__()
        self.output = Output()

    def write(self, text: str) -> int:
        self.output.feed(text.encode())
        return len(text)


@contextlib.asynccontextmanager
async def running(
    daemon: Daemon,
) -> AsyncIterator[tuple[Output, Callable[[], Awaitable[dict[str, Any]]]]]:
    """Run it in this loop; gives its log, and what asks for its status."""
    console = _Console()
    log.setup("debug", "json", console)
    async with (
        asyncio.timeout(60),
        aiohttp.ClientSession() as session,
        asyncio.TaskGroup() as group,
    ):
        run = group.create_task(daemon.run())
        [admin] = (await console.output.logged("listening"))["admin"]

        async def status() -> dict[str, Any]:
            async with session.get(f"{admin}/status") as answer:
                shown: dict[str, Any] = await answer.json()
                return shown

        yield console.output, status
        os.kill(os.getpid(), signal.SIGTERM)
        assert await run == 0


# What asks for a reload


async def test_the_file_is_followed_through_every_kind_of_change(path: Path) -> None:
    async with SimNode(spec()) as one, SimNode(spec()) as two:
        write(path, settings(one))
        async with serving(path, watching=True) as router:
            write(path, settings(one, two))  # renamed into place
            await taken(router, f"node added: {two.url}")

            overwrite(path, settings(two))  # written in place
            await taken(router, *_moved(added=[], removed=[one], changed=[two]))

            remove(path)
            line = await router.process.logged("reload refused, nothing changed")
            assert line["mistakes"] == [f"{path}: cannot be read: No such file or directory"]

            write(path, settings(two, one))
            await router.process.logged("reload ok")

            overwrite(path, b"")
            await router.process.logged("reload refused, nothing changed")
            assert names(await router.status()) == ["n1", "n2"]
            assert (await router.status())["config"]["generation"] == 4


def _moved(*, added: list[SimNode], removed: list[SimNode], changed: list[SimNode]) -> list[str]:
    return [
        *(f"node added: {node.url}" for node in added),
        *(f"node removed: {node.url}" for node in removed),
        *(f"node changed: {node.url}" for node in changed),
    ]


async def test_the_swapped_link_of_a_config_map_is_seen(tmp_path: Path) -> None:
    """Kubernetes: router.yaml -> ..data/router.yaml, ..data -> a directory of this version."""
    mount = tmp_path / "mount"
    path = mount / "router.yaml"

    def publish(version: str, value: dict[str, Any]) -> None:
        (mount / version).mkdir(parents=True)
        (mount / version / "router.yaml").write_text(json.dumps(value))
        (mount / "..data_tmp").symlink_to(version)
        (mount / "..data_tmp").replace(mount / "..data")

    async with SimNode(spec()) as one, SimNode(spec()) as two:
        publish("..2026_1", settings(one))
        path.symlink_to("..data/router.yaml")
        async with serving(path, watching=True) as router:
            publish("..2026_2", settings(one, two))
            await taken(router, f"node added: {two.url}")
            publish("..2026_3", settings(one))
            await taken(router, f"node removed: {two.url}")


async def test_a_change_between_reading_and_watching_is_not_missed(path: Path) -> None:
    async with SimNode(spec()) as one, SimNode(spec()) as two:
        old, new = settings(one), settings(one, two)
        write(path, new)
        daemon = Daemon(path, {}, parsed(old), json.dumps(old).encode())
        async with running(daemon) as (said, _):
            line = await said.logged("reload ok")
            assert line["changes"] == [f"node added: {two.url}"]


async def test_hangups_and_posts_find_the_same_bytes_unchanged(path: Path) -> None:
    async with SimNode(spec()) as node:
        write(path, settings(node))
        async with serving(path, watching=True) as router:
            before = await router.status()
            router.process.signal(signal.SIGHUP)
            line = await router.process.logged("reload unchanged")
            assert line["changes"] == []
            write(path, settings(node))  # another file, the same bytes
            unchanged = {
                "result": "unchanged", "generation": 1, "changes": [], "restart_needed": [],
                "mistakes": [],
            }  # fmt: skip
            assert await router.reload() == (200, unchanged)
            assert (await router.metrics())[f'{RESULT}{{result="unchanged"}}'] == 2
            assert (await router.status())["config"]["generation"] == 1
            overwrite(path, b"# a comment\n" + json.dumps(settings(node)).encode())
            await router.process.logged("reload unchanged")
            await router.process.logged("reload unchanged")
            after = await router.status()
            assert after["nodes"][0]["present"] == before["nodes"][0]["present"]


async def test_reloads_at_the_same_time_end_with_what_the_file_says(path: Path) -> None:
    async with SimNode(spec()) as one, SimNode(spec()) as two:
        write(path, settings(one))
        async with serving(path, watching=True) as router:
            for nodes in ([one, two], [two], [one], [one, two]):
                write(path, settings(*nodes))
                for _ in range(3):
                    router.process.signal(signal.SIGHUP)
                answers = await asyncio.gather(*(router.reload() for _ in range(8)))
                assert {status for status, _ in answers} == {200}
                assert len(names(await router.status())) == len(nodes)
            shown = await router.status()
            assert [node["url"] for node in shown["nodes"]] == [one.url, two.url]
            assert shown["config"]["generation"] == 5


class _SlowFirst(dict[str, str]):
    """An environment in which the first reading is answered by what was, and late."""

    def __init__(self, first: str, then: str) -> None:
        super().__init__(OLLAMA_HOST=then)
        self._first: str | None = first
        self.asked = threading.Event()
        self.go_on = threading.Event()

    def get(self, key: str, default: Any = None) -> Any:
        if key == "OLLAMA_HOST" and threading.current_thread() is not threading.main_thread():
            old, self._first = self._first, None
            if old is not None:
                self.asked.set()
                self.go_on.wait()
                return old
        return super().get(key, default)


@pytest.mark.parametrize("late", ["127.0.0.1:2", "ftp://refused"])
async def test_a_reload_that_was_overtaken_changes_nothing(late: str) -> None:
    env = _SlowFirst(first=late, then="127.0.0.1:3")
    started = parsed({**settings(), "nodes": ["127.0.0.1:1"]})
    daemon = Daemon(None, env, started)
    async with running(daemon) as (said, status):
        try:
            slow = asyncio.create_task(daemon.reload())
            await asyncio.to_thread(env.asked.wait)
            assert (await daemon.reload()).result == "ok"
        finally:
            env.go_on.set()
        overtaken = await slow
        assert overtaken.result == "ok"
        assert overtaken.changes[0] == "node added: http://127.0.0.1:3"
        assert len([line for line in said.lines if "reload ok" in line]) == 1
        shown = await status()
        assert [node["url"] for node in shown["nodes"]] == ["http://127.0.0.1:3"]
        assert shown["config"]["last_reload"]["result"] == "ok"
        assert shown["config"]["source"] == "environment"


# What is refused


async def test_a_broken_file_changes_nothing_and_says_everything(path: Path) -> None:
    async with SimNode(spec()) as node:
        write(path, settings(node))
        async with serving(path, watching=True) as router:
            taken_at = (await router.status())["config"]["taken_at"]
            write(path, BROKEN)
            line = await router.process.logged("reload refused, nothing changed", level="error")
            mistakes = line["mistakes"]
            assert [text.split(" ")[0] for text in mistakes] == [
                f"{path}:2:10:", f"{path}:3:12:", f"{path}:4:1:",
            ]  # fmt: skip
            shown = await router.status()
            assert shown["config"]["generation"] == 1
            assert shown["config"]["taken_at"] == taken_at
            assert shown["config"]["last_reload"]["result"] == "refused"
            assert shown["config"]["last_reload"]["mistakes"] == mistakes
            assert names(shown) == ["n1"]
            samples = await router.metrics()
            assert samples[f'{RESULT}{{result="refused"}}'] == 1
            assert samples["ollamux_config_last_reload_successful"] == 0
            assert samples["ollamux_config_generation"] == 1
            stamp = samples["ollamux_config_last_success_timestamp_seconds"]
            assert round(stamp, 3) == taken_at
            status, answer = await router.reload()
            assert (status, answer["result"], answer["mistakes"]) == (422, "refused", mistakes)
            async with router.chat(stream=False) as chat:
                assert chat.status == 200

            write(path, settings(node))  # as it was
            await router.process.logged("reload unchanged")
            last = (await router.status())["config"]["last_reload"]
            assert (last["result"], last["mistakes"]) == ("unchanged", [])
            samples = await router.metrics()
            assert samples["ollamux_config_last_reload_successful"] == 1
            assert samples["ollamux_config_last_success_timestamp_seconds"] > stamp


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b"\xff\xfe\xfd"),
        lambda path: path.write_bytes(b"{" * 5000),
        lambda path: path.write_bytes(b"nodes: [*nobody]"),
        lambda path: path.symlink_to(path.name),
    ],
    ids=["directory", "not-text", "too-deep", "bad-alias", "link-to-itself"],
)
async def test_whatever_stands_there_the_router_goes_on(
    path: Path, damage: Callable[[Path], None]
) -> None:
    value = {**settings(), "nodes": ["127.0.0.1:1"]}
    write(path, value)
    daemon = Daemon(path, {}, parsed(value), json.dumps(value).encode())
    async with running(daemon) as (said, status):
        remove(path)
        damage(path)
        assert (await daemon.reload()).result == "refused"
        line = await said.logged("reload refused, nothing changed")
        assert line["mistakes"]
        assert (await status())["config"]["generation"] == 1


# What a reload does


def connections(node: SimNode) -> int:
    assert node._runner is not None
    assert node._runner.server is not None
    return len(node._runner.server.connections)


async def test_a_removed_node_gets_no_new_request_and_goes_with_its_last(path: Path) -> None:
    async with SimNode(spec(num_parallel=4)) as one, SimNode(spec(num_parallel=4)) as two:
        one.fault = two.fault = Fault(FaultKind.STALL, path="/api/chat", after=1)
        write(path, settings(one, two))
        async with (
            serving(path) as router,
            router.chat(model=f"{MODEL}@n1") as first,
            router.chat(model=f"{MODEL}@n1") as second,
        ):
            one.fault = two.fault = None
            write(path, {**settings(), "nodes": [entry(two, "n2")]})
            await taken(router, f"node removed: {one.url}")
            leaving = (await router.status())["nodes"][1]
            assert (leaving["name"], leaving["state"], leaving["in_flight"]) == ("n1", "leaving", 2)
            for _ in range(3):
                async with router.chat(stream=False) as answer:
                    assert answer.headers["X-Ollamux-Node"] == "n2"
            async with router.chat(model=f"{MODEL}@n1") as answer:
                assert answer.status == 400
            probes = len(one.calls("/api/version"))
            one.release()
            assert b'"done":true' in await first.read()
            assert b'"done":true' in await second.read()
            shown = await router.until(lambda shown: names(shown) == ["n2"])
            assert shown["in_flight"] == 0
            assert 'ollamux_node_up{node="n1"}' not in await router.metrics()
            assert len(one.calls("/api/version")) == probes
            await router.until(lambda _: not connections(one))


async def test_a_removed_node_that_comes_back_finds_its_requests(path: Path) -> None:
    async with SimNode(spec(num_parallel=4)) as one, SimNode(spec()) as two:
        one.fault = Fault(FaultKind.STALL, path="/api/chat", after=1)
        write(path, settings(one, two))
        async with serving(path) as router, router.chat(model=f"{MODEL}@n1") as answer:
            write(path, {**settings(), "nodes": [entry(two, "n2")]})
            await taken(router, f"node removed: {one.url}")
            write(path, settings(one, two))
            await router.process.logged("reload ok")
            shown = await router.status()
            assert [node["in_flight"] for node in shown["nodes"]] == [1, 0]
            one.release()
            await answer.read()
            await router.until(lambda shown: shown["in_flight"] == 0)


async def test_what_is_known_of_a_node_that_stays_is_kept(path: Path) -> None:
    async with SimNode(spec()) as one, SimNode(spec()) as two, SimNode(spec()) as three:
        await two.refuse()
        quiet = {"interval_s": 3600, "suspect_interval_s": 3600, "tags_interval_s": 3600}
        write(path, settings(one, two, probe=quiet))
        async with serving(path, watching=True) as router:
            before = await router.status()
            assert [node["state"] for node in before["nodes"]] == ["up", "down"]
            asked = len(one.seen)
            write(path, settings(three, two, one, probe=quiet))
            await router.process.logged("reload ok")
            for _ in range(2):  # the first was that of the start
                assert (await router.process.logged("node up", node="n1"))["was"] == "unknown"
            shown = {node["url"]: node for node in (await router.status())["nodes"]}
            for old in before["nodes"]:
                new = shown[old["url"]]
                assert new["for_s"] >= old["for_s"]
                for key in ("state", "detail", "version", "present", "resident"):
                    assert new[key] == old[key]
            # Renamed, it is looked at again, but it was never forgotten.
            await one.until(lambda: len(one.seen) == asked + 3)
            flips = [line["node"] for line in router.process.log if line["event"] == "node up"]
            assert flips == ["n1", "n1"]


def constant(stream: bytes) -> bytes:
    """A stream without what differs from one time to the next."""
    stream = re.sub(rb'"created_at":"[^"]*"', b"", stream)
    return re.sub(rb'"(total|load|prompt_eval|eval)_duration":\d+,?', b"", stream)


async def test_fifty_streams_run_through_reloads_with_every_byte_right(path: Path) -> None:
    wide = spec(num_parallel=25, warm=(MODEL,))
    async with SimNode(wide) as one, SimNode(wide) as two, SimNode(wide) as three:
        stall = Fault(FaultKind.STALL, path="/api/chat", after=3)
        write(path, settings(one, two))
        async with serving(path) as router, contextlib.AsyncExitStack() as stack:
            texts = [f"question {number}" for number in range(50)]
            expected = []
            for text in texts:
                body = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
                async with router.session.post(f"{three.url}/api/chat", json=body) as answer:
                    expected.append(await answer.read())
            one.fault = two.fault = stall
            answers = [await stack.enter_async_context(router.chat(text)) for text in texts]
            one.fault = two.fault = None
            assert [one.in_flight, two.in_flight] == [25, 25]

            write(path, settings(one, two, three))
            await taken(router, f"node added: {three.url}")
            write(path, {**settings(), "nodes": [entry(two, "n2"), entry(three, "n3")]})
            await taken(router, f"node removed: {one.url}")
            write(path, BROKEN)
            await router.process.logged("reload refused, nothing changed")
            renamed = [entry(two, "other", weight=3), entry(three, "n3")]
            write(path, {**settings(), "nodes": renamed, "log": {"level": "warning"}})
            await router.until(lambda shown: shown["config"]["generation"] == 4)

            one.release()
            two.release()
            got = await asyncio.gather(*(answer.read() for answer in answers))
            assert [constant(stream) for stream in got] == [constant(want) for want in expected]
            await router.until(lambda shown: names(shown) == ["other", "n3"])


async def test_what_takes_a_restart_is_said_until_it_happens(path: Path) -> None:
    async with SimNode(spec()) as node:
        write(path, settings(node))
        async with serving(path, watching=True) as router:
            moved = {"listen": "127.0.0.1:1", "admin": "127.0.0.1:2"}
            write(path, settings(node, **moved))
            await taken(router, "setting changed: listen", "setting changed: admin.listen")
            line = await router.process.logged("takes a restart", level="warning")
            assert line["settings"] == ["listen", "admin.listen"]
            async with router.chat(stream=False) as answer:
                assert answer.status == 200
            for _ in range(2):
                _, answered = await router.reload()
                assert answered["result"] == "unchanged"
                assert answered["restart_needed"] == ["listen", "admin.listen"]
            write(path, BROKEN)
            await router.process.logged("reload refused, nothing changed")
            last = (await router.status())["config"]["last_reload"]
            assert last["restart_needed"] == ["listen", "admin.listen"]
            write(path, settings(node))
            await router.process.logged("reload ok")
            assert (await router.reload())[1]["restart_needed"] == []


async def test_every_other_setting_is_in_force_at_once(path: Path) -> None:
    env = {"FIRST": "hush-first", "SECOND": "hush-second"}
    async with SimNode(spec()) as node:
        admin = {"listen": "127.0.0.1:0", "token": "${FIRST}"}
        write(path, settings(node, admin=admin))
        async with serving(path, env=env, secrets=["hush"]) as router:
            assert (await router.reload("hush-second"))[0] == 401
            tighter = settings(
                node,
                admin={**admin, "token": "${SECOND}"},
                aliases={"nick": MODEL},
                cors={"origins": ["http://here"]},
                limits={"max_body_bytes": 100, "max_header_bytes": 1000},
                log={"level": "debug", "requests": False},
            )
            write(path, tighter)
            assert (await router.reload("hush-first"))[0] == 200
            assert (await router.reload("hush-first"))[0] == 401
            assert (await router.reload("hush-second"))[0] == 200
            async with router.chat("x" * 100) as answer:
                assert answer.status == 413
            origin = {"Origin": "http://localhost"}
            async with router.session.get(f"{router.url}/api/tags", headers=origin) as answer:
                assert answer.status == 403
            async with router.chat("", model="nick", stream=False) as answer:
                assert answer.headers["X-Ollamux-Model"] == MODEL
            async with (
                aiohttp.ClientSession(headers={"X-Long": "x" * 2000}) as another,
                another.get(f"{router.url}/api/tags") as answer,
            ):
                assert answer.status == 431
            write(path, settings(node, admin=admin, log={"level": "error"}))
            await router.until(lambda shown: shown["config"]["generation"] == 3)
            async with router.chat(stream=False) as answer:
                assert answer.status == 200
        said = [line["event"] for line in router.process.log]
        assert "request" not in said
        assert said[-1].startswith("reload")
