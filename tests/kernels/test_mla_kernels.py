"""Latent attention, absorbed or expanded, in pieces and blocks, is one softmax over all keys."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.kernels import reference
from shared.kernels.batch import PAGE_TOKENS, Batch, Placement
from shared.kernels.cpu import mla
from shared.kernels.cpu.mla import latent_attention
from tests.kernels.packing import PAGES, ROWS, scattered

HEADS, NOPE, ROPE, RANK, VALUE = 3, 16, 8, 32, 12
SCALE = (NOPE + ROPE) ** -0.5
FEW, MANY = 9, 100
"""Queries for which, after a hundred tokens, absorbing and expanding is less work."""
BF16_ERROR = 0.01
"""Relative; a bf16 number has 8 significant bits."""

Operands = tuple[Tensor, Tensor, Tensor, Tensor]
Dimensions = tuple[int, int, int, int, int]


def random_operands(
    tokens: int, dimensions: Dimensions = (HEADS, NOPE, ROPE, RANK, VALUE)
) -> Operands:
    """Queries as the model has them, a pool full of latents, the expansion to keys and values."""
    heads, nope, rope, rank, value = dimensions
    queries = torch.randn(tokens, heads, nope + rope)
    return (
        queries[..., :nope],
        queries[..., nope:],
        torch.randn(ROWS, rank + rope),
        torch.randn(heads, nope + value, rank) / rank**0.5,
    )


def expected_of(operands: Operands, batch: Batch) -> Tensor:
    """The plain form for each request by itself, over its latents in the order of its tokens."""
    q_nope, q_rope, latents, key_value_up = operands
    outputs = []
    for part in batch.parts:
        rows = slice(part.start, part.stop)
        seen = torch.cat([latents[found] for found, _ in part.placement.split(0, part.length)])
        outputs.append(
            reference.mla_attention(q_nope[rows], q_rope[rows], seen, key_value_up, SCALE)
        )
    return torch.cat(outputs)


REQUESTS = [
    ([1], [0]),
    ([1], [299]),
    ([1], [2400]),
    ([FEW], [0]),
    ([FEW], [291]),
    ([40], [2000]),
    ([MANY], [0]),
    ([250], [50]),
    ([64], [64]),
    ([1100], [70]),
    ([FEW, MANY, 1], [130, 64, 63]),
    ([1, 1, 1], [0, 40, 300]),
]
"""New tokens, and tokens before them, of the requests of a batch."""


@pytest.mark.parametrize(("counts", "seen"), REQUESTS, ids=str)
def test_it_is_one_softmax_for_each_request(counts: list[int], seen: list[int]) -> None:
    batch = scattered(counts, seen)
    operands = random_operands(batch.rows)
    output = latent_attention(*operands, SCALE, batch)
    torch.testing.assert_close(output, expected_of(operands, batch), rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 90), st.integers(0, 300)), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_so_it_is_for_any_requests(requests: list[tuple[int, int]], seed: int) -> None:
    counts, seen = zip(*requests, strict=True)
    batch = scattered(counts, seen, seed)
    operands = random_operands(batch.rows)
    output = latent_attention(*operands, SCALE, batch)
    torch.testing.assert_close(output, expected_of(operands, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("counts", "seen"), [([1, 1], [5, 200]), ([6], [90]), ([130], [40])])
@pytest.mark.parametrize(
    "dimensions",
    [
        (1, 1, 1, 1, 1),
        (2, 24, 8, 64, 32),
        (5, 7, 3, 19, 2),
        (8, 33, 16, 40, 17),
        (80, 16, 8, 16, 16),
    ],
    ids=str,
)
def test_so_it_is_for_any_dimensions(
    dimensions: Dimensions, counts: list[int], seen: list[int]
) -> None:
    batch = scattered(counts, seen)
    operands = random_operands(batch.rows, dimensions)
    output = latent_attention(*operands, SCALE, batch)
    torch.testing.assert_close(output, expected_of(operands, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [2, 7])
@pytest.mark.parametrize(("counts", "seen"), REQUESTS, ids=str)
def test_threads_change_no_bit(counts: list[int], seen: list[int], threads: int) -> None:
    batch = scattered(counts, seen)
    operands = random_operands(batch.rows)
    alone = latent_attention(*operands, SCALE, batch)
    torch.set_num_threads(threads)
    assert torch.equal(latent_attention(*operands, SCALE, batch), alone)


@pytest.mark.parametrize("counts", [[1] * 6, [1, FEW, 2, 70, 1, MANY]], ids=str)
def test_other_requests_change_no_bit(counts: list[int]) -> None:
    batch = scattered(counts, [0, 40, 129, 300, 700, 64])
    q_nope, q_rope, latents, up = random_operands(batch.rows)
    together = latent_attention(q_nope, q_rope, latents, up, SCALE, batch)
    for part in batch.parts:
        alone = Batch.pack([part.tokens], [part.seen], [part.placement])
        rows = slice(part.start, part.stop)
        found = latent_attention(q_nope[rows], q_rope[rows], latents, up, SCALE, alone)
        assert torch.equal(found, together[rows])


@pytest.mark.parametrize("tokens", [1, FEW, MANY])
def test_the_places_of_pages_change_no_bit(tokens: int) -> None:
    q_nope, q_rope, latents, key_value_up = random_operands(tokens)
    outputs = []
    for pages in [(0, 1, 2, 3, 4, 5), (20, 21, 22, 5, 6, 39), (39, 7, 2, 30, 11, 0)]:
        moved = torch.full_like(latents, float("nan"))
        for page, other in enumerate(pages):
            moved[other * PAGE_TOKENS :][:PAGE_TOKENS] = latents[page * PAGE_TOKENS :][:PAGE_TOKENS]
        batch = Batch.pack([tokens], [380 - tokens], [Placement(0, pages)])
        outputs.append(latent_attention(q_nope, q_rope, moved, key_value_up, SCALE, batch))
    assert outputs[0].isfinite().all()
    assert all(torch.equal(*pair) for pair in pairwise(outputs))


@pytest.mark.parametrize("tokens", [1, FEW, MANY])
def test_a_bf16_expansion_costs_its_rounding_and_gives_fp32(tokens: int) -> None:
    batch = scattered([tokens], [100])
    q_nope, q_rope, latents, key_value_up = random_operands(tokens)
    narrow = key_value_up.bfloat16()
    output = latent_attention(q_nope, q_rope, latents, narrow, SCALE, batch)
    expected = expected_of((q_nope, q_rope, latents, narrow.float()), batch)
    assert output.dtype == torch.float32
    assert float((output - expected).norm() / expected.norm()) < BF16_ERROR


def test_the_form_is_chosen_by_its_work() -> None:
    up = torch.empty(HEADS, NOPE + VALUE, RANK).numpy()
    few, many, whole, one = scattered([FEW, MANY, MANY, 1], [100, 100, 0, 0]).parts
    assert mla._absorbs(few, up)
    assert not mla._absorbs(many, up)
    assert not mla._absorbs(whole, up)
    assert mla._absorbs(one, up)


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_huge_scores_neither_overflow_nor_lose_the_best_key(tokens: int) -> None:
    batch = scattered([tokens], [100 - tokens])
    q_nope, q_rope, latents, key_value_up = random_operands(tokens)
    operands = (1e4 * q_nope, q_rope, latents, key_value_up)
    output = latent_attention(*operands, SCALE, batch)
    torch.testing.assert_close(output, expected_of(operands, batch), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_later_tokens_and_other_requests_are_not_seen(tokens: int) -> None:
    batch = scattered([tokens], [100])
    q_nope, q_rope, latents, key_value_up = random_operands(tokens)
    before = latent_attention(q_nope, q_rope, latents, key_value_up, SCALE, batch)
    half = tokens // 2
    rows = torch.arange(ROWS)
    own = torch.cat([rows[some] for some, _ in batch.parts[0].placement.split(0, 100 + tokens)])
    seen, later = own[: 100 + half], own[100 + half :]
    kept = latents[seen]
    latents[:] = float("nan")
    latents[seen], latents[later] = kept, 1e3
    after = latent_attention(q_nope, q_rope, latents, key_value_up, SCALE, batch)
    assert torch.equal(before[:half], after[:half])
    assert after.isfinite().all()
    assert not torch.isclose(before[half:], after[half:]).any()


def test_a_step_sees_the_latents_of_its_own_request_only() -> None:
    batch = scattered([1, 1], [70, 130])
    q_nope, q_rope, latents, key_value_up = random_operands(2)
    before = latent_attention(q_nope, q_rope, latents, key_value_up, SCALE, batch)
    for rows, _ in batch.parts[1].placement.split(0, 131):
        latents[rows] = float("nan")
    after = latent_attention(q_nope, q_rope, latents, key_value_up, SCALE, batch)
    assert torch.equal(before[0], after[0])
    assert after[1].isnan().all()


def test_the_last_page_of_the_pool_is_read_to_its_end_only() -> None:
    pages = tuple(range(PAGES))
    for tokens in (1, FEW, MANY):
        batch = Batch.pack([tokens], [ROWS - tokens], [Placement(0, pages)])
        operands = random_operands(tokens)
        output = latent_attention(*operands, SCALE, batch)
        torch.testing.assert_close(output, expected_of(operands, batch), rtol=1e-4, atol=1e-5)
