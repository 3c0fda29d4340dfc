"""Grouped experts give each token the weighted sum of its own experts, however the choices fall."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shared.kernels.triton.experts import FEW, FEW_ROWS, MANY_ROWS, GroupedExperts, RowBlocks

EXPERTS, CHOSEN, HIDDEN, INNER = 6, 2, 72, 40


def plain(x: Tensor, gate_and_up: Tensor, down: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
    """Token by token and choice by choice, in fp64."""
    rows = []
    for row, chosen, weights in zip(x.double(), experts.tolist(), shares.double(), strict=True):
        total = torch.zeros_like(row)
        for expert, share in zip(chosen, weights, strict=True):
            gate, up = (gate_and_up[expert].double() @ row).chunk(2)
            total += share * (down[expert].double() @ (functional.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


def weights_on(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    gate_and_up = HIDDEN**-0.5 * torch.randn(EXPERTS, 2 * INNER, HIDDEN, device=device)
    down = INNER**-0.5 * torch.randn(EXPERTS, HIDDEN, INNER, device=device)
    return gate_and_up.to(dtype), down.to(dtype)


def choices_of(tokens: int, device: str) -> tuple[Tensor, Tensor]:
    """Different experts of each token, and shares."""
    scores = torch.rand(tokens, EXPERTS, device=device)
    return scores.topk(CHOSEN).indices, torch.rand(tokens, CHOSEN, device=device)


class TestTheSumOfATokensExperts:
    @pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 63, 64, 65, 130])
    def test_is_that_of_each_token_by_itself(self, tokens: int, device: str) -> None:
        gate_and_up, down = weights_on(device)
        x = torch.randn(tokens, HIDDEN, device=device)
        experts, shares = choices_of(tokens, device)
        output = GroupedExperts(gate_and_up, down)(x, experts, shares)
        expected = plain(x, gate_and_up, down, experts, shares).float()
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("tokens", [20, 200])
    def test_does_not_mind_that_all_tokens_choose_the_same_experts(
        self, tokens: int, device: str
    ) -> None:
        gate_and_up, down = weights_on(device)
        x = torch.randn(tokens, HIDDEN, device=device)
        experts = torch.tensor([[EXPERTS - 1, 0]], device=device).repeat(tokens, 1)
        shares = torch.rand(tokens, CHOSEN, device=device)
        output = GroupedExperts(gate_and_up, down)(x, experts, shares)
        expected = plain(x, gate_and_up, down, experts, shares).float()
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)

    def test_is_the_same_bits_every_time(self, device: str) -> None:
        multiply = GroupedExperts(*weights_on(device))
        x = torch.randn(40, HIDDEN, device=device)
        experts, shares = choices_of(40, device)
        assert torch.equal(multiply(x, experts, shares), multiply(x, experts, shares))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_of_narrow_weights_has_the_dtype_of_the_token(
        self, dtype: torch.dtype, device: str
    ) -> None:
        gate_and_up, down = weights_on(device, dtype)
        x = torch.randn(30, HIDDEN, device=device)
        experts, shares = choices_of(30, device)
        output = GroupedExperts(gate_and_up, down)(x, experts, shares)
        assert output.dtype == torch.float32
        expected = plain(x, gate_and_up, down, experts, shares).float()
        torch.testing.assert_close(output, expected, rtol=3e-2, atol=3e-2)


class TestTheBlocksOfRows:
    @pytest.mark.parametrize("tokens", [1, 5, 64, 130])
    @pytest.mark.parametrize("rows", [FEW_ROWS.rows, MANY_ROWS.rows])
    def test_hold_every_choice_once_and_of_one_expert_each(
        self, rows: int, tokens: int, device: str
    ) -> None:
        experts, _ = choices_of(tokens, device)
        blocks = RowBlocks.of(experts, EXPERTS, rows)
        held = []
        for expert, start, stop in zip(
            blocks.experts.tolist(), blocks.starts.tolist(), blocks.stops.tolist(), strict=True
        ):
            if expert < EXPERTS:
                choices = blocks.order[start : min(start + rows, stop)]
                assert 0 < len(choices) <= rows
                assert (experts.flatten()[choices] == expert).all()
                held += choices.tolist()
        assert sorted(held) == list(range(tokens * CHOSEN))

    def test_have_either_size_in_the_tests_above(self) -> None:
        assert 65 * CHOSEN <= FEW * EXPERTS < 130 * CHOSEN


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4, 4096])
def test_it_runs_at_the_published_shape(tokens: int, device: str) -> None:
    count, chosen, hidden, inner = 256, 8, 2304, 1024
    gate_and_up = hidden**-0.5 * torch.randn(count, 2 * inner, hidden, device=device)
    down = inner**-0.5 * torch.randn(count, hidden, inner, device=device)
    gate_and_up, down = gate_and_up.bfloat16(), down.bfloat16()
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    experts = torch.rand(tokens, count, device=device).topk(chosen).indices
    shares = torch.rand(tokens, chosen, device=device)
    output = GroupedExperts(gate_and_up, down)(x, experts, shares)
    some = slice(0, tokens, max(1, tokens // 16))
    expected = plain(x[some], gate_and_up, down, experts[some], shares[some]).float()
    torch.testing.assert_close(output[some].float(), expected, rtol=3e-2, atol=3e-2)
