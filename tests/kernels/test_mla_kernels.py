"""Blockwise latent attention, absorbed or expanded, is one softmax over all keys so far."""

import pytest
import torch
from torch import Tensor

from shared.kernels import reference
from shared.kernels.batch import Batch
from shared.kernels.cpu import mla
from shared.kernels.cpu.mla import latent_attention
from tests.kernels.packing import ROWS, scattered

HEADS, NOPE, ROPE, RANK, VALUE = 3, 16, 8, 32, 12
SCALE = (NOPE + ROPE) ** -0.5
ABSORBED, EXPANDED = 9, 100
"""Queries that are fewer and more than where absorbing stops to be less work."""

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
    monkeypatch.setattr(mla, "SMALLEST_KEY_BLOCK", 7)
    monkeypatch.setattr(mla, "LARGEST_KEY_BLOCK", 33)
    monkeypatch.setattr(mla, "SCORES", 2**11)


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


def test_both_forms_are_chosen_by_their_work() -> None:
    key_value_up = torch.empty(HEADS, NOPE + VALUE, RANK)
    assert mla._absorbs(ABSORBED, key_value_up)
    assert not mla._absorbs(EXPANDED, key_value_up)


@pytest.mark.parametrize("tokens", [ABSORBED, EXPANDED])
def test_huge_scores_neither_overflow_nor_lose_the_best_key(tokens: int) -> None:
    batch = scattered([tokens], [EXPANDED - tokens])
    q_nope, q_rope, latents, key_value_up = random_operands(tokens)
    operands = (1e4 * q_nope, q_rope, latents, key_value_up)
    output = latent_attention(*operands, SCALE, batch)
    torch.testing.assert_close(output, expected_of(operands, batch), rtol=1e-2, atol=1e-2)


def test_later_tokens_and_other_requests_are_not_seen() -> None:
    batch = scattered([EXPANDED])
    q_nope, q_rope, latents, key_value_up = random_operands(EXPANDED)
    before = latent_attention(q_nope, q_rope, latents, key_value_up, SCALE, batch)
    own = torch.cat([torch.arange(ROWS)[rows] for rows, _ in batch.parts[0].placement.split(0, 50)])
    kept = latents[own]
    latents[:] = 1e3
    latents[own] = kept
    after = latent_attention(q_nope, q_rope, latents, key_value_up, SCALE, batch)
    assert torch.equal(before[:50], after[:50])
    assert not torch.equal(before[50:], after[50:])


def test_memory_does_not_grow_with_the_keys() -> None:
    batch = scattered([EXPANDED], [2000])
    blocks = mla._key_blocks(torch.empty(ROWS, RANK + ROPE), batch.parts[0], 2**14)
    assert max(block.shape[0] for _, block in blocks) <= mla.SMALLEST_KEY_BLOCK
    assert sum(block.shape[0] for _, block in blocks) == 2000 + EXPANDED
