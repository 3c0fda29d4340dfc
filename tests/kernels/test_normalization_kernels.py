"""Normalisations are their formulas, whatever the size of the numbers."""

import pytest
import torch

from shared.kernels.cpu.normalization import add_rms_norm, gated_rms_norm, rms_norm
from shared.kernels.reference import add_rms_norm as plain_add_rms_norm

EPSILON = 1e-5


@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 1e6])
def test_rms_norm(size: float) -> None:
    x, weight = size * torch.randn(5, 24), torch.randn(24)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight
    torch.testing.assert_close(
        rms_norm(x, weight, EPSILON).double(), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e6])
def test_a_sum_is_normalised_as_by_itself(size: float) -> None:
    x, addend, weight = size * torch.randn(5, 24), torch.randn(5, 60)[:, 7:31], torch.randn(24)
    total, normalised = add_rms_norm(x, addend, weight, EPSILON)
    assert torch.equal(total, x + addend)
    assert torch.equal(normalised, rms_norm(total, weight, EPSILON))
    _, expected = plain_add_rms_norm(x, addend, weight, EPSILON)
    torch.testing.assert_close(normalised, expected)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e6])
def test_gated_rms_norm_leaves_its_operands_alone(size: float) -> None:
    x, gate, weight = size * torch.randn(5, 3, 24), torch.randn(5, 3, 24), torch.randn(24)
    before = gate.clone()
    wide = x.double()
    normalised = wide / (wide.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight
    found = gated_rms_norm(x, gate, weight, EPSILON)
    expected = normalised * gate.double().sigmoid()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(gate, before)


def test_parts_of_a_wider_projection_are_normalised_by_themselves() -> None:
    wide, weight = torch.randn(5, 60), torch.randn(24)
    part, copy = wide[:, 10:34], wide[:, 10:34].clone()
    assert torch.equal(rms_norm(part, weight, EPSILON), rms_norm(copy, weight, EPSILON))
    heads, gate = wide.view(5, 3, 20)[:, 1:, :10], torch.randn(5, 2, 10)
    gated = gated_rms_norm(heads, gate, weight[:10], EPSILON)
    expected = gated_rms_norm(heads.clone(), gate, weight[:10], EPSILON)
    torch.testing.assert_close(gated, expected)
    assert torch.equal(wide[:, 10:34], copy)
