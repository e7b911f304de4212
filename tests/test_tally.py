"""Histograms whose samples are sorted in some hundred at a time."""

from bisect import bisect_left
from itertools import accumulate, islice

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import HistogramMetricFamily

from router.log import Ending, Report
from router.tally import SECONDS, Spread, Tally

samples = st.floats(0, 1000) | st.sampled_from(SECONDS)


@given(batches=st.lists(st.lists(samples)), settled=st.booleans())
def test_a_sample_counts_up_to_the_bounds_that_it_does_not_exceed(
    batches: list[list[float]], *, settled: bool
) -> None:
    spread, wanted = Spread(), [0] * (len(SECONDS) + 1)
    for batch in batches:
        for sample in batch:
            spread.add(sample)
            wanted[bisect_left(SECONDS, sample)] += 1
        if settled:
            spread.settle()
    family = HistogramMetricFamily("x", "", labels=[])
    spread.fill(family, [])
    found = {one.labels.get("le"): one.value for one in family.samples if one.name == "x_bucket"}
    assert [*found.values()] == [*accumulate(wanted)]
    assert [*islice(found, len(SECONDS))] == [str(float(bound)) for bound in SECONDS]


def test_what_is_not_sorted_in_yet_does_not_grow_with_the_requests() -> None:
    tally = Tally()
    for number in range(1000):
        ended = 1.0 + number % 7
        stream = Report(
            "id", "ada", "POST", 1.0, "/api/chat", reason="warm", ending=Ending.OK, sent_at=1.1,
            first_at=1.5, overhead_s=0.1, streamed=True, expected_s=0.1,
        )  # fmt: skip
        tally.count(stream, ended)
        assert max(len(spread._new) for spread in tally._all()) <= 256
    counts = {
        sample.name: sample.value
        for family in tally.collect() for sample in family.samples
        if sample.name.endswith("_count")
    }  # fmt: skip
    for name in ("request_duration", "time_to_first_token", "router_overhead", "first_byte"):
        assert counts[f"ollamux_{name}_seconds_count"] == 1000
