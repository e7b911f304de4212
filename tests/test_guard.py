"""Which Hosts a loopback listener answers, and that no other listener cares."""

import asyncio
import ipaddress
import socket

import pytest

from router.guard import Guard
from tests.rig import MODEL, Rig, rig, talk

CHAT = b'{"model":"%b","messages":[{"role":"user","content":"hi"}],"stream":false}' % MODEL.encode()
STRANGE = [
    "evil.org",
    "evil.org:11434",
    "x",
    "1.1.1.1",
    "[2606:4700::1111]:80",
    "localhost.evil.org",
]


@pytest.mark.parametrize(
    "host",
    [
        "", ":11434", "localhost", "LocalHost:11434", "localhost:", "127.0.0.1", "127.9.9.9:80",
        "[::1]", "[::1]:11434", "::1", "0.0.0.0:11434", "[::]", "10.1.2.3", "172.31.0.1:11434",
        "192.168.0.1", "[fd00::1]:80", "[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]:1", "gpu-box",
        "GPU-Box:11434", "ollama.localhost", "nas.local:11434", "host.docker.internal", "a.b.LOCAL",
    ],
)  # fmt: skip
def test_knows_what_no_stranger_can_have(host: str) -> None:
    assert Guard("GPU-Box").knows(host)


@pytest.mark.parametrize(
    "host",
    [
        *STRANGE, "local", "internal", ".", "localhost.", "evillocal", "gpu-box.evil.org",
        "172.32.0.1", "169.254.9.9", "100.64.0.1", "8.8.8.8:53", "127.0.0.1.evil.org", "127.1",
        "0x7f.1", "2130706433", "[::ffff:8.8.8.8]", "[evil.org]", "[::1].evil.org", "[::1]evil:80",
        "localhost:80:80", "a@localhost", "evil.org/localhost", "\udcff",
        "\u0661.0.0.1", "10.1", "[fe80::1%eth9]",
        "[2001:db8::1%\udcff]",
    ],
)  # fmt: skip
def test_knows_no_stranger(host: str) -> None:
    assert not Guard("GPU-Box").knows(host)


def test_knows_the_machines_own_addresses() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing, and chooses the way out
        except OSError:
            pytest.skip("this machine has no way out")
        own = probe.getsockname()[0]
    assert Guard("x").knows(own)


def test_watches_loopback_addresses_only() -> None:
    guard = Guard("x")
    guard.watch([("127.0.0.1", 1), ("0.0.0.0", 2), ("192.168.0.1", 3), ("::1", 4), ("::", 5)])
    assert guard.loopback == {("127.0.0.1", 1), ("::1", 4)}


async def statuses(url: str, *lines: str) -> list[int]:
    """What each request gets, all on one connection; a line is a target and its Host."""
    found = []
    async with talk(url) as client:
        for line in lines:
            target, _, host = line.partition(" ")
            await client.send(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            found.append((await client.answer()).status)
    return found


@pytest.mark.parametrize("host", STRANGE)
async def test_a_strange_host_is_refused_with_an_empty_403_in_its_log_line(host: str) -> None:
    async with rig() as r, talk(r.url) as client:
        head = f"POST /api/chat HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(CHAT)}\r\n\r\n"
        await client.send(head.encode() + CHAT)
        answer = await client.answer()
        assert (answer.status, answer.body) == (403, b"")
        assert not r.nodes[0].calls("/api/chat")
        assert [line["status"] for line in r.requests] == [403]


async def test_a_page_whose_own_name_stands_for_loopback_is_refused() -> None:
    async with rig() as r:
        headers = {"Host": "evil.org:80", "Origin": "http://evil.org:80"}
        async with r.session.get(f"{r.url}/api/tags", headers=headers) as answer:
            assert (answer.status, await answer.read()) == (403, b"")


async def test_each_host_on_a_connection_is_looked_at() -> None:
    hosts = ("localhost", "evil.org", "localhost", "LOCALHOST", "evil.org", "evil.org", "nas.local")
    async with rig() as r:
        lines = [f"/api/version {host}" for host in hosts]
        assert await statuses(r.url, *lines) == [200, 403, 200, 200, 403, 403, 200]


async def test_the_host_of_a_whole_url_goes_before_the_header() -> None:
    async with rig() as r:
        assert await statuses(
            r.url,
            "http://localhost:1/api/version evil.org",
            "http://evil.org/api/version localhost",
            "http://[::1]/api/version evil.org",
        ) == [200, 403, 200]


async def test_an_http_1_0_request_without_a_host_is_answered() -> None:
    async with rig() as r, talk(r.url) as client:
        await client.send(b"GET /api/version HTTP/1.0\r\n\r\n")
        assert (await client.answer()).status == 200


@pytest.mark.parametrize("path", ["/healthz", "/metrics", "/status", "/reload"])
async def test_the_admin_listener_is_guarded_too(path: str) -> None:
    async with rig() as r:
        assert await statuses(r.admin, f"{path} evil.org") == [403]
        assert await statuses(r.admin, f"/healthz {ipaddress.ip_address('127.0.0.1')}") == [200]


async def test_a_listener_on_all_addresses_answers_to_every_name() -> None:
    """Also where a client comes to it over loopback: a proxy on the same machine."""
    async with rig(listen="0.0.0.0:0", admin="0.0.0.0:0") as r:
        for url in (r.url, r.admin):
            local = url.replace("0.0.0.0", "127.0.0.1")
            path = "/api/version" if url == r.url else "/healthz"
            assert await statuses(local, f"{path} evil.org", f"{path} localhost") == [200, 200]


async def test_one_listener_is_guarded_beside_one_that_is_not() -> None:
    async with rig(listen=["127.0.0.1:0", "0.0.0.0:0"]) as r:
        ports = [url.rpartition(":")[2] for url in r.app.clients]
        found = [
            await statuses(f"http://127.0.0.1:{port}", "/api/version evil.org") for port in ports
        ]
        assert found == [[403], [200]]


async def test_pipelined_hosts_are_each_looked_at() -> None:
    async with rig() as r, talk(r.url) as client:
        head = b"GET /api/version HTTP/1.1\r\nHost: %b\r\n\r\n"
        await client.send(head % b"localhost" + head % b"evil.org" + head % b"localhost")
        assert [(await client.answer()).status for _ in range(3)] == [200, 403, 200]


async def test_connections_do_not_share_what_they_remember() -> None:
    async def ask(r: Rig, host: str) -> list[int]:
        return await statuses(r.url, *[f"/api/version {host}"] * 3)

    async with rig() as r:
        good, bad = await asyncio.gather(ask(r, "localhost"), ask(r, "evil.org"))
        assert (good, bad) == ([200] * 3, [403] * 3)
