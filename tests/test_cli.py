"""Every command: what it prints and its exit code."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from router import __version__, cli
from router.sim import Fault, FaultKind
from tests.process import ROOT, ran, settings, write
from tests.rig import MODEL, Peer, model, rig, scripted, spec

BROKEN = b"nodes:\n  - url: ftp://n1\n    slots: none\ncolour: blue\n"


async def command(*argv: str) -> int:
    """A command beside a router in this loop."""
    return await asyncio.to_thread(cli.main, argv)


async def nodes(url: str) -> int:
    return await command("nodes", "--admin", url)


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
        ["explain"],
        ["explain", "m", "--prompt-tokens", "many"],
        ["drain"],
        ["undrain", "n1", "n2"],
        ["undrain", "n1", "--wait"],
        ["drain", "n1", "--timeout", "soon"],
        ["drain", "n1", "--timeout", "-1"],
        ["drain", "n1", "--timeout", "nan"],
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
    "argv",
    [
        ["--help"],
        ["serve", "--help"],
        ["nodes", "-h"],
        ["demo", "-h"],
        ["drain", "-h"],
        ["explain", "-h"],
    ],
)
def test_help_is_exit_0(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ollamux ")


def cells(line: str) -> list[str]:
    """What stands in a row of the table."""
    return [cell.strip() for cell in line.split("  ") if cell]


async def test_nodes_prints_a_table_of_a_live_router(capsys: pytest.CaptureFixture[str]) -> None:
    warm = spec(model(), model("other:latest"), num_parallel=4, warm=("llama3:8b", "other"))
    async with rig(warm, spec(), entries=[{}, {"url": "http://127.0.0.1:1"}]) as r:
        for url in (r.admin, f"{r.admin}/", r.admin.removeprefix("http://")):
            assert await nodes(url) == 0
        out, err = capsys.readouterr()
        assert err == ""
        lines = out.splitlines()
        assert lines[:5] == lines[5:10] == lines[10:]
        columns = ["NODE", "STATE", "IN FLIGHT", "SLOTS", "VERSION", "PRESENT", "URL", "RESIDENT"]
        assert [cells(line) for line in lines[:3]] == [
            columns,
            ["n1", "up", "0", "4", "0.33.0", "2", r.nodes[0].url, "llama3:8b, other:latest"],
            ["n2", "down", "0", "1", "-", "0", "http://127.0.0.1:1", "-"],
        ]
        assert lines[3] == ""
        assert lines[4].startswith("n2: down: ")
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


async def test_nodes_says_who_is_drained_ejected_and_busy_in_a_hundred_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    many = [model(f"some-model-{number}:70b") for number in range(6)]
    loaded = spec(model(), *many, warm=tuple(one.name for one in many))
    breaker = {"resets": 1, "answers": 1, "back_off_s": 3600, "back_off_max_s": 3600}
    async with rig(loaded, spec(), breaker={**breaker, "jitter": 0.0}) as r:
        await command("drain", "n2", "--admin", r.admin)
        for fault in (Fault(FaultKind.STATUS, status=500), Fault(FaultKind.DIE)):
            r.nodes[0].fault = fault
            async with r.chat() as answer:
                await answer.read()
        r.nodes[0].fault = Fault(FaultKind.STATUS, status=503)
        waiting = asyncio.create_task(r.chat(model="some-model-1:70b@n1").__aenter__())
        await r.until(lambda: len(r.app.pool.registry.snapshot()[0].ejected) == 3)
        await command("drain", "n1", "--admin", r.admin)
        capsys.readouterr()
        assert await nodes(r.admin) == 0
        waiting.cancel()
    head, first, second, empty, *notes = capsys.readouterr().out.splitlines()
    assert cells(first)[1] == "drained, ejected"
    assert re.fullmatch(r"some-model-[0-9a-z:.]* \+5", cells(first)[-1])
    assert cells(second)[1] == "drained"
    assert empty == ""
    assert max(map(len, (head, first, second, *notes))) <= 100
    node, failed, busy = (note for note in notes if not note.startswith(" "))
    assert node.startswith("n1: ejected: ")
    assert failed.startswith(f"n1: {MODEL} ejected: ")
    assert busy.startswith("n1: some-model-1:70b busy, asked again in ")
    for note in (node, failed):
        assert re.search(r"; on trial in 3[56]\d\d(\.\d)? s$", note)


NODE: dict[str, Any] = {
    "name": "n1", "state": "up", "draining": True, "ejected": [], "in_flight": 1, "slots": 1,
    "slots_learned": {}, "version": "", "present": [], "resident": [], "url": "http://n1:11434",
    "detail": "answers",
}  # fmt: skip


@asynccontextmanager
async def answering(
    get: Mapping[str, Any], post: bytes = b"", status: bytes = b"200 OK", head: bytes = b""
) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Something that answers as told; gives its url and the heads of the POSTs that it got."""
    heads: list[bytes] = []

    async def answer(peer: Peer) -> None:
        heads.append(peer.head)
        lines = b"HTTP/1.1 %b\r\nContent-Length: %d\r\n%b\r\n" % (status, len(post), head)
        await peer.say(lines, post)

    async with scripted(answer, {b"/status": get}) as url:
        yield url, heads


async def test_nodes_shows_trials_and_nothing_that_a_terminal_would_obey(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ejected = {"reason": "it said \x1b[2J", "busy": False, "trial": True, "next_trial_s": 0.0}
    due = {**ejected, "model": "m", "trial": False}
    node = {**NODE, "draining": False, "ejected": [{**ejected, "model": None}, due]}
    async with answering({"nodes": [node]}) as (url, _):
        assert await nodes(url) == 0
    _, row, _, *notes = capsys.readouterr().out.splitlines()
    assert cells(row)[1] == "on trial"
    assert notes == [
        "n1: on trial, was ejected: it said ?[2J",
        "n1: m ejected: it said ?[2J; on trial with the next request",
    ]


@pytest.mark.parametrize(
    ("state", "draining", "shown"),
    [
        ("up", False, "up"),
        ("up", True, "drained"),
        ("down", True, "down, drained"),
        ("leaving", False, "leaving"),
    ],
)
async def test_nodes_shows_a_state_in_as_many_words_as_it_takes(
    state: str, shown: str, capsys: pytest.CaptureFixture[str], *, draining: bool
) -> None:
    async with answering({"nodes": [{**NODE, "state": state, "draining": draining}]}) as (url, _):
        assert await nodes(url) == 0
    assert cells(capsys.readouterr().out.splitlines()[1])[1] == shown


@pytest.mark.parametrize(
    ("slots", "learned", "shown"),
    [
        (4, {}, "4"),
        (4, {"a": 2}, "4"),  # before the last reload
        ("auto", {}, "auto"),
        ("auto", {"a": 4}, "auto (4)"),
        ("auto", {"a": 4, "b": 1, "c": 2}, "auto (1-4)"),
    ],
)
async def test_nodes_shows_slots_and_what_was_learned_of_them(
    slots: object, learned: Mapping[str, int], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    node = {**NODE, "slots": slots, "slots_learned": learned}
    async with answering({"nodes": [node]}) as (url, _):
        assert await nodes(url) == 0
    assert cells(capsys.readouterr().out.splitlines()[1])[3] == shown


@pytest.mark.parametrize(
    ("resident", "shown"),
    [
        ([], "-"),
        (["a", "b"], "a, b"),
        (["a", "b" * 60], r"a \+1"),
        (["a" * 60], r"a{10,40}\.\."),
        (["a" * 60, "b"], r"a{10,40}\.\. \+1"),
    ],
)
async def test_nodes_shows_as_many_resident_models_as_fit(
    resident: list[str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with answering({"nodes": [{**NODE, "resident": resident}]}) as (url, _):
        assert await nodes(url) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert re.fullmatch(shown, cells(row)[-1])
    assert len(row) <= 100


async def test_drain_and_undrain_say_how_the_node_stands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with rig(spec(), spec()) as r:
        for verb, said in (("drain", "n1: drained, 0 in flight"), ("undrain", "n1: undrained, up")):
            for name in ("n1", "N1", r.nodes[0].url):
                assert await command(verb, name, "--admin", f"{r.admin}/") == 0
                assert capsys.readouterr() == (f"{said}\n", "")
            assert r.app.pool.registry.snapshot()[0].draining == (verb == "drain")


@pytest.mark.parametrize("verb", ["drain", "undrain"])
async def test_a_node_that_there_is_not_is_one_line_and_exit_1(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with rig() as r:
        assert await command(verb, "n 2/?&", "--admin", r.admin) == 1
        out, err = capsys.readouterr()
        assert out == ""
        known = f"no node is named 'n 2/?&'; the nodes are: n1 ({r.nodes[0].url})"
        assert err == f"ollamux: {verb} n 2/?&: {known}\n"


async def test_drain_waits_until_nothing_is_in_flight(capsys: pytest.CaptureFixture[str]) -> None:
    async with rig() as r:
        r.nodes[0].fault = Fault(FaultKind.STALL, after=1)
        async with r.chat() as running:
            await running.content.readline()
            args = ("drain", "n1", "--wait", "--admin", r.admin)
            waiting = asyncio.create_task(command(*args))
            await r.until(lambda: r.app.pool.registry.snapshot()[0].draining)
            assert not waiting.done()
            r.nodes[0].release()
            await running.read()
        assert await waiting == 0
        out = "n1: drained, 1 in flight\nn1: nothing in flight\n"
        assert capsys.readouterr() == (out, "")
        assert await command(*args) == 0
        assert capsys.readouterr().out == "n1: drained, 0 in flight\nn1: nothing in flight\n"


async def test_drain_waits_no_longer_than_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    async with rig() as r:
        r.nodes[0].fault = Fault(FaultKind.STALL, after=1)
        async with r.chat() as running:
            await running.content.readline()
            wait = ("--wait", "--timeout", "0")
            assert await command("drain", "n1", *wait, "--admin", r.admin) == 1
            assert capsys.readouterr().err == "ollamux: n1: 1 in flight after 0 s\n"
            assert r.app.pool.registry.snapshot()[0].draining


@pytest.mark.parametrize(
    ("later", "code", "said"),
    [
        ({"nodes": [{**NODE, "draining": False}]}, 1, "n1 has been undrained meanwhile"),
        ({"nodes": []}, 0, "n1: nothing in flight"),
        ({"nodes": [{**NODE, "in_flight": 0, "name": "renamed"}]}, 0, "n1: nothing in flight"),
        ({}, 1, "drain n1: 'nodes'"),
    ],
)
async def test_drain_notices_what_becomes_of_the_node(
    later: Any, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with answering(later, json.dumps(NODE).encode()) as (url, _):
        assert await command("drain", "n1", "--wait", "--admin", url) == code
    assert said in "".join(capsys.readouterr())


async def test_the_token_comes_from_the_environment_and_is_never_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    admin = {"listen": "127.0.0.1:0", "token": "hush-hush"}
    async with rig(admin=admin) as r:
        for token, code in (
            (None, 1), ("", 1), ("hush-wrong", 1), ("hush\nhush", 1), ("hush \u00fc", 1),
            ("hush-hush", 0),
        ):  # fmt: skip
            if token is None:
                monkeypatch.delenv("OLLAMUX_ADMIN_TOKEN", raising=False)
            else:
                monkeypatch.setenv("OLLAMUX_ADMIN_TOKEN", token)
            assert await command("drain", "n1", "--admin", r.admin) == code
            out, err = capsys.readouterr()
            assert "hush" not in out + err
            assert len((out + err).splitlines()) == 1
            assert ("OLLAMUX_ADMIN_TOKEN" in err) == (code == 1)


async def test_the_token_goes_nowhere_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMUX_ADMIN_TOKEN", "hush-hush")
    async with answering({}, b"{}") as (other, seen):
        away = b"Location: %b/drain\r\n" % other.encode()
        async with answering({}, status=b"302 Found", head=away) as (url, heads):
            assert await command("drain", "n1", "--admin", url) == 1
        assert not seen
    assert b"Authorization: Bearer hush-hush\r\n" in heads[0]
    assert capsys.readouterr().err == "ollamux: drain n1: Found\n"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "ftp://127.0.0.1:1", "http://a b", "::"])
@pytest.mark.parametrize("verb", ["drain", "undrain"])
def test_drain_where_nothing_listens_is_one_line_and_exit_1(
    verb: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([verb, "n1", "--admin", url]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"ollamux: {verb} n1: ")
    assert len(err.splitlines()) == 1


async def explain(url: str, *argv: str) -> int:
    return await command("explain", *argv, "--admin", url)


async def test_explain_prints_what_each_node_would_cost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    warm = spec(model(), warm=(MODEL,))
    routing = {"policy": "expected-delay"}
    async with rig(spec(), warm, spec(model("other")), routing=routing) as r:
        asked = ("--prompt-tokens", "2000", "--num-ctx", "4096", "--flow", "team")
        assert await explain(r.admin, MODEL, *asked) == 0
        out, err = capsys.readouterr()
        assert err == ""
        verdict, empty, head, first, second, third, between, note = out.splitlines()
        assert verdict == f"{MODEL} gets n2 now: warm (expected-delay)"
        assert (empty, between) == ("", "")
        assert cells(head) == ["NODE", "TOTAL", "WAIT", "LOAD", "ANSWER"]
        assert [cells(row)[0] for row in (first, second, third)] == ["n2", "n1", "n3"]
        assert cells(first)[2:4] == ["0.00", "0.00"]
        assert float(cells(second)[1]) > float(cells(first)[1])
        assert cells(third)[1:] == ["-"] * 4
        assert note == "n3: does not have the model"
        assert await explain(r.admin, f"{MODEL}@n1", "--num-ctx", "8192") == 0
        assert capsys.readouterr().out.startswith(f"{MODEL} gets n1 now: pinned (expected-delay)")


WEIGHED = {"name": "n1", "barred": None, "total_s": 2.0, "wait_s": 1.5, "load_s": 0.0}
EXPLAINED = {
    "model": "m", "policy": "expected-delay", "verdict": "waits", "node": "n1", "reason": "warm",
    "wait_s": 1.5, "nodes": [{**WEIGHED, "answer_s": 0.5}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("told", "verdict"),
    [
        ({}, "m waits for n1, about 1.50 s (expected-delay)"),
        ({"node": None, "wait_s": None, "nodes": []}, "m waits (expected-delay)"),
        (
            {"verdict": "refused", "node": None, "reason": "no-model", "nodes": []},
            "m is refused: no-model (expected-delay)",
        ),
    ],
)
async def test_explain_says_first_what_would_become_of_it(
    told: dict[str, Any], verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with answering({}, json.dumps({**EXPLAINED, **told}).encode()) as (url, _):
        assert await explain(url, "m") == 0
    assert capsys.readouterr().out.splitlines()[0] == verdict


async def test_explain_fits_a_hundred_columns_and_obeys_nobody(
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = {**WEIGHED, "name": "n" * 90, "answer_s": 1e9, "barred": "down: \x1b[2J " + "it " * 60}
    told = {**EXPLAINED, "model": "m" * 90, "nodes": [long]}
    async with answering({}, json.dumps(told).encode()) as (url, _):
        assert await explain(url, "m") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "?[2J" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"nodes": [{}]}', b'{"nodes": null}'])
async def test_explain_of_something_else_is_one_line_and_exit_1(
    body: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    async with answering({}, body) as (url, _):
        assert await explain(url, "m") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ollamux: explain m: ")
    assert len(err.splitlines()) == 1


async def test_explain_tells_a_mistake_in_one_line_and_exit_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(admin={"listen": "127.0.0.1:0", "token": "hush-hush"}) as r:
        for token, argv, error in (
            ("", (MODEL,), "the admin token is needed: .* \\(OLLAMUX_ADMIN_TOKEN\\)"),
            ("hush-hush", ("a b",), "invalid model name"),
            ("hush-hush", (MODEL, "--num-ctx", "0"), "Expected `int` >= 1 - at `\\$.num_ctx`"),
            ("hush-hush", (f"{MODEL}@n9:1",), "no such node; the nodes are: n1 .*"),
        ):
            monkeypatch.setenv("OLLAMUX_ADMIN_TOKEN", token)
            assert await explain(r.admin, *argv) == 1
            out, err = capsys.readouterr()
            assert out == ""
            assert re.fullmatch(f"ollamux: explain {re.escape(argv[0])}: {error}\n", err)
