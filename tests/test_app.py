"""The whole router in one loop: where it listens, and what it says of its nodes."""

import socket

import pytest

from router.app import App
from tests.process import settings
from tests.rig import parsed, rig, spec


def app(**sections: object) -> App:
    async def reload() -> None: ...

    return App(parsed({**settings(), "nodes": ["127.0.0.1:1"], **sections}), reload)  # type: ignore[arg-type]


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


async def test_listens_on_every_address() -> None:
    listen = ["127.0.0.1:0", "127.0.0.1:0"] + (["[::1]:0"] if has_ipv6() else [])
    async with rig(listen=listen) as r:
        assert len(set(r.app.clients)) == len(listen)
        for url in r.app.clients:
            async with r.session.get(f"{url}/api/version") as answer:
                assert answer.status == 200
        await r.app.drain()


async def test_an_address_that_cannot_be_had_gives_back_the_others() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = socket.create_server(("127.0.0.1", 0))
        first, second = free.getsockname()[1], taken.getsockname()[1]
        free.close()
        router = app(listen=[f"127.0.0.1:{first}", f"127.0.0.1:{second}"])
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{second}: address already"):
            async with router:
                pass
        socket.create_server(("127.0.0.1", first)).close()


@pytest.mark.parametrize(
    ("listen", "open_to_all"),
    [
        ("127.0.0.1:0", False),
        ("127.1.2.3:0", False),
        ("[::1]:0", False),
        ("localhost:0", False),
        ("0.0.0.0:0", True),
        ("[::]:0", True),
        ("10.0.0.1:0", True),
        ("router.example:0", True),
    ],
)
async def test_only_loopback_is_trusted_without_a_token(listen: str, open_to_all: bool) -> None:
    assert app(admin=listen)._admin.loopback is not open_to_all


async def test_flips_are_said_once_each_and_the_last_one_down_is_an_error() -> None:
    async with rig(spec(), spec()) as r:
        for node in r.nodes:
            await node.refuse()
        for _ in range(2):
            await r.look()
        said = [(line["level"], line["event"], line.get("node")) for line in r.lines]
        assert said == [
            ("info", "node up", "n1"),
            ("info", "node up", "n2"),
            ("warning", "node down", "n1"),
            ("warning", "node down", "n2"),
            ("error", "no node is up", None),
        ]


async def test_no_node_is_said_to_be_missing_before_each_was_looked_at() -> None:
    async with rig(spec(), spec(), looked=False) as r:
        await r.nodes[0].refuse()
        await r.look()
        assert [line["event"] for line in r.lines] == ["node down", "node up"]


async def test_whoever_asked_is_told_of_every_flip() -> None:
    told: list[bool] = []
    async with rig(spec()) as r:
        r.app._changed = lambda: told.append(r.app.pool.registry.any_up)
        await r.nodes[0].refuse()
        await r.look()
        await r.look()
        await r.nodes[0].accept()
        await r.look()
        await r.look()
    assert told == [False, True]
