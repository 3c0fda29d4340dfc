"""Latents are cut into segments that leave no token out and hold none twice."""

from hypothesis import given
from hypothesis import strategies as st

from shared.policy.segment_size import cut_latents


@given(start=st.integers(0, 2**20), tokens=st.integers(1, 5000))
def test_cuts_join_without_a_gap_and_only_the_last_may_be_short(start: int, tokens: int) -> None:
    cuts = cut_latents(start, start + tokens)
    assert [position for cut in cuts for position in range(*cut)] == [*range(start, start + tokens)]
    sizes = [stop - first for first, stop in cuts]
    assert all(size == 512 for size in sizes[:-1])
    assert 0 < sizes[-1] <= 512


def test_no_tokens_are_no_segment() -> None:
    assert cut_latents(7, 7) == []
