"""The report of the routing benchmark: what is compared, what is kept, and where it is put."""

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import msgspec
import pytest

from bench.routing import plots
from bench.routing.experiment import Case, Figures, Quantiles
from bench.routing.fleet import Layout, fleet, view
from bench.routing.foreseen import Foreseen, foreseen, within
from bench.routing.full import Kept, draw, loads, placed
from bench.routing.ours import Ours, Outturn, expected_delay
from bench.routing.routers import Ask
from bench.routing.summary import goodputs, honest, overview

CASE = Case("azure", 1700.0)
SCENARIOS = ("plain", "flood", "slow", "one-model")


def _figures(router: str, scale: float, case: Case = CASE, refused: int = 0) -> Figures:
    times = Quantiles(scale, 2 * scale, 10 * scale)
    return Figures(
        replace(case, router=router), 100, times, times, 0.9, 10 * scale, refused, 0.0,
        {"to 8B": times}, [scale] * 201, [scale, None, math.inf],
    )  # fmt: skip


def test_a_load_is_one_line_with_what_is_saved() -> None:
    found = [_figures("least-in-flight", 4), _figures("warm-and-free", 2), _figures("ollamux", 1)]
    *_, one = overview(found).splitlines()
    cells = "4.00 / 40; 40 | 2.00 / 20; 20 | 1.00 / 10; 10 | 0.25 / 0.25 | 0.25 / 0.25 | -75% |  |"
    assert one == f"| made up, Azure's statistics, 1,700/h | {cells}"
    assert len(overview(found[:2]).splitlines()) == 2, "no line without all three"
    refused = _figures("ollamux", 1, refused=3)
    assert overview([*found[:2], refused]).endswith("| 3 |")


def test_goodput_is_compared_with_the_best_of_the_others() -> None:
    rates = {"warm-and-free": (0.0, 1000.0), "ollamux": (900.0, 1600.0)}
    found = {replace(CASE, per_hour=0.0, router=name): both for name, both in rates.items()}
    *_, good, nearly = goodputs(found).splitlines()
    assert good == "| made up, Azure's statistics: 90% | none | 900 |  |"
    assert nearly == "| made up, Azure's statistics: 80% | 1,000 | 1,600 | 1.60 |"


def test_what_was_expected_has_come_true_within_twice_or_half() -> None:
    pairs = [(10.0, 19.0), (10.0, 21.0), (10.0, 4.9), (0.0, 0.4), (math.inf, 1.0)]
    found = [Outturn(*pair) for pair in pairs]
    assert within(found, 2.0, 0.5) == 0.4
    table = honest([Foreseen(CASE, found, [])])
    assert table.endswith("| made up, Azure's statistics, 1,700/h | 5 | 40% | 0 |  |")


def test_the_core_is_asked_what_it_expects_and_watched() -> None:
    found = foreseen(Case("azure", 1700.0, minutes=5), [1])
    assert found.waits
    assert all(one.actual_s >= 0 for one in (*found.waits, *found.firsts))
    assert len(found.firsts) > len(found.waits)


def _ask(number: int) -> Ask:
    return Ask(number, 0.0, "team", "llama3.1:8b", 100, ())


def test_what_the_core_refuses_is_refused() -> None:
    """No flow has more than 256 that wait."""
    router = expected_delay(view(fleet(Layout.EVERYWHERE, 1)), 1)
    assert isinstance(router, Ours)
    for number in range(400):
        router.arrive(_ask(number), 0.0)
    refused = [one.ask.number for one in router.take(0.0) if one.node is None]
    assert refused == list(range(400 - len(refused), 400))
    assert len(refused) > 100


def test_every_scenario_and_layout_is_on_every_trace() -> None:
    found = loads(["a.csv", "b.jsonl"])
    assert len(found) == len(set(found))
    for source, scenario in product(("a.csv", "b.jsonl"), SCENARIOS):
        assert Case(source, 1700.0, scenario=scenario) in found
        assert Case(source, 1700.0, Layout.THREE) in found
    assert {one.source for one in found} == {"a.csv", "b.jsonl", "azure", "mooncake"}


def test_what_is_kept_is_read_again() -> None:
    kept = Kept(
        {"x": _figures("ollamux", 1)}, {"x": (CASE, [7.0, 8.0])}, {"x": Foreseen(CASE, [], [])}
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(kept), type=Kept) == kept


def test_a_table_takes_the_place_of_the_one_before() -> None:
    begin, end = "<!-- written by make bench-routing-report: it -->", "<!-- end -->"
    text = f"a\n{begin}\nold\n{end}\nb {end}\n"
    assert placed(text, "it", "new") == f"a\n{begin}\n\nnew\n\n{end}\nb {end}\n"
    with pytest.raises(ValueError, match="no <!-- written"):
        placed(text, "that", "new")


def test_the_documentation_has_a_place_for_each_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    for name in ("overview", "goodput", "honesty"):
        placed(text, name, "")


@pytest.mark.skipif(not plots.drawable(), reason="matplotlib is not installed")
def test_plots_are_small_files(tmp_path: Path) -> None:
    routers = ("least-in-flight", "ollamux", "somebody:else")
    found = [
        _figures(router, 1, Case(source, 1700.0, scenario=scenario))
        for source, scenario, router in product(("azure", "mooncake"), SCENARIOS, routers)
    ]
    pairs = [Outturn(1.0, 2.0), Outturn(math.inf, 2.0), Outturn(0.0, 1e9)]
    kept = Kept(
        {repr(one.case): one for one in found},
        foreseen={name: Foreseen(Case(name, 1700.0), pairs, pairs) for name in ("azure", "b")},
    )
    draw(kept, tmp_path / "plots")
    sizes = [path.stat().st_size for path in (tmp_path / "plots").iterdir()]
    assert len(sizes) == 4
    assert all(1000 < size < 60_000 for size in sizes)
