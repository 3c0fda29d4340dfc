"""Experts, however their tokens are grouped, sum what a plain loop over tokens sums."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from shared.kernels.cpu.experts import Grouping, float_experts
from shared.kernels.cpu.int8 import int8_experts

EXPERTS, HIDDEN, WIDTH, CHOICES = 8, 24, 16, 3


BF16_ERROR = 0.01
"""Relative; a bf16 number has 8 significant bits."""


@pytest.fixture
def weights() -> tuple[Tensor, Tensor]:
    return random_weights()


def random_weights() -> tuple[Tensor, Tensor]:
    """Gate above up, and down."""
    return (
        torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5,
        torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5,
    )


def plain_sum(
    x: Tensor, experts: Tensor, shares: Tensor, gate_and_up: Tensor, down: Tensor
) -> Tensor:
    output = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for expert, share in zip(experts[token].tolist(), shares[token].tolist(), strict=True):
            gate, up = (gate_and_up[expert].double() @ x[token].double()).chunk(2)
            output[token] += share * (down[expert].double() @ (functional.silu(gate) * up))
    return output


def choices(tokens: int, among: list[int]) -> Tensor:
    """Each token's different experts, taken from `among`."""
    order = torch.rand(tokens, len(among)).argsort(dim=-1)[:, :CHOICES]
    return torch.tensor(among)[order]


CHOSEN = {
    "one token": (1, list(range(EXPERTS))),
    "a few tokens for most experts": (7, list(range(EXPERTS))),
    "a few tokens for a few experts": (3, [1, 2, 6]),
    "many tokens": (200, list(range(EXPERTS))),
    "many tokens for a few experts": (150, [0, 4, 5, 7]),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_experts_are_the_plain_sum(weights: tuple[Tensor, Tensor], case: str) -> None:
    tokens, among = CHOSEN[case]
    x, experts = torch.randn(tokens, HIDDEN), choices(tokens, among)
    shares = torch.rand(tokens, CHOICES)
    output = float_experts(*weights)(x, experts, shares)
    expected = plain_sum(x, experts, shares, *weights)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(1, 60),
    among=st.sets(st.integers(0, EXPERTS - 1), min_size=CHOICES),
    seed=st.integers(0, 2**16),
)
def test_any_choice_is_the_plain_sum(tokens: int, among: set[int], seed: int) -> None:
    torch.manual_seed(seed)
    gate_and_up, down = random_weights()
    x, experts = torch.randn(tokens, HIDDEN), choices(tokens, sorted(among))
    shares = torch.rand(tokens, CHOICES)
    output = float_experts(gate_and_up, down)(x, experts, shares)
    expected = plain_sum(x, experts, shares, gate_and_up, down)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CHOSEN)
def test_bf16_experts_cost_their_rounding_and_give_fp32(
    weights: tuple[Tensor, Tensor], case: str
) -> None:
    tokens, among = CHOSEN[case]
    x, experts = torch.randn(tokens, HIDDEN), choices(tokens, among)
    shares = torch.rand(tokens, CHOICES)
    narrow = [weight.bfloat16() for weight in weights]
    output = float_experts(*narrow)(x, experts, shares)
    expected = plain_sum(x, experts, shares, *(weight.float() for weight in narrow))
    assert output.dtype == torch.float32
    assert float((output - expected).norm() / expected.norm()) < BF16_ERROR


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(1, EXPERTS), st.integers(0, 99))
def test_grouping_sorts_by_expert_and_back(tokens: int, distinct: int, seed: int) -> None:
    torch.manual_seed(seed)
    experts = torch.rand(tokens, distinct).argsort(dim=-1)[:, :CHOICES]
    grouping = Grouping.of(experts, EXPERTS)
    by_expert = torch.cat(
        [torch.full((group.stop - group.start,), group.expert) for group in grouping.groups]
    )
    assert torch.equal(by_expert[grouping.place], experts.flatten())
    token_of_choice = torch.arange(tokens).repeat_interleave(experts.shape[1])
    assert torch.equal(grouping.tokens[grouping.place], token_of_choice)


def test_int8_experts_are_the_plain_sum_of_rounded_weights(weights: tuple[Tensor, Tensor]) -> None:
    x, experts = torch.randn(20, HIDDEN), choices(20, list(range(EXPERTS)))
    shares = torch.rand(20, CHOICES)
    rounded = [round_to_int8(weight) for weight in weights]
    output = int8_experts(*weights)(x, experts, shares)
    expected = plain_sum(x, experts, shares, *rounded)
    torch.testing.assert_close(output.double(), expected, rtol=2e-3, atol=2e-3)


def round_to_int8(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(dim=-1, keepdim=True) / 127
    return (weight / scale).round() * scale
