"""Every test here runs against a simulated node and a router over two; live ones on demand."""

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.live import live
from tests.live.simulated import simulated
from tests.live.target import Target

_LIVE = (pytest.mark.live, pytest.mark.timeout(300))
_TARGETS = (
    pytest.param("simulated-node"),
    pytest.param("simulated-router"),
    pytest.param("live-node", marks=_LIVE),
    pytest.param("live-router", marks=_LIVE),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        metafunc.parametrize("target", _TARGETS, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`gap("router", "why")` names a fact that a target does not hold yet.

    A simulated one that does hold it fails the test, until the mark is taken away; real ones may
    hold it by chance.
    """
    for item in items:
        if not isinstance(item, pytest.Function) or "target" not in item.fixturenames:
            continue
        name = str(item.callspec.params["target"])
        for gap in item.iter_markers("gap"):
            where, why = gap.args
            if where in name:
                item.add_marker(pytest.mark.xfail(reason=why, strict="simulated" in name))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say once what live tests lack, and not for each of them."""
    skipped = terminalreporter.stats.get("skipped", ())
    if any(live.HOW in str(report.longrepr) for report in skipped):
        terminalreporter.write_line(f"skipped: {live.HOW}")


@pytest.fixture(scope="session")
def live_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[live.Nodes]:
    with live.nodes(tmp_path_factory.mktemp("live")) as found:
        yield found


@pytest.fixture(scope="session")
def live_router(live_nodes: live.Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path: Path = tmp_path_factory.mktemp("router") / "router.yaml"
    with live.router(live_nodes, path) as url:
        yield url


@pytest.fixture
async def target(request: pytest.FixtureRequest) -> AsyncIterator[Target]:
    """What the test is held against."""
    async with contextlib.AsyncExitStack() as stack:
        kind, _, who = request.param.partition("-")
        if kind == "simulated":
            made = await stack.enter_async_context(simulated(routed=who == "router"))
        else:
            found: live.Nodes = request.getfixturevalue("live_nodes")
            url = request.getfixturevalue("live_router") if who == "router" else None
            made = found.target(url)
        for mark in request.node.iter_markers("since"):
            if made.version < mark.args:
                pytest.skip(f"needs Ollama {'.'.join(map(str, mark.args))}")
        yield made
