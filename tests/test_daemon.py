"""The life of a real process: start, ready, drain, signals, exit codes, and the supervisor."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from router.sim import Fault, FaultKind, SimNode
from tests.process import Router, Supervisor, entry, ran, serving, settings, started, write
from tests.rig import Answer, Talk, spec, talk

STALL = Fault(FaultKind.STALL, path="/api/chat", after=2)
HOURS = {"drain_timeout_s": 7200}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "router.yaml"


@contextlib.asynccontextmanager
async def stalled(path: Path, **timeouts: float) -> AsyncIterator[tuple[Router, SimNode, Any]]:
    """A router, its one node, and a stream that the node holds after two records."""
    async with SimNode(spec(num_parallel=4)) as node:
        node.fault = STALL
        write(path, settings(node, timeouts=timeouts))
        async with serving(path) as router, router.chat() as answer:
            assert answer.status == 200
            node.fault = None
            yield router, node, answer


async def unreachable(url: str) -> None:
    """Wait until nobody takes a connection there."""
    while True:
        try:
            async with talk(url):
                pass
        except ConnectionRefusedError:
            return


async def ask(kept: Talk) -> Answer:
    """A request on a connection that stays open."""
    await kept.send(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return await kept.answer()


async def unready(router: Router) -> None:
    while await router.get("/readyz") != (503, "draining\n"):
        pass


def free_port() -> tuple[socket.socket, int]:
    sock = socket.create_server(("127.0.0.1", 0))
    return sock, sock.getsockname()[1]


# Start


async def test_serves_as_soon_as_it_is_ready(path: Path) -> None:
    async with SimNode(spec()) as node:
        write(path, settings(node))
        async with serving(path) as router:
            assert await router.get("/readyz") == (200, "ready\n")
            async with router.chat(stream=False) as answer:
                assert (await answer.json())["done"] is True


async def test_is_ready_after_the_first_look_even_if_every_node_is_down(path: Path) -> None:
    sock, port = free_port()
    sock.close()
    write(path, {**settings(), "nodes": [f"http://127.0.0.1:{port}"]})
    async with serving(path, ready=False) as router:
        line = await router.process.logged("ready")
        assert (line["nodes"], line["up"]) == (1, 0)
        assert await router.get("/readyz") == (503, "no node is up\n")
        assert await router.get("/healthz") == (200, "ok\n")
        async with router.chat() as answer:
            assert answer.status == 503


async def test_is_not_ready_before_every_node_was_looked_at(path: Path, tmp_path: Path) -> None:
    async with SimNode(spec()) as slow, SimNode(spec()) as node:
        slow.fault = Fault(FaultKind.HANG, path="*")
        write(path, settings(node, slow, probe={"timeout_s": 3600}))
        with Supervisor(str(tmp_path / "notify")) as systemd:
            async with serving(path, env=systemd.env, ready=False) as router:
                await slow.until(lambda: len(slow.seen) == 3)
                await router.until(lambda shown: shown["nodes"][0]["state"] == "up")
                # A reload in between does not make it ready either.
                assert (await router.reload())[1]["result"] == "unchanged"
                assert not [said for said in systemd.so_far() if "READY" in said]
                slow.fault = None
                slow.release()
                await router.process.logged("ready", nodes=2, up=2)
                assert await systemd.heard("READY") == {"READY": "1", "STATUS": "2 of 2 nodes up"}


async def test_without_any_reachable_node_the_first_one_that_comes_makes_it_ready(
    path: Path,
) -> None:
    async with SimNode(spec()) as node:
        await node.refuse()
        write(path, settings(node, probe={"suspect_interval_s": 0.05, "up_after": 1}))
        async with serving(path) as router:
            assert (await router.get("/readyz"))[0] == 503
            await node.accept()
            await router.process.logged("node up", node="n1")
            assert (await router.get("/readyz"))[0] == 200


async def test_serves_on_the_loop_of_the_library_where_there_is_no_uvloop(
    path: Path, tmp_path: Path
) -> None:
    write(tmp_path / "uvloop.py", b"raise ImportError")
    async with SimNode(spec()) as node:
        write(path, settings(node))
        async with serving(path, env={"PYTHONPATH": str(tmp_path)}) as router:
            async with router.chat() as answer:
                assert b'"done":true' in await answer.read()
            router.process.signal(signal.SIGTERM)
            assert await router.process.ended() == 0


async def test_an_address_that_cannot_be_had_is_one_clear_line_and_exit_1(
    path: Path, tmp_path: Path
) -> None:
    sock, port = free_port()
    taken = f"127.0.0.1:{port}"
    cases = [("listen", taken), ("admin", taken), ("listen", "192.0.2.1:0")]  # TEST-NET-1
    for number, (key, address) in enumerate(cases):
        value = {**settings(), "nodes": ["127.0.0.1:1"], key: address}
        write(tmp_path / f"{number}.yaml", value)
    with sock:
        ends = await asyncio.gather(
            *(ran("serve", "--config", str(tmp_path / f"{n}.yaml")) for n in range(3))
        )
    in_use = f"ollamux: cannot listen on {taken}: address already in use"
    foreign = "ollamux: cannot listen on 192.0.2.1:0: cannot assign requested address"
    assert ends == [(1, "", in_use), (1, "", in_use), (1, "", foreign)]


async def test_what_is_refused_is_all_its_mistakes_and_exit_2(path: Path) -> None:
    write(path, b"nodes:\n  - url: ftp://n1\n    slots: none\ncolour: blue\n")
    missing = path.with_name("missing.yaml")
    broken, gone, environment = await asyncio.gather(
        ran("serve", "--config", str(path)),
        ran("serve", "--config", str(missing)),
        ran("serve", env={"OLLAMA_HOST": "ftp://n1"}),
    )
    code, out, err = broken
    assert (code, out) == (2, "")
    assert [line.split(" ")[0] for line in err.splitlines()] == [
        f"{path}:2:10:", f"{path}:3:12:", f"{path}:4:1:",
    ]  # fmt: skip
    assert gone == (2, "", f"{missing}: cannot be read: No such file or directory")
    code, out, err = environment
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("OLLAMA_HOST: ")


# Stop


async def test_may_be_stopped_before_it_is_ready(path: Path) -> None:
    async with SimNode(spec()) as node:
        node.fault = Fault(FaultKind.HANG, path="*")
        write(path, settings(node, probe={"timeout_s": 3600}, timeouts=HOURS))
        async with serving(path, ready=False) as router:
            await node.until(lambda: len(node.seen) == 3)
            router.process.signal(signal.SIGTERM)
            assert await router.process.ended() == 0


async def test_an_idle_router_stops_on_the_first_signal(path: Path) -> None:
    async with SimNode(spec()) as node:
        write(path, settings(node, timeouts=HOURS))
        async with serving(path) as router, talk(router.url) as kept:
            await ask(kept)
            router.process.signal(signal.SIGTERM)
            assert await router.process.ended() == 0
            assert await kept.rest() == b""
            assert [line["event"] for line in router.process.log][-2:] == ["stopping", "stopped"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_drain_lets_streams_finish_and_takes_nothing_new(
    path: Path, number: signal.Signals
) -> None:
    async with stalled(path, **HOURS) as (router, node, answer), talk(router.url) as kept:
        assert (await ask(kept)).header("Connection") is None
        router.process.signal(number)
        line = await router.process.logged("stopping")
        assert (line["in_flight"], line["limit_s"]) == (1, 7200)
        await unready(router)
        await unreachable(router.url)
        assert (await router.status())["draining"] is True

        late = await ask(kept)
        assert (late.status, late.header("Connection")) == (200, "close")
        assert b"version" in late.body
        assert await kept.rest() == b""

        node.release()
        records = (await answer.read()).splitlines()
        assert b'"done":true' in records[-1]
        assert await router.process.ended() == 0
        assert not [e for e in router.process.log if e["event"] == "requests cut off"]
        [seen] = node.calls("/api/chat")
        assert (seen.outcome, seen.records) == ("done", len(records))


async def test_a_request_that_arrives_while_draining_is_relayed(path: Path) -> None:
    async with stalled(path, **HOURS) as (router, node, answer):
        async with talk(router.url) as kept:
            await ask(kept)
            router.process.signal(signal.SIGTERM)
            await unready(router)
            await kept.post("/api/chat", b'{"model":"llama3:8b","messages":[]}')
            late = await kept.answer()
            assert (late.status, late.header("Connection"), late.whole) == (200, "close", True)
            assert b'"done":true' in late.body
            assert await kept.rest() == b""
        node.release()
        await answer.read()
        assert await router.process.ended() == 0


async def test_past_the_drain_limit_what_is_left_is_cut(path: Path) -> None:
    async with stalled(path, drain_timeout_s=0.05) as (router, node, answer):
        router.process.signal(signal.SIGTERM)
        await router.process.logged("requests cut off", in_flight=1)
        with contextlib.suppress(aiohttp.ClientPayloadError):
            assert b'"done":true' not in await answer.read()
        assert await router.process.ended() == 0
        await router.process.logged("request", outcome="cancelled")
        await node.until(lambda: node.in_flight == 0)
        assert node.calls("/api/chat")[0].outcome == "cancelled"


async def test_a_second_signal_stops_at_once(path: Path) -> None:
    async with stalled(path, **HOURS) as (router, _, _):
        router.process.signal(signal.SIGTERM)
        await router.process.logged("stopping")
        router.process.signal(signal.SIGTERM)
        await router.process.logged("requests cut off", in_flight=1)
        assert await router.process.ended() == 0


async def test_two_signals_in_the_same_moment_stop_at_once(path: Path) -> None:
    async with stalled(path, **HOURS) as (router, _, _):
        # What comes while the process stands still is delivered in one go.
        router.process.signal(signal.SIGSTOP)
        router.process.signal(signal.SIGINT)
        router.process.signal(signal.SIGTERM)
        router.process.signal(signal.SIGCONT)
        assert await router.process.ended() == 0


async def test_further_signals_while_it_stops_are_no_error(path: Path) -> None:
    async with SimNode(spec()) as node:
        node.fault = STALL
        write(path, settings(node, timeouts=HOURS))
        # At its very end a process has no handlers any more, and dies of the signal.
        async with serving(path, codes=(0, -signal.SIGTERM)) as router, router.chat():
            router.process.signal(signal.SIGTERM)
            await router.process.logged("stopping")
            router.process.signal(signal.SIGTERM)
            await router.process.logged("requests cut off")
            router.process.signal(signal.SIGTERM)
            await router.process.ended()


async def test_a_hangup_while_draining_cuts_nothing(path: Path) -> None:
    async with stalled(path, **HOURS) as (router, node, answer):
        router.process.signal(signal.SIGTERM)
        await unready(router)
        router.process.signal(signal.SIGHUP)
        assert (await router.status())["draining"] is True
        node.release()
        assert b'"done":true' in await answer.read()
        assert await router.process.ended() == 0


async def test_a_client_that_is_slow_to_read_gets_the_whole_answer_while_draining(
    path: Path,
) -> None:
    size = 4 << 20
    body = b'{"embedding":[' + b" " * size + b"1]}"
    async with SimNode(spec()) as node:
        node.fault = Fault(FaultKind.STATUS, status=200, body=body.decode())
        write(path, settings(node, timeouts=HOURS))
        async with serving(path) as router:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            host, _, port = router.url.removeprefix("http://").partition(":")
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, (host, int(port)))
            asked = b'{"model":"llama3:8b","prompt":"x"}'
            head = f"POST /api/embeddings HTTP/1.1\r\nHost: ::1\r\nContent-Length: {len(asked)}\r\n"
            await loop.sock_sendall(sock, f"{head}\r\n".encode() + asked)
            with contextlib.closing(sock):
                await node.until(lambda: bool(node.calls("/api/embeddings")))
                await router.until(lambda shown: shown["in_flight"] == 0)
                router.process.signal(signal.SIGTERM)
                await router.process.logged("stopping")
                received = 0
                while data := await loop.sock_recv(sock, 1 << 20):
                    received += len(data)
            assert received > size
            assert await router.process.ended() == 0


async def test_a_task_that_fails_ends_the_process_loudly(path: Path, tmp_path: Path) -> None:
    # The watcher meets an error that it knows nothing of.
    broken = b"import sys\nimport watchfiles\nasync def awatch(*_, **__):\n"
    broken += b"    secret = 'hush'\n    raise LookupError('out of nowhere')\n    yield\n"
    write(tmp_path / "sitecustomize.py", broken + b"watchfiles.awatch = awatch\n")
    async with SimNode(spec()) as node:
        node.fault = STALL
        write(path, settings(node, timeouts=HOURS))
        env = {"PYTHONPATH": str(tmp_path)}
        async with asyncio.timeout(60), started("serve", "--config", str(path), env=env) as process:
            assert await process.ended() == 1
    [line] = [line for line in process.log if line["level"] == "error"]
    assert line["event"] == "a task failed, ending"
    assert line["exception"][0]["exc_type"] == "LookupError"
    assert line["exception"][0]["exc_value"] == "out of nowhere"
    assert process.log[-1] == line
    assert "hush" not in process.text
    assert not process.out.lines


# What the supervisor is told


async def test_the_supervisor_hears_of_every_turn(path: Path) -> None:
    name = f"@ollamux-test-{os.getpid()}"
    async with SimNode(spec()) as node:
        write(path, settings(node))
        with Supervisor(name) as systemd:
            async with serving(path, env=systemd.env) as router:
                assert await systemd.heard("READY") == {"READY": "1", "STATUS": "1 of 1 nodes up"}
                router.process.signal(signal.SIGHUP)
                said = await systemd.heard("RELOADING")
                assert said["RELOADING"] == "1"
                assert int(said["MONOTONIC_USEC"]) > 0
                assert (await systemd.heard("READY"))["STATUS"] == "1 of 1 nodes up"
                write(path, {"nodes": []})
                router.process.signal(signal.SIGHUP)
                refused = "1 of 1 nodes up, configuration refused"
                while (await systemd.heard("READY"))["STATUS"] != refused:
                    pass
                await node.refuse()
                while "READY" in (said := await systemd.heard("STATUS")):
                    pass  # the watched file was read once more
                assert said == {"STATUS": "0 of 1 nodes up, configuration refused"}
                router.process.signal(signal.SIGTERM)
                assert (await systemd.heard("STOPPING"))["STOPPING"] == "1"
                assert await router.process.ended() == 0
                assert list(systemd.so_far()[-1]) == ["STOPPING", "STATUS"]


async def test_the_watchdog_is_fed_until_the_end_of_a_drain(path: Path, tmp_path: Path) -> None:
    async with SimNode(spec()) as node:
        node.fault = STALL
        write(path, settings(node, timeouts=HOURS))
        with Supervisor(str(tmp_path / "notify")) as systemd:
            env = {**systemd.env, "WATCHDOG_USEC": "100000"}
            async with serving(path, env=env) as router, router.chat():
                for _ in range(3):
                    assert await systemd.heard("WATCHDOG") == {"WATCHDOG": "1"}
                router.process.signal(signal.SIGTERM)
                await systemd.heard("STOPPING")
                for _ in range(3):
                    await systemd.heard("WATCHDOG")


async def test_a_loop_that_hangs_does_not_feed_the_watchdog(path: Path, tmp_path: Path) -> None:
    # The loop's thread sleeps in a handler of its own; every other thread goes on.
    hang = b"import signal, time\nsignal.signal(signal.SIGUSR1, lambda *_: time.sleep(3600))\n"
    write(tmp_path / "sitecustomize.py", hang)
    async with SimNode(spec()) as node:
        write(path, settings(node))
        with Supervisor(str(tmp_path / "notify")) as systemd:
            env = {**systemd.env, "WATCHDOG_USEC": "200000", "PYTHONPATH": str(tmp_path)}
            async with serving(path, env=env, codes=(-signal.SIGABRT,)) as router:
                await systemd.heard("WATCHDOG")
                router.process.signal(signal.SIGUSR1)
                with contextlib.suppress(TimeoutError):
                    while True:
                        async with asyncio.timeout(1):  # five times the limit
                            await systemd.heard("WATCHDOG")
                router.process.signal(signal.SIGABRT)  # as systemd does then
                await router.process.ended()


async def test_a_reload_while_draining_does_not_tell_the_supervisor_that_all_is_well(
    path: Path, tmp_path: Path
) -> None:
    async with SimNode(spec()) as node:
        node.fault = STALL
        write(path, settings(node, timeouts=HOURS))
        with Supervisor(str(tmp_path / "notify")) as systemd:
            async with serving(path, env=systemd.env) as router, router.chat():
                router.process.signal(signal.SIGTERM)
                await systemd.heard("STOPPING")
                assert (await router.reload())[1]["result"] == "unchanged"
                assert list(systemd.so_far()[-1]) == ["STOPPING", "STATUS"]


async def test_a_supervisor_that_is_gone_is_no_error(path: Path, tmp_path: Path) -> None:
    async with SimNode(spec()) as node:
        write(path, settings(node))
        env = {"NOTIFY_SOCKET": str(tmp_path / "nobody"), "WATCHDOG_USEC": "50000"}
        async with serving(path, env=env) as router:
            assert await router.get("/readyz") == (200, "ready\n")


# What it says


async def test_no_secret_and_no_prompt_is_ever_said(path: Path) -> None:
    env = {"ADMIN_TOKEN": "hush-admin", "NODE_TOKEN": "hush-node"}
    secrets = ["hush", "prompt-words"]
    headers = {"Authorization": "Bearer ${NODE_TOKEN}"}
    admin = {"listen": "127.0.0.1:0", "token": "${ADMIN_TOKEN}"}
    async with SimNode(spec()) as node:
        made = settings(node, admin=admin, log={"level": "debug"})
        made["nodes"] = [entry(node, "n1", headers=headers)]
        write(path, made)
        async with serving(path, env=env, secrets=secrets) as router:
            async with router.chat("prompt-words", stream=False) as answer:
                await answer.read()
            assert node.calls("/api/chat")[0].header("Authorization") == "Bearer hush-node"
            made["nodes"] = [entry(node, "n1", headers={"X-Other": "hush-too"}, slots="many")]
            write(path, made)
            status, refused = await router.reload("hush-admin")
            assert status == 422
            made["nodes"] = [entry(node, "n1", headers={"X-Other": "hush-too\n"})]
            write(path, made)
            status, again = await router.reload("hush-admin")
            assert status == 422
            made["nodes"] = [entry(node, "n1", headers={"X-Other": "hush-too"})]
            write(path, made)
            status, taken = await router.reload("hush-admin")
            assert status == 200
            shown = [refused, again, taken, await router.status()]
            assert "hush" not in f"{shown}{(await router.get('/metrics'))[1]}"
