"""Prefill in blocks of keys, absorbed or expanded, is one softmax over all keys so far."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.kernels import reference
from shared.kernels.batch import Batch, Placement
from shared.kernels.triton import mla_prefill
from shared.kernels.triton.mla_prefill import latent_attention
from tests.kernels.packing import PAGES, ROWS, scattered

HEADS, NOPE, ROPE, RANK, VALUE = 3, 16, 8, 32, 12
SCALE = (NOPE + ROPE) ** -0.5
ABSORBED, EXPANDED = 9, 100
"""Queries that are fewer and more than where absorbing stops to be less work."""
BF16_ERROR = 0.01
"""Relative; a bf16 number has 8 significant bits."""

Operands = tuple[Tensor, Tensor, Tensor, Tensor]


def random_operands(tokens: int) -> Operands:
    """Queries, a pool full of latents, and the expansion to keys and values."""
    return (
        torch.randn(tokens, HEADS, NOPE),
        torch.randn(tokens, HEADS, ROPE),
        torch.randn(ROWS, RANK + ROPE),
        torch.randn(HEADS, NOPE + VALUE, RANK) / RANK**0.5,
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


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a few hundred tokens many blocks of keys."""
    monkeypatch.setattr(mla_prefill, "SMALLEST_KEY_BLOCK", 7)
    monkeypatch.setattr(mla_prefill, "LARGEST_KEY_BLOCK", 33)
    monkeypatch.setattr(mla_prefill, "SCORES", 2**11)


REQUESTS = [
    ([1], [0]),
    ([1], [299]),
    ([ABSORBED], [0]),
    ([ABSORBED], [291]),
    ([EXPANDED], [0]),
    ([250], [50]),
    ([ABSORBED, EXPANDED, 1], [130, 64, 63]),
    ([1, 1, 1], [0, 40, 300]),
]
"""New tokens, and tokens before them, of the requests of a batch."""


@pytest.mark.parametrize(("counts", "seen"), REQUESTS, ids=str)
def test_a_block_at_a_time_is_one_softmax_for_each_request(
    counts: list[int], seen: list[int], small_blocks: None
) -> None:
    batch = scattered(counts, seen)
    operands = random_operands(batch.rows)
    output = latent_attention(*operands, SCALE, batch)
    torch.testing.assert_close(output, expected_of(operands, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("counts", "seen"), REQUESTS, ids=str)
def test_so_it_is_with_blocks_of_the_usual_size(counts: list[int], seen: list[int]) -> None:
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


@pytest.mark.parametrize("tokens", [1, ABSORBED, EXPANDED])
def test_pages_that_are_partly_neighbours_are_read_in_the_order_of_tokens(
    tokens: int, small_blocks: None
) -> None:
    where = Placement(0, (20, 21, 22, 5, 6, 39))
    batch = Batch.pack([tokens], [380 - tokens], [where])
    operands = random_operands(tokens)
    output = latent_attention(*operands, SCALE, batch)
    torch.testing.assert_close(output, expected_of(operands, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, ABSORBED, EXPANDED])
def test_a_bf16_expansion_costs_its_rounding_and_gives_fp32(tokens: int) -> None:
    batch = scattered([tokens], [EXPANDED])
    q_nope, q_rope, latents, key_value_up = random_operands(tokens)
    narrow = key_value_up.bfloat16()
    output = latent_attention(q_nope, q_rope, latents, narrow, SCALE, batch)
    expected = expected_of((q_nope, q_rope, latents, narrow.float()), batch)
    assert output.dtype == torch.float32
    assert float((output - expected).norm() / expected.norm()) < BF16_ERROR


def test_both_forms_are_chosen_by_their_work() -> None:
    key_value_up = torch.empty(HEADS, NOPE + VALUE, RANK)
    assert mla_prefill._absorbs(ABSORBED, key_value_up)
    assert not mla_prefill._absorbs(EXPANDED, key_value_up)


@pytest.mark.parametrize("tokens", [ABSORBED, EXPANDED])
def test_huge_scores_neither_overflow_nor_lose_the_best_key(tokens: int) -> None:
    batch = scattered([tokens], [EXPANDED - tokens])
    q_nope, q_rope, latents, key_value_up = random_operands(tokens)
    operands = (1e4 * q_nope, q_rope, latents, key_value_up)
    output = latent_attention(*operands, SCALE, batch)
    torch.testing.assert_close(output, expected_of(operands, batch), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("tokens", [ABSORBED, EXPANDED])
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


@pytest.mark.parametrize("score_rows", [1, 300, 2**12, 2**14])
def test_scores_held_at_a_time_do_not_grow_with_the_keys(score_rows: int) -> None:
    part = Batch.pack([100], [2000], [Placement(0, tuple(range(PAGES)))]).parts[0]
    blocks = mla_prefill._key_blocks(torch.empty(ROWS, RANK + ROPE), part, score_rows)
    sizes = [block.shape[0] for _, block in blocks]
    assert max(sizes) * score_rows <= max(
        mla_prefill.SCORES, mla_prefill.SMALLEST_KEY_BLOCK * score_rows
    )
    assert [start for start, _ in blocks] == [sum(sizes[:n]) for n in range(len(sizes))]
    assert sum(sizes) == 2100
