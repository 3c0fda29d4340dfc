"""Experts, however their tokens are grouped, sum what a plain loop over tokens sums."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from shared.kernels.cpu import experts as expert_kernels
from shared.kernels.cpu.experts import MOST_TOGETHER, FloatExperts, Grouping
from shared.kernels.cpu.int8 import Int8Experts

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
def test_every_way_of_grouping_is_the_plain_sum(weights: tuple[Tensor, Tensor], case: str) -> None:
    tokens, among = CHOSEN[case]
    x, experts = torch.randn(tokens, HIDDEN), choices(tokens, among)
    shares = torch.rand(tokens, CHOICES)
    output = FloatExperts(*weights)(x, experts, shares)
    expected = plain_sum(x, experts, shares, *weights)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "way"),
    list(zip(CHOSEN, ["_answers_to_one", "_together", *3 * ["_each"]], strict=True)),
)
def test_the_cases_take_all_three_ways(
    weights: tuple[Tensor, Tensor], case: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TakenError(Exception):
        pass

    def taken(*_: object) -> Tensor:
        raise TakenError

    monkeypatch.setattr(FloatExperts, way, taken)
    tokens, among = CHOSEN[case]
    with pytest.raises(TakenError):
        FloatExperts(*weights)(
            torch.randn(tokens, HIDDEN), choices(tokens, among), torch.rand(tokens, CHOICES)
        )


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(1, 60),
    among=st.sets(st.integers(0, EXPERTS - 1), min_size=CHOICES),
    most_together=st.sampled_from([0, MOST_TOGETHER, 1000]),
    seed=st.integers(0, 2**16),
)
def test_any_choice_is_the_plain_sum_whichever_way_it_is_grouped(
    tokens: int, among: set[int], most_together: int, seed: int
) -> None:
    torch.manual_seed(seed)
    gate_and_up, down = random_weights()
    x, experts = torch.randn(tokens, HIDDEN), choices(tokens, sorted(among))
    shares = torch.rand(tokens, CHOICES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_kernels, "MOST_TOGETHER", most_together)
        output = FloatExperts(gate_and_up, down)(x, experts, shares)
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
    output = FloatExperts(*narrow)(x, experts, shares)
    expected = plain_sum(x, experts, shares, *(weight.float() for weight in narrow))
    assert output.dtype == torch.float32
    assert float((output - expected).norm() / expected.norm()) < BF16_ERROR


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(1, EXPERTS), st.integers(0, 99))
def test_grouping_sorts_by_expert_and_back(tokens: int, distinct: int, seed: int) -> None:
    torch.manual_seed(seed)
    experts = torch.rand(tokens, distinct).argsort(dim=-1)[:, :CHOICES]
    grouping = Grouping.of(experts, EXPERTS)
    by_expert = torch.cat([torch.full((group.size,), group.expert) for group in grouping.groups])
    assert torch.equal(by_expert[grouping.place], experts.flatten())
    token_of_choice = torch.arange(tokens).repeat_interleave(experts.shape[1])
    assert torch.equal(grouping.tokens[grouping.place], token_of_choice)
    assert grouping.largest == int(experts.flatten().bincount().max())


def test_int8_experts_are_the_plain_sum_of_rounded_weights(weights: tuple[Tensor, Tensor]) -> None:
    x, experts = torch.randn(20, HIDDEN), choices(20, list(range(EXPERTS)))
    shares = torch.rand(20, CHOICES)
    rounded = [round_to_int8(weight) for weight in weights]
    output = Int8Experts(*weights)(x, experts, shares)
    expected = plain_sum(x, experts, shares, *rounded)
    torch.testing.assert_close(output.double(), expected, rtol=2e-3, atol=2e-3)


def round_to_int8(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(dim=-1, keepdim=True) / 127
    return (weight / scale).round() * scale
