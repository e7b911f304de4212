"""Storms in virtual time: see `storm.py` for what must hold, and for how to replay one."""

import pytest

from tests.core.storm import Broken, Storm, endings, main

SEEDS = 300


@pytest.mark.parametrize("first", range(0, SEEDS, 50))
def test_whatever_nodes_do_all_that_must_hold_does(first: int) -> None:
    found = endings(range(first, first + 50))
    # A storm in which nothing goes wrong, or everything, would test nothing.
    assert found["done"] > sum(found.values()) / 2
    assert {"busy", "all-tried", "drained", "answered", "left"} <= found.keys()


def test_a_storm_depends_on_its_seed_alone() -> None:
    one, other = Storm(7, kept=10_000), Storm(7, kept=10_000)
    one.run()
    other.run()
    assert one.story == other.story
    assert len(one.story) > 100


def test_what_breaks_is_told_with_the_seed_that_replays_it() -> None:
    storm = Storm(5)
    storm.at(3.0, storm.pool._budget.give)
    with pytest.raises(Broken, match=r"^seed 5 at "):
        storm.run()


def test_it_is_run_for_a_time_or_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["replay", "3"])
    story = capsys.readouterr().out
    assert "all is well" in story
    main(["0.01", "3"])
    assert capsys.readouterr().out.startswith("from seed 3\n")
