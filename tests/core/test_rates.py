"""What answers teach of a model on a node, and the limits that follow from it."""

from math import inf, isfinite

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.rates import Rates, Waits
from router.core.usage import Source, Usage

WAITS = Waits(first_byte_s=600, first_byte_min_s=60, between_s=600, silent_down_s=60)


def told(
    *, prompt: int = 1000, prompt_s: float = 1.0, out: int = 100, eval_s: float = 5.0,
    load_s: float | None = 0.002,
) -> Usage:  # fmt: skip
    return Usage(prompt, out, load_s, eval_s, prompt_s)


def after(*answers: Usage) -> Rates:
    rates = Rates()
    for answer in answers:
        rates.learn(answer)
    return rates


def limit(
    rates: Rates, prompt: int = 1000, ahead: int = 0, *,
    streams: bool = True, warm: bool = False, waits: Waits = WAITS,
) -> float:  # fmt: skip
    return rates.first_byte_limit_s(waits, prompt, ahead, streams=streams, warm=warm)


COLD = told(load_s=10.0)
LEARNED = (COLD, told(), told())


# What is learned


def test_nothing_is_known_of_what_was_never_asked() -> None:
    rates = Rates()
    assert (rates.load_s, rates.prefill_tps, rates.decode_tps) == (None, None, None)
    assert (rates.prompt_s, rates.eval_s, rates.learned) == (0.0, 0.0, False)
    assert repr(rates) == "<Rates of 0>"


def test_equal_answers_are_their_own_mean() -> None:
    rates = after(*LEARNED)
    assert rates.learned
    assert rates.load_s == 10.0
    assert rates.prefill_tps == pytest.approx(1000)
    assert rates.decode_tps == pytest.approx(20)
    assert rates.out_tokens == pytest.approx(100)
    assert rates.prompt_s + rates.eval_s == pytest.approx(6)
    assert repr(rates) == "<Rates of 3 load 10 in/s 1000 out/s 20>"


@pytest.mark.parametrize(
    "nothing",
    [
        Usage(),
        Usage(7, 35),
        Usage(7, 35, source=Source.CHUNKS),
        Usage(load_s=0.09),
        Usage(1000, 0, 0.0, 0.0, 0.0),
        Usage(1000, None, None, 5.0, None),
        Usage(63, None, None, None, 1.0),
        Usage(None, None, None, None, 1.0),
    ],
)
def test_what_tells_no_speed_teaches_none(nothing: Usage) -> None:
    assert repr(after(nothing)) == "<Rates of 0>"


def test_a_load_alone_teaches_how_long_it_took() -> None:
    assert repr(after(Usage(load_s=8.0))) == "<Rates of 0 load 8>"


def test_the_length_of_an_answer_is_its_weight_in_the_decode_rate() -> None:
    rates = after(told(out=1, eval_s=1e-6), told(out=199, eval_s=10.0))
    assert rates.decode_tps == pytest.approx(20)


def test_a_mean_follows_what_has_changed() -> None:
    rates = after(*LEARNED, *[told(out=200, eval_s=40.0)] * 40)
    assert rates.decode_tps == pytest.approx(5, rel=0.1)
    assert rates.eval_s == pytest.approx(40, rel=0.1)


@pytest.mark.parametrize("hits", [1, 30, 300])
def test_a_prompt_that_was_cached_is_not_taken_for_a_fast_node(hits: int) -> None:
    rates = after(*LEARNED, *[told(prompt_s=0.003)] * hits)
    tps = rates.prefill_tps
    assert tps is not None
    assert tps < 1000 * (1.01, 1.2, 4)[(1, 30, 300).index(hits)]


def test_where_most_prompts_are_cached_the_few_others_decide() -> None:
    rates = after(*([told(prompt_s=0.003)] * 49 + [told()]) * 20)
    assert rates.prefill_tps == pytest.approx(1000, rel=0.25)


def test_a_cached_prompt_that_came_first_is_soon_outweighed() -> None:
    rates = after(told(prompt_s=0.003), *[told()] * 4)
    assert rates.prefill_tps == pytest.approx(1000, rel=0.1)


def test_a_model_that_was_half_loaded_does_not_make_loads_short() -> None:
    rates = after(told(load_s=40.0), *[told(load_s=0.5)] * 20)
    assert rates.load_s == pytest.approx(40, rel=0.1)


def test_a_slow_load_is_believed_sooner_than_a_fast_one() -> None:
    slower, faster = after(told(load_s=10), told(load_s=16)), after(told(load_s=16), COLD)
    assert (slower.load_s, faster.load_s) == (13, 15.25)


# The limit


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("answers", [(), (COLD,), (COLD, told())])
def test_until_the_speed_is_known_the_long_limit_holds(
    answers: tuple[Usage, ...], *, streams: bool
) -> None:
    assert limit(after(*answers), streams=streams) == 600


@pytest.mark.parametrize(
    ("prompt", "ahead", "streams", "expected_s"),
    [
        (1000, 0, True, 60),
        (9_999, 0, True, 60),
        (20_000, 0, True, 3 * (10 + 20)),
        (1000, 10, True, 3 * (10 + 10 * 6 + 1)),
        (1000, 0, False, 600),
        (100_000, 20, False, 3 * (10 + 20 * 6 + 100 + 5)),
    ],
)  # fmt: skip
def test_the_limit_is_three_times_what_is_expected_and_never_below_the_least(
    prompt: int, ahead: int, *, streams: bool, expected_s: float
) -> None:
    assert limit(after(*LEARNED), prompt, ahead, streams=streams) == pytest.approx(expected_s)


def test_the_limit_grows_with_what_is_known_even_before_all_is() -> None:
    rates = after(told(eval_s=60.0))
    assert limit(rates, 0, 20) == pytest.approx(3 * 20 * 61)


@pytest.mark.parametrize(("warm", "expected_s"), [(True, 60), (False, 600)])
def test_a_load_of_unknown_length_has_the_long_limit(*, warm: bool, expected_s: float) -> None:
    assert limit(after(told(), told(), told()), warm=warm) == expected_s


def test_a_load_that_was_seen_counts_where_the_model_is_warm_too() -> None:
    slow = told(load_s=100.0)
    assert limit(after(slow, told(), told()), warm=True) == pytest.approx(303)


@pytest.mark.parametrize(("prompt", "expected_s"), [(63, 60), (64, 600)])
def test_a_prompt_longer_than_any_seen_has_the_long_limit(prompt: int, expected_s: float) -> None:
    short = told(prompt=20, prompt_s=0.05, load_s=2.0)
    assert limit(after(short, short, short), prompt) == expected_s


def test_a_least_that_is_above_the_long_limit_does_not_raise_it() -> None:
    waits = Waits(first_byte_s=5, first_byte_min_s=60, between_s=600, silent_down_s=60)
    rates = after(*[told(load_s=0.2)] * 3)
    assert limit(rates, waits=waits) == 5
    assert limit(Rates(), waits=waits) == 5


def test_a_late_answer_gets_more_room_up_to_the_long_limit_and_loses_it_slowly() -> None:
    rates = after(*LEARNED)
    limits = []
    for _ in range(5):
        rates.late()
        limits.append(limit(rates))
    assert limits == [120, 240, 480, 600, 600]
    for _ in range(1000):
        rates.late()
    rates.learn(told())
    assert limit(rates) == 600
    for _ in range(200):
        rates.learn(told())
    assert limit(rates) == 60


NUMBERS = st.none() | st.integers(0, 10**18 - 1)
SECONDS = st.none() | st.integers(0, 10**18 - 1).map(lambda ns: ns / 1e9)
TOLD = st.builds(Usage, NUMBERS, NUMBERS, SECONDS, SECONDS, SECONDS)
LIMITS = st.floats(0.001, 31_536_000)


@given(
    st.lists(TOLD, max_size=8), st.builds(Waits, LIMITS, LIMITS, LIMITS, LIMITS),
    st.integers(0, 10**9), st.integers(0, 10**5), st.booleans(), st.booleans(),
)  # fmt: skip
def test_whatever_nodes_tell_the_limit_is_finite_and_never_below_the_least(
    answers: list[Usage], waits: Waits, prompt: int, ahead: int, streams: bool, warm: bool
) -> None:
    rates = after(*answers)
    found = limit(rates, prompt, ahead, streams=streams, warm=warm, waits=waits)
    least = min(waits.first_byte_s, waits.first_byte_min_s) if streams else waits.first_byte_s
    assert isfinite(found)
    assert found >= least
    assert limit(rates, prompt, ahead + 1, streams=streams, warm=warm, waits=waits) >= found
    for rate in (rates.prefill_tps, rates.decode_tps):
        assert rate is None or 0 <= rate < inf
