"""Which limits hold for which model."""

import pytest

from router.core.rates import Waits
from router.core.waits import ModelWaits

COMMON, LARGE, LLAMA = (Waits(s, s, s, s) for s in (1.0, 2.0, 3.0))
TABLE = ModelWaits(COMMON, (("*:70b", LARGE), ("llama3*", LLAMA), ("tiny", LARGE)))


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("mistral:7b", COMMON),
        ("llama3:8b", LLAMA),
        ("llama3:70b", LARGE),
        ("tiny:latest", LARGE),
        ("tiny:q4", COMMON),
        ("", COMMON),
    ],
)
def test_the_first_glob_that_fits_decides(key: str, expected: Waits) -> None:
    assert TABLE.of(key) is expected
    assert TABLE.of(key) is expected


def test_without_rows_all_models_have_the_same() -> None:
    assert ModelWaits(COMMON).of("llama3:70b") is COMMON


def test_tables_are_equal_by_what_they_say_and_asking_changes_nothing() -> None:
    asked, fresh = ModelWaits(COMMON, TABLE.rows), ModelWaits(COMMON, TABLE.rows)
    asked.of("llama3:8b")
    assert asked == fresh
    assert asked != ModelWaits(LARGE, TABLE.rows)
