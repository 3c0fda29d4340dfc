"""Decays and steps are their formulas, whatever the size of the numbers."""

import pytest
import torch

from shared.kernels import reference
from shared.kernels.cpu.decay import decays_and_steps

HEADS, CHANNELS = 3, 20


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 10.0, 1e3])
def test_decays_and_steps_are_their_formulas(tokens: int, size: float) -> None:
    projected = size * torch.randn(tokens, HEADS * CHANNELS + HEADS)
    raised, steps = projected[:, : HEADS * CHANNELS], projected[:, HEADS * CHANNELS :]
    bias, rate = torch.randn(HEADS * CHANNELS), -torch.rand(HEADS)
    wide = (x.double() for x in (bias, rate))
    expected = reference.decays_and_steps(raised.double(), steps.double(), *wide)
    for found, exact in zip(decays_and_steps(raised, steps, bias, rate), expected, strict=True):
        torch.testing.assert_close(found.double(), exact.double(), rtol=1e-5, atol=1e-37)


def test_a_channel_that_hardly_forgets_keeps_its_precision() -> None:
    """Where softplus(x) is about e^x, sums with 1 would lose it."""
    raised, zero = torch.linspace(-80, -10, 40).unsqueeze(0), torch.zeros(1)
    decays, _ = decays_and_steps(raised, zero.unsqueeze(0), torch.zeros(40), zero - 1)
    torch.testing.assert_close(-decays.flatten(), raised.flatten().exp(), rtol=5e-5, atol=0)
