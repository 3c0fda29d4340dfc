"""The normalisations are their formulas in fp32, for rows of any width and number."""

import pytest
import torch
from torch import Tensor

from shared.kernels.triton.normalization import gated_rms_norm, l2_normalize, rms_norm

EPSILON = 1e-6
SHAPES = [(1, 8), (3, 5, 24), (70, 128), (2, 2304)]
# Triton's interpreter cuts off what a GPU rounds to nearest.
BF16_STEP = 2**-7


def inverse_root_mean_square(x: Tensor) -> Tensor:
    return (x.float().square().mean(dim=-1, keepdim=True) + EPSILON).rsqrt()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_divides_by_the_root_mean_square(shape: tuple[int, ...], device: str) -> None:
    x, weight = torch.randn(shape, device=device), torch.randn(shape[-1], device=device)
    expected = x * inverse_root_mean_square(x) * weight
    torch.testing.assert_close(rms_norm(x, weight, EPSILON), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_rms_norm_scales_by_the_sigmoid_of_the_gate(
    shape: tuple[int, ...], device: str
) -> None:
    x, gate = torch.randn(2, *shape, device=device).unbind()
    weight = torch.randn(shape[-1], device=device)
    expected = x * inverse_root_mean_square(x) * weight * torch.sigmoid(gate)
    torch.testing.assert_close(gated_rms_norm(x, gate, weight, EPSILON), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_l2_normalize_divides_by_the_length(shape: tuple[int, ...], device: str) -> None:
    x = torch.randn(shape, device=device)
    expected = x / (x.square().sum(dim=-1, keepdim=True) + EPSILON).sqrt()
    torch.testing.assert_close(l2_normalize(x, EPSILON), expected)


def test_rows_need_not_be_contiguous(device: str) -> None:
    x = torch.randn(6, 4, 16, device=device).transpose(0, 1)
    gate, weight = torch.randn(6, 4, 16, device=device).transpose(0, 1), torch.randn(16).to(device)
    expected = gated_rms_norm(x.contiguous(), gate.contiguous(), weight, EPSILON)
    torch.testing.assert_close(gated_rms_norm(x, gate, weight, EPSILON), expected)


def test_a_row_of_zeros_stays_zero(device: str) -> None:
    zeros = torch.zeros(2, 16, device=device)
    assert torch.equal(l2_normalize(zeros, EPSILON), zeros)
    assert torch.equal(rms_norm(zeros, torch.ones(16, device=device), EPSILON), zeros)


def test_bf16_rounds_nothing_but_the_outputs(device: str) -> None:
    x, gate = torch.randn(2, 9, 128, device=device).bfloat16().unbind()
    weight = torch.randn(128, device=device).bfloat16()
    expected = gated_rms_norm(x.float(), gate.float(), weight.float(), EPSILON)
    output = gated_rms_norm(x, gate, weight, EPSILON)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=BF16_STEP, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 32, 128), (8192, 2304)], ids=str)
def test_it_runs_at_the_published_shapes(shape: tuple[int, ...], device: str) -> None:
    x, gate = torch.randn(2, *shape, device=device).bfloat16().unbind()
    weight = torch.randn(shape[-1], device=device).bfloat16()
    expected = x.float() * inverse_root_mean_square(x) * weight.float() * gate.float().sigmoid()
    output = gated_rms_norm(x, gate, weight, EPSILON)
    torch.testing.assert_close(output.float(), expected, rtol=BF16_STEP, atol=1e-5)
