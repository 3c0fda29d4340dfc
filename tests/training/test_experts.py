"""What training multiplies with: experts and matrices that autograd follows."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from training.experts import GroupedExperts, Grouping
from training.linear import PlainLinear

EXPERTS, HIDDEN, WIDTH, CHOICES = 8, 24, 16, 3


def test_experts_are_the_plain_sum() -> None:
    gate_and_up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5
    down = torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5
    experts = torch.rand(50, EXPERTS).argsort(dim=-1)[:, :CHOICES]
    x, shares = torch.randn(50, HIDDEN), torch.rand(50, CHOICES)
    grouped = GroupedExperts(list(map(PlainLinear, gate_and_up)), list(map(PlainLinear, down)))
    gate, up = torch.einsum("ecd,td->tec", gate_and_up, x).chunk(2, dim=-1)
    answers = torch.einsum("edc,tec->ted", down, functional.silu(gate) * up)
    weights = torch.zeros(50, EXPERTS).scatter_(1, experts, shares)
    expected = torch.einsum("te,ted->td", weights, answers)
    torch.testing.assert_close(grouped(x, experts, shares), expected, rtol=1e-4, atol=1e-5)


def test_autograd_follows_a_product() -> None:
    weight, x = torch.randn(5, 7, requires_grad=True), torch.randn(4, 7)
    product = PlainLinear(weight)(x)
    torch.testing.assert_close(product, x @ weight.T)
    (gradient,) = torch.autograd.grad(product.sum(), weight)
    torch.testing.assert_close(gradient, x.sum(dim=0).expand(5, 7))


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
