"""How long things take on a node: what was learned before what is guessed."""

from itertools import pairwise, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.estimate import Cost, Lengths, cost, pace
from router.core.rates import Rates
from router.core.usage import Usage

GB = 1e9
_MOST = 4096
SIZES = st.floats(1e6, 1e12)


def rates(
    *,
    decode_tps: float | None = None,
    prefill_tps: float | None = None,
    load_s: float | None = None,
) -> Rates:
    """What answers have told, each of these by one of them."""
    made = Rates()
    if load_s is not None:
        made.learn(Usage(load_s=load_s))
    if prefill_tps is not None:
        made.learn(Usage(prompt_tokens=1000, prompt_s=1000 / prefill_tps))
    if decode_tps is not None:
        made.learn(Usage(completion_tokens=100, eval_s=100 / decode_tps))
    return made


def seen(found: Cost) -> list[float]:
    return [found.load_s, found.prefill_s, found.decode_s]


@pytest.mark.parametrize(
    ("size_gb", "pace", "load_s", "prefill_tps", "decode_tps"),
    [
        (3.5, 1.0, 2.75, 3000, 100),
        (35.0, 1.0, 18.5, 300, 10),
        (3.5, 2.0, 5.5, 1500, 50),
        (0.0, 1.0, 3.5, 2100, 70),  # as one of 5 GB
    ],
)
def test_what_nobody_has_told_is_guessed_from_the_size(
    size_gb: float, pace: float, load_s: float, prefill_tps: float, decode_tps: float
) -> None:
    expected = pytest.approx([load_s, 1 / prefill_tps, 1 / decode_tps])
    for known in (None, Rates()):
        assert seen(cost(size_gb * GB, known, lambda: pace)) == expected


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (rates(decode_tps=20), [2.75, 1 / 600, 1 / 20]),  # prefill is slower as decoding is
        (rates(prefill_tps=500), [2.75, 1 / 500, 1 / 100]),
        (rates(load_s=40.0), [40.0, 1 / 3000, 1 / 100]),
        (rates(decode_tps=20, prefill_tps=500, load_s=40.0), [40.0, 1 / 500, 1 / 20]),
    ],
)
def test_what_was_learned_counts_instead_of_the_guess(known: Rates, expected: list[float]) -> None:
    assert seen(cost(3.5 * GB, known, lambda: 1.0)) == pytest.approx(expected)


def test_the_pace_of_a_node_says_nothing_of_what_was_learned_there() -> None:
    known = rates(decode_tps=20, prefill_tps=500, load_s=40.0)
    assert seen(cost(GB, known, lambda: 1.0)) == seen(cost(GB, known, lambda: 9.0))


@given(SIZES, SIZES, st.floats(0.01, 100), st.floats(0.01, 100))
def test_larger_models_and_slower_nodes_are_never_quicker(
    size: float, other: float, pace: float, slower: float
) -> None:
    first = seen(cost(min(size, other), None, lambda: min(pace, slower)))
    second = seen(cost(max(size, other), None, lambda: max(pace, slower)))
    assert all(0 < a <= b for a, b in zip(first, second, strict=True))


# How fast a node is


@pytest.mark.parametrize(
    ("known", "weight", "expected"),
    [
        ([], 1.0, 1.0),
        ([], 4.0, 0.25),  # a weight is a guess, too
        ([(3.5 * GB, Rates())], 4.0, 0.25),
        ([(3.5 * GB, rates(load_s=9.0))], 4.0, 0.25),
        ([(3.5 * GB, rates(decode_tps=50))], 4.0, 2.0),  # and worth nothing beside what was seen
        ([(0.0, rates(decode_tps=70))], 1.0, 1.0),
        ([(3.5 * GB, rates(decode_tps=50)), (35 * GB, rates(decode_tps=5))], 1.0, 2.0),
        ([(3.5 * GB, rates(decode_tps=50)), (3.5 * GB, rates(decode_tps=200))], 1.0, 1.0),
    ],
)
def test_the_pace_is_told_by_the_models_that_have_answered(
    known: list[tuple[float, Rates]], weight: float, expected: float
) -> None:
    assert pace(known, weight) == pytest.approx(expected)


@given(st.lists(st.tuples(SIZES, st.floats(0.01, 10_000)), min_size=1, max_size=9))
def test_a_model_alone_is_as_fast_as_its_node_and_many_are_a_mean(
    told: list[tuple[float, float]],
) -> None:
    known = [(size, rates(decode_tps=tps)) for size, tps in told]
    alone = [pace([one], 1.0) for one in known]
    together = pace(known, 1.0)
    assert min(alone) * (1 - 1e-9) <= together <= max(alone) * (1 + 1e-9)
    for (size, one), slow in zip(known, alone, strict=True):
        assert cost(size, None, repeat(slow).__next__).decode_s == pytest.approx(
            cost(size, one, lambda: 1.0).decode_s
        )


# How long answers are


def lengths(*told: tuple[str, str, int]) -> Lengths:
    made = Lengths()
    for key, flow, tokens in told:
        made.learn(key, flow, tokens)
    return made


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ([], 300),
        ([("other", "a", 1000)], 300),
        ([("m", "a", 160)], 160),
        ([("m", "b", 160)], 160),  # of another flow: better than nothing
        ([("m", "a", 160), ("m", "a", 320)], 170),
        ([("m", "a", 160), ("m", "b", 320), ("m", "b", 320)], 160),
        ([("m", "", 160)], 160),
    ],
)
def test_an_answer_is_expected_to_be_as_long_as_those_before(
    told: list[tuple[str, str, int]], expected: float
) -> None:
    assert lengths(*told).expected("m", "a", None) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("most", "expected"), [(None, 160.0), (1000, 160.0), (100, 100.0), (0, 0.0)]
)
def test_it_is_never_longer_than_the_client_lets_it_be(most: int | None, expected: float) -> None:
    assert lengths(("m", "a", 160)).expected("m", "a", most) == expected


def test_flows_come_to_differ() -> None:
    made = lengths(*[("m", "short", 10), ("m", "long", 1000)] * 100)
    assert made.expected("m", "short", None) == pytest.approx(10, abs=5)
    assert made.expected("m", "long", None) == pytest.approx(1000, abs=5)
    assert 10 < made.expected("m", "new", None) < 1000


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=80))
def test_what_is_expected_is_within_what_was_seen_and_follows_it(seen: list[int]) -> None:
    made = lengths(*[("m", "a", tokens) for tokens in seen])
    assert min(seen) - 1e-6 <= made.expected("m", "a", None) <= max(seen) + 1e-6
    after = [made.expected("m", "a", None)]
    for _ in range(9):
        made.learn("m", "a", 50)
        after.append(made.expected("m", "a", None))
    assert all(abs(b - 50) <= abs(a - 50) for a, b in pairwise(after))


def test_of_too_many_flows_the_one_that_answered_longest_ago_is_forgotten() -> None:
    made = lengths(("m", "a", 9000), ("m", "b", 9000), ("m", "a", 9000))
    for i in range(_MOST - 1):
        made.learn("m", f"flow {i}", 100)
    assert made.expected("m", "a", None) > 8000
    assert made.expected("m", "b", None) < 200


def test_of_too_many_models_too() -> None:
    made = lengths(("m", "a", 9000))
    for i in range(_MOST):
        made.learn(f"m{i}", "a", 100)
    assert made.expected("m", "new", None) == 300
