"""What there has been of something by model, where the recent counts most."""

from math import exp

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.demand import Demand

_MOST = 4096


def test_a_model_that_nobody_has_asked_for_has_no_demand() -> None:
    assert Demand().rate("m", 100.0) == 0.0


@pytest.mark.parametrize("every_s", [0.2, 1.0, 10.0, 60.0])
def test_a_steady_demand_is_known_after_some_time(every_s: float) -> None:
    """Right after a request it is a little high, right before one a little low."""
    demand, now = Demand(), 1000.0
    while now < 4000.0:
        now += every_s
        demand.count("m", now)
    assert demand.rate("m", now + every_s / 2) == pytest.approx(1 / every_s, rel=0.01)


@pytest.mark.parametrize(("after_s", "left"), [(0, 1.0), (300, exp(-1)), (600, exp(-2))])
def test_what_is_five_minutes_ago_counts_as_a_third(after_s: float, left: float) -> None:
    demand = Demand()
    for _ in range(30):
        demand.count("m", 50.0)
    assert demand.rate("m", 50.0 + after_s) == pytest.approx(0.1 * left)


def test_it_counts_other_amounts_than_requests_too() -> None:
    waited = Demand()
    waited.count("m", 0.0, 2.5)
    waited.count("m", 0.0, 1.0)
    assert waited.total("m", 0.0) == 3.5
    waited.forget("m")
    waited.forget("never seen")
    assert waited.total("m", 0.0) == 0.0


def test_each_model_has_a_demand_of_its_own() -> None:
    demand = Demand()
    for key, many in (("a", 3), ("b", 1)):
        for _ in range(many):
            demand.count(key, 7.0)
    assert [demand.rate(key, 7.0) * 300 for key in ("a", "b", "c")] == pytest.approx([3, 1, 0])


@given(st.lists(st.floats(0, 1000), max_size=50), st.floats(0, 1e6))
def test_it_is_never_more_than_what_was_asked_nor_less_than_nothing(
    gaps_s: list[float], later_s: float
) -> None:
    demand, now = Demand(), 0.0
    for gap_s in gaps_s:
        now += gap_s
        demand.count("m", now)
    assert 0.0 <= demand.rate("m", now + later_s) <= demand.rate("m", now)
    assert demand.rate("m", now) * 300 <= len(gaps_s) + 1e-9


def test_of_too_many_models_the_one_asked_for_longest_ago_is_forgotten() -> None:
    demand = Demand()
    demand.count("old", 0.0)
    demand.count("older", 0.0)
    demand.count("old", 1.0)
    for i in range(_MOST - 1):
        demand.count(f"m{i}", 1.0)
    assert demand.rate("older", 1.0) == 0.0
    assert demand.rate("old", 1.0) > 0.0
