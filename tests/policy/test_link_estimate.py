"""How fast a link is: an average over time in which long transfers count for more."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.policy.link_estimate import MEMORY_SECONDS, LinkEstimate, TransferSample

SAMPLES = st.lists(
    st.tuples(
        st.builds(
            TransferSample,
            transferred_bytes=st.integers(1, 2**30),
            seconds=st.floats(1e-3, 100),
            round_trip=st.none() | st.floats(1e-4, 1),
        ),
        st.floats(0, 1000),
    ),
    min_size=1,
    max_size=20,
)


def test_nothing_is_known_of_an_unused_link() -> None:
    assert LinkEstimate().bandwidth is None
    assert LinkEstimate().round_trip is None


@given(samples=SAMPLES)
def test_an_estimate_is_between_the_slowest_and_the_fastest_transfer(
    samples: list[tuple[TransferSample, float]],
) -> None:
    estimate, now = LinkEstimate(), 0.0
    for sample, pause in samples:
        now += pause
        estimate = estimate.observe(sample, now)
    speeds = [sample.transferred_bytes / sample.seconds for sample, _ in samples]
    assert estimate.bandwidth is not None
    assert min(speeds) * 0.999 <= estimate.bandwidth <= max(speeds) * 1.001
    trips = [sample.round_trip for sample, _ in samples if sample.round_trip is not None]
    if estimate.round_trip is not None:
        assert min(trips) * 0.999 <= estimate.round_trip <= max(trips) * 1.001
    assert (estimate.round_trip is None) == (not trips)
    assert estimate.total_bytes == sum(sample.transferred_bytes for sample, _ in samples)
    assert estimate.samples == len(samples)


def test_a_long_transfer_counts_for_more_than_a_short_one() -> None:
    estimate = LinkEstimate().observe(TransferSample(10**9, 10.0), 10)
    estimate = estimate.observe(TransferSample(10, 0.04), 10)
    assert estimate.bandwidth == pytest.approx(1e8, rel=0.01)


def test_a_link_that_became_slow_is_soon_known_to_be() -> None:
    estimate = LinkEstimate().observe(TransferSample(10**9, 1.0, 0.01), 0)
    estimate = estimate.observe(TransferSample(10**7, 1.0, 0.08), 10 * MEMORY_SECONDS)
    assert estimate.bandwidth == pytest.approx(10**7, rel=0.01)
    assert estimate.round_trip == pytest.approx(0.08, rel=0.01)


def test_a_clock_that_steps_back_does_no_harm() -> None:
    estimate = LinkEstimate().observe(TransferSample(100, 1.0), 1000)
    again = estimate.observe(TransferSample(100, 1.0), 10)
    assert (again.bandwidth, again.updated) == (100, 1000)


@pytest.mark.parametrize("sample", [(-1, 1.0, None), (1, math.nan, None), (1, 1.0, math.inf)])
def test_numbers_that_are_no_transfer_are_refused(
    sample: tuple[int, float, float | None],
) -> None:
    with pytest.raises(ValueError, match="no transfer"):
        LinkEstimate().observe(TransferSample(*sample), 0)
