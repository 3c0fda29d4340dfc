"""A prefill is cut so that its segments are whole blocks, and snapshots are kept where they pay."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.policy.prefill_plan import Chunk, most_reusable_tokens, plan_chunks

BLOCK = 64


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, int, int, int | None]:
    length = draw(st.integers(1, 5000))
    cached = BLOCK * draw(st.integers(0, most_reusable_tokens(length) // BLOCK))
    chunk_tokens = BLOCK * draw(st.integers(1, 20))
    known = draw(st.none() | st.integers(0, length // BLOCK).map(lambda blocks: BLOCK * blocks))
    return length, cached, chunk_tokens, known


@given(plans())
def test_the_chunks_are_the_tokens_that_are_not_cached(
    plan: tuple[int, int, int, int | None],
) -> None:
    length, cached, chunk_tokens, known = plan
    chunks = plan_chunks(length, cached, chunk_tokens, known)
    assert chunks[0].start == cached
    assert chunks[-1].stop == length
    assert all(one.stop == other.start for one, other in pairwise(chunks))
    assert all(0 < chunk.stop - chunk.start <= chunk_tokens for chunk in chunks)
    assert all(chunk.start % BLOCK == 0 for chunk in chunks)


@given(plans())
def test_snapshots_are_kept_at_the_last_whole_block_and_where_a_known_prefix_ends(
    plan: tuple[int, int, int, int | None],
) -> None:
    length, cached, chunk_tokens, known = plan
    kept = {
        chunk.stop
        for chunk in plan_chunks(length, cached, chunk_tokens, known)
        if chunk.keeps_snapshot
    }
    last_block = (length - 1) // BLOCK * BLOCK
    wanted = set() if known is None else {min(known, last_block), last_block}
    assert kept == {point for point in wanted if point > cached}


@pytest.mark.parametrize(
    ("length", "reusable"),
    [(1, 0), (63, 0), (64, 0), (65, 64), (127, 64), (128, 64), (129, 128), (130, 128)],
)
def test_the_last_token_is_always_computed(length: int, reusable: int) -> None:
    assert most_reusable_tokens(length) == reusable


def test_a_prompt_that_leaves_a_known_one_is_cut_there() -> None:
    assert plan_chunks(1300, 0, 512, 640) == (
        Chunk(0, 512, keeps_snapshot=False),
        Chunk(512, 640, keeps_snapshot=True),
        Chunk(640, 1152, keeps_snapshot=False),
        Chunk(1152, 1280, keeps_snapshot=True),
        Chunk(1280, 1300, keeps_snapshot=False),
    )


def test_without_a_cache_nothing_is_kept() -> None:
    assert plan_chunks(700, 0, 512, None) == (
        Chunk(0, 512, keeps_snapshot=False),
        Chunk(512, 700, keeps_snapshot=False),
    )
