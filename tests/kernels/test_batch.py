"""Tokens of several requests are packed without gaps, and each finds its own latents."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.kernels.batch import PAGE_TOKENS, Batch, Placement
from shared.kernels.decode_batch import DecodeBatch
from tests.kernels.packing import scattered

pages = st.lists(st.integers(0, 50), unique=True, min_size=1, max_size=8).map(tuple)


def row_of(placement: Placement, token: int) -> int:
    """Where a token's latent is, by the definition of a page."""
    return placement.pages[token // PAGE_TOKENS] * PAGE_TOKENS + token % PAGE_TOKENS


@given(pages)
def test_extents_are_the_pages_in_their_order_and_neighbours_are_one(
    pages: tuple[int, ...],
) -> None:
    extents = Placement(0, pages).extents
    rows = [row for extent in extents for row in extent]
    assert rows == [row_of(Placement(0, pages), n) for n in range(len(pages) * PAGE_TOKENS)]
    assert all(one.stop != other.start for one, other in pairwise(extents))


@given(pages, st.data())
def test_any_tokens_are_found_in_their_order(pages: tuple[int, ...], data: st.DataObject) -> None:
    placement = Placement(0, pages)
    start = data.draw(st.integers(0, len(pages) * PAGE_TOKENS))
    stop = data.draw(st.integers(start, len(pages) * PAGE_TOKENS))
    found: dict[int, int] = {}
    for rows, tokens in placement.split(start, stop):
        assert rows.stop - rows.start == tokens.stop - tokens.start > 0
        found.update(
            zip(range(tokens.start, tokens.stop), range(rows.start, rows.stop), strict=True)
        )
    assert found == {n - start: row_of(placement, n) for n in range(start, stop)}


@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(0, 200)), min_size=1, max_size=4)
    | st.lists(st.tuples(st.just(1), st.integers(0, 200)), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_rows_are_the_tokens_of_one_request_after_another(
    requests: list[tuple[int, int]], seed: int
) -> None:
    counts, seen = zip(*requests, strict=True)
    batch = scattered(counts, seen, seed)
    assert batch.rows == sum(counts)
    assert batch.is_decode == (set(counts) == {1})
    assert [part.tokens for part in batch.parts] == list(counts)
    assert batch.bounds.tolist() == [part.start for part in batch.parts] + [batch.rows]
    assert batch.lengths.tolist() == [sum(request) for request in requests]
    assert batch.longest == max(map(sum, requests))
    assert batch.slots.tolist() == [part.placement.slot for part in batch.parts]
    assert batch.latent_rows.tolist() == [
        row_of(part.placement, part.seen + n) for part in batch.parts for n in range(part.tokens)
    ]


def test_the_page_table_has_a_row_a_request_as_long_as_the_longest() -> None:
    where = [Placement(0, (7, 3, 4)), Placement(1, (2,))]
    assert Batch.pack([1, 5], [128, 0], where).page_table.tolist() == [[7, 3, 4], [2, 0, 0]]


def test_a_decode_batch_is_one_token_of_each() -> None:
    where = [Placement(0, (0, 1)), Placement(1, (2,))]
    assert Batch.pack([1, 1], [64, 5], where).is_decode
    assert not Batch.pack([1, 2], [64, 5], where).is_decode
    assert Batch.pack([1, 1], [64, 5], where).latent_rows.tolist() == [64, 133]
    assert Batch.pack([1, 1], [63, 63], where).latent_rows.tolist() == [63, 191]


@given(st.lists(st.lists(st.integers(0, 255), min_size=2, max_size=2), min_size=1, max_size=5))
def test_a_decode_batch_in_the_same_tensors_is_one_that_is_made_for_the_step(
    steps: list[list[int]],
) -> None:
    """Requests come and go: who they are and what they have seen changes from step to step."""
    requests = [
        Placement(0, (7, 3, 4, 1)),
        Placement(1, (2, 9, 8, 0)),
        Placement(5, (6, 5, 11, 10)),
    ]
    batch = DecodeBatch(2, 4)
    tensors = batch.slots, batch.bounds, batch.lengths, batch.page_table, batch.latent_rows
    for number, seen in enumerate(steps):
        where = [requests[(number + sum(seen)) % 3], requests[(number + sum(seen) + 1) % 3]]
        batch.take(seen, where)
        made = Batch.pack([1, 1], seen, where)
        assert batch.parts == made.parts
        assert batch.is_decode
        expected = made.slots, made.bounds, made.lengths, made.page_table, made.latent_rows
        for tensor, values in zip(tensors, expected, strict=True):
            assert tensor.dtype == values.dtype
            assert torch.equal(tensor, values)
