"""Which header lines pass from one connection to the next."""

import pytest

from router.headers import HOP_BY_HOP, Passing, named, without


def test_a_name_is_judged_whatever_its_case_and_only_once_per_spelling() -> None:
    asked: list[bytes] = []

    def passes(name: bytes) -> bool:
        asked.append(name)
        return name != b"secret"

    passing = Passing(passes)
    headers = [(b"A", b"1"), (b"SECRET", b"x"), (b"Secret", b"y"), (b"A", b"2"), (b"a", b"3")]
    for _ in range(2):
        assert passing.lines(headers) == [b"A: 1", b"A: 2", b"a: 3"]
    assert asked == [b"a", b"secret", b"secret", b"a"]


def test_what_is_remembered_of_names_is_bounded() -> None:
    passing = Passing(lambda name: True)
    assert passing[b"x" * 65]
    assert not passing
    for number in range(3000):
        assert passing[b"%d" % number]
    assert len(passing) == 2000


@pytest.mark.parametrize(
    ("connection", "ended"),
    [
        ("keep-alive", set()),
        ("close", set()),
        ("Keep-Alive, TE", set()),
        ("close, X-One , x-two", {b"x-one", b"x-two"}),
        ("", {b""}),
    ],
)
def test_a_connection_header_ends_what_it_names(connection: str, ended: set[bytes]) -> None:
    assert named(connection) - {b"close"} == ended
    assert not named(connection) & HOP_BY_HOP


def test_headers_go_by_name_alone() -> None:
    headers = [(b"X-One", b"1"), (b"Two", b"x-one")]
    assert list(without(headers, frozenset([b"x-one"]))) == [(b"Two", b"x-one")]
    assert without(headers, frozenset()) is headers
