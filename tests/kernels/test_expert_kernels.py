"""Experts, however their tokens are grouped, sum what a plain loop over tokens sums."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from shared.kernels.cpu.feed_forward import DenseFeedForward, TiledExperts
from shared.kernels.cpu.matrix import Matrix
from shared.kernels.linear import Experts
from tests.kernels.matrices import rounded

EXPERTS, HIDDEN, WIDTH, CHOICES = 8, 24, 16, 3


FORMS: dict[str, Callable[[Tensor, Tensor], Experts]] = {
    "float32": lambda up, down: TiledExperts(up, down, Matrix.of),
    "bfloat16": lambda up, down: TiledExperts(up.bfloat16(), down.bfloat16(), Matrix.of),
    "int8": lambda up, down: TiledExperts(up, down, Matrix.rounded),
}


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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CHOSEN)
def test_experts_are_the_plain_sum(weights: tuple[Tensor, Tensor], case: str, form: str) -> None:
    tokens, among = CHOSEN[case]
    x, experts = torch.randn(tokens, HIDDEN), choices(tokens, among)
    shares = torch.rand(tokens, CHOICES)
    output = FORMS[form](*weights)(x, experts, shares)
    expected = plain_sum(x, experts, shares, *(rounded(weight, form) for weight in weights))
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(1, 60),
    among=st.sets(st.integers(0, EXPERTS - 1), min_size=CHOICES),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_any_choice_is_the_plain_sum(tokens: int, among: set[int], threads: int, seed: int) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    weights = random_weights()
    x, experts = torch.randn(tokens, HIDDEN), choices(tokens, sorted(among))
    shares = torch.rand(tokens, CHOICES)
    output = FORMS["float32"](*weights)(x, experts, shares)
    expected = plain_sum(x, experts, shares, *weights)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


def test_what_experts_make_of_a_token_is_bit_for_bit_the_same_in_any_batch(
    weights: tuple[Tensor, Tensor],
) -> None:
    x, experts = torch.randn(40, HIDDEN), choices(40, list(range(EXPERTS)))
    shares, form = torch.rand(40, CHOICES), FORMS["bfloat16"](*weights)
    together = form(x, experts, shares)
    for rows in (slice(0, 1), slice(3, 10), slice(39, 40)):
        assert torch.equal(form(x[rows], experts[rows], shares[rows]), together[rows])


@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_a_dense_part_is_a_mixture_of_one(weights: tuple[Tensor, Tensor], tokens: int) -> None:
    x = torch.randn(tokens, HIDDEN)
    (gate_and_up, *_), (down, *_) = weights
    one = TiledExperts(gate_and_up.unsqueeze(0), down.unsqueeze(0), Matrix.of)
    gate, up = (x.double() @ gate_and_up.double().T).chunk(2, dim=-1)
    expected = (functional.silu(gate) * up) @ down.double().T
    output = DenseFeedForward(one)(x)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
