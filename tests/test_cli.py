"""Every command: what it prints and its exit code."""

import asyncio
import json
from pathlib import Path

import pytest

from router import __version__, cli
from tests.process import ROOT, ran, settings, write
from tests.rig import model, rig, scripted, spec

BROKEN = b"nodes:\n  - url: ftp://n1\n    slots: none\ncolour: blue\n"


async def nodes(url: str) -> int:
    """`ollamux nodes` beside a router in this loop."""
    return await asyncio.to_thread(cli.main, ["nodes", "--admin", url])


async def test_is_a_module_that_ends_with_the_exit_code_of_its_command(tmp_path: Path) -> None:
    write(tmp_path / "broken.yaml", BROKEN)
    version, broken, nothing = await asyncio.gather(
        ran("version"), ran("check", str(tmp_path / "broken.yaml")), ran()
    )
    assert version == (0, f"ollamux {__version__}", "")
    assert (broken[0], broken[1], len(broken[2].splitlines())) == (2, "", 3)
    assert (nothing[0], nothing[1]) == (2, "")
    assert nothing[2].startswith("usage: ollamux ")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    assert capsys.readouterr() == (f"ollamux {__version__}\n", "")


@pytest.mark.parametrize("name", ["router.yaml", "deploy/config/router.yaml"])
def test_check_says_that_a_file_is_valid(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(ROOT / name)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{ROOT / name}: valid, ")
    assert err == ""


def test_check_counts_nodes_and_pools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "router.yaml"
    pools = [{"name": "a", "nodes": ["a1", "a2"]}, {"name": "b", "nodes": ["b1"]}]
    write(path, {"pools": pools})
    assert cli.main(["check", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: valid, 3 node(s) in 2 pool(s)\n"


def test_check_says_every_mistake_of_a_bad_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "router.yaml"
    write(path, BROKEN)
    assert cli.main(["check", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.partition(" ")[0] for line in err.splitlines()] == [
        f"{path}:2:10:", f"{path}:3:12:", f"{path}:4:1:",
    ]  # fmt: skip


def test_check_fills_in_the_environment_and_never_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "router.yaml"
    admin = {"listen": "127.0.0.1:1", "token": "${ADMIN_TOKEN}"}
    write(path, {**settings(admin=admin), "nodes": ["n1"]})
    monkeypatch.delenv("ADMIN_TOKEN", raising=False)
    assert cli.main(["check", str(path)]) == 2
    assert "ADMIN_TOKEN" in capsys.readouterr().err
    for token, code in (("hush-hush", 0), ("hush hush", 2)):
        monkeypatch.setenv("ADMIN_TOKEN", token)
        assert cli.main(["check", str(path)]) == code
        assert "hush" not in "".join(capsys.readouterr())


def test_schema_is_the_shipped_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    out, _ = capsys.readouterr()
    assert out == (ROOT / "router" / "router.schema.json").read_text()
    assert json.loads(out)["title"] == "router.yaml"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["dance"],
        ["check"],
        ["check", "a", "b"],
        ["serve", "router.yaml"],
        ["serve", "--config"],
        ["demo", "--twice"],
        ["nodes", "--url", "x"],
        ["version", "--now"],
    ],
)
def test_bad_usage_is_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: ollamux ")


@pytest.mark.parametrize(
    "argv", [["--help"], ["serve", "--help"], ["nodes", "-h"], ["demo", "-h"], ["check", "-h"]]
)
def test_help_is_exit_0(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ollamux ")


async def test_nodes_prints_a_table_of_a_live_router(capsys: pytest.CaptureFixture[str]) -> None:
    warm = spec(model(), model("other:latest"), num_parallel=4, warm=("llama3:8b", "other"))
    async with rig(warm, spec(), entries=[{}, {"url": "http://127.0.0.1:1"}]) as r:
        for url in (r.admin, f"{r.admin}/", r.admin.removeprefix("http://")):
            assert await nodes(url) == 0
        out, err = capsys.readouterr()
        assert err == ""
        lines = out.splitlines()
        assert lines[:3] == lines[3:6] == lines[6:]
        head, up, down = (line.split("  ") for line in lines[:3])
        columns = ["NODE", "STATE", "IN FLIGHT", "SLOTS", "VERSION", "PRESENT", "RESIDENT", "URL"]
        assert [cell.strip() for cell in head if cell] == columns
        assert [cell.strip() for cell in up if cell] == [
            "n1", "up", "0", "4", "0.33.0", "2", "llama3:8b, other:latest", r.nodes[0].url,
        ]  # fmt: skip
        cells = [cell.strip() for cell in down if cell]
        assert cells[0] == "n2"
        assert cells[1].startswith("down (")
        assert cells[2:] == ["0", "1", "-", "0", "-", "http://127.0.0.1:1"]
        assert lines[0].index("URL") == lines[1].index("http") == lines[2].index("http")


async def test_nodes_ignores_proxies_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with rig() as r:
        assert await nodes(r.admin) == 0
        assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (b"404 Not Found", b"{}"),
        (b"200 OK", b"no JSON"),
        (b"200 OK", b"\xff\xfe\xfa"),
        (b"200 OK", b"[]"),
        (b"200 OK", b"{}"),
        (b"200 OK", b'{"nodes": [{}]}'),
        (b"200 OK", b'{"nodes": ["n1"]}'),
        (b"200 OK", b'{"nodes": null}'),
        (b"99999 ???", b""),
    ],
)
async def test_nodes_of_something_else_is_one_line_and_exit_1(
    status: bytes, body: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    async def nothing(peer: object) -> None: ...

    answer = b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)
    async with scripted(nothing, {b"/status": answer}) as url:
        assert await nodes(url) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"ollamux: no status from {url}: ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "ftp://127.0.0.1:1", "http://a b", "::"])
def test_nodes_where_nothing_listens_is_one_line_and_exit_1(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["nodes", "--admin", url]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ollamux: no status from ")
    assert len(err.splitlines()) == 1
