"""Blockwise latent attention, absorbed or expanded, is one softmax over all keys so far."""

import pytest
import torch
from torch import Tensor

from shared.kernels import reference
from shared.kernels.cpu import mla
from shared.kernels.cpu.mla import mla_attention, mla_step

HEADS, NOPE, ROPE, RANK, VALUE = 3, 16, 8, 32, 12
SCALE = (NOPE + ROPE) ** -0.5
ABSORBED, EXPANDED = 9, 100
"""Queries that are fewer and more than where absorbing stops to be less work."""


@pytest.fixture(autouse=True)
def one_thread_and_the_same_operands_every_time() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def random_operands(tokens: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.randn(tokens, HEADS, NOPE),
        torch.randn(tokens, HEADS, ROPE),
        torch.randn(length, RANK + ROPE),
        torch.randn(HEADS, NOPE + VALUE, RANK) / RANK**0.5,
    )


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a few hundred tokens many blocks of keys and of queries."""
    monkeypatch.setattr(mla, "QUERY_BLOCK", 110)
    monkeypatch.setattr(mla, "SMALLEST_KEY_BLOCK", 7)
    monkeypatch.setattr(mla, "LARGEST_KEY_BLOCK", 33)
    monkeypatch.setattr(mla, "SCORES", 2**11)


@pytest.mark.parametrize(
    ("tokens", "length"),
    [(1, 1), (1, 300), (ABSORBED, ABSORBED), (ABSORBED, 300), (EXPANDED, EXPANDED), (250, 300)],
)
def test_a_block_at_a_time_is_one_softmax(tokens: int, length: int, small_blocks: None) -> None:
    operands = random_operands(tokens, length)
    expected = reference.mla_attention(*operands, SCALE)
    torch.testing.assert_close(mla_attention(*operands, SCALE), expected, rtol=1e-4, atol=1e-5)


def test_both_forms_are_chosen_by_their_work() -> None:
    key_value_up = torch.empty(HEADS, NOPE + VALUE, RANK)
    assert mla._absorbs(ABSORBED, key_value_up)
    assert not mla._absorbs(EXPANDED, key_value_up)


def test_a_decode_step_attends_for_each_request_to_its_own_latents(small_blocks: None) -> None:
    lengths = [1, 40, 300]
    q_nope, q_rope, latents, key_value_up = random_operands(len(lengths), max(lengths))
    seen = [latents[:length].clone() for length in lengths]
    output = mla_step(q_nope, q_rope, seen, key_value_up, SCALE)
    for request in range(len(lengths)):
        row = slice(request, request + 1)
        expected = reference.mla_attention(
            q_nope[row], q_rope[row], seen[request], key_value_up, SCALE
        )
        torch.testing.assert_close(output[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [ABSORBED, EXPANDED])
def test_huge_scores_neither_overflow_nor_lose_the_best_key(tokens: int) -> None:
    q_nope, q_rope, latents, key_value_up = random_operands(tokens, EXPANDED)
    output = mla_attention(1e4 * q_nope, q_rope, latents, key_value_up, SCALE)
    expected = reference.mla_attention(1e4 * q_nope, q_rope, latents, key_value_up, SCALE)
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2)


def test_later_tokens_are_not_seen() -> None:
    q_nope, q_rope, latents, key_value_up = random_operands(EXPANDED, EXPANDED)
    before = mla_attention(q_nope, q_rope, latents, key_value_up, SCALE)
    latents[50:] = 1e3
    after = mla_attention(q_nope, q_rope, latents, key_value_up, SCALE)
    assert torch.equal(before[:50], after[:50])
