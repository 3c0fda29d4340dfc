"""The kernels for autograd give what the reference gives, and its gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shared.kernels import reference
from shared.kernels.batch import Batch, Placement
from training import kernels

SEQUENCES, TOKENS, HEADS, CHANNELS = 2, 128, 3, 16
NO_STATES = torch.empty(0)
GRADIENT_TOLERANCE = 1e-4
"""Of the largest gradient of an operand."""


def batch() -> Batch:
    pages = TOKENS // 64
    where = [
        Placement(row, tuple(range(pages * row, pages * (row + 1)))) for row in range(SEQUENCES)
    ]
    return Batch.pack([TOKENS] * SEQUENCES, [0] * SEQUENCES, where)


def operands(strength: float) -> list[Tensor]:
    """q, k, v, g and beta, `[B, T, ...]`, fp64."""
    shape = (SEQUENCES, TOKENS, HEADS, CHANNELS)
    q, k, v = torch.randn(3, *shape, dtype=torch.float64)
    return [
        functional.normalize(q, dim=-1),
        functional.normalize(k, dim=-1),
        v,
        -strength * torch.rand(shape, dtype=torch.float64),
        torch.rand(shape[:3], dtype=torch.float64),
    ]


@pytest.mark.parametrize("strength", [0.0, 0.1, 2.0, 12.0, 90.0])
def test_kda_and_its_gradients_are_those_of_the_recurrence_at_any_decay(strength: float) -> None:
    exact = [x.requires_grad_() for x in operands(strength)]
    packed = [x.detach().float().flatten(0, 1).requires_grad_() for x in exact]
    state = torch.zeros(SEQUENCES, HEADS, CHANNELS, CHANNELS, dtype=torch.float64)
    q, k, v, g, beta = exact
    expected, _ = reference.kda_recurrence(q, k, v, g, beta, state)
    q, k, v, g, beta = packed
    found = kernels.delta_rule(q, k, v, g, beta, NO_STATES, batch())
    torch.testing.assert_close(found, expected.float().flatten(0, 1), atol=1e-5, rtol=0)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), exact)
    given = torch.autograd.grad((found * weights.float().flatten(0, 1)).sum(), packed)
    for mine, other in zip(given, wanted, strict=True):
        scale = float(other.abs().max()) + 1e-12
        difference = (mine - other.flatten(0, 1)).abs().max()
        assert float(difference) <= GRADIENT_TOLERANCE * scale + 1e-6


def test_the_convolution_is_the_reference_for_each_sequence() -> None:
    x, weight = torch.randn(SEQUENCES * TOKENS, 8), torch.randn(4, 8)
    found = kernels.short_convolution(x, weight, NO_STATES, batch())
    expected = [
        reference.short_convolution(sequence, weight, torch.zeros(3, 8))[0]
        for sequence in torch.split(x, TOKENS)
    ]
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=0)


def test_latent_attention_is_the_reference_for_each_sequence() -> None:
    nope, rope, rank, value = 24, 8, 16, 32
    q_nope = torch.randn(SEQUENCES * TOKENS, HEADS, nope)
    q_rope = torch.randn(SEQUENCES * TOKENS, HEADS, rope)
    latents = torch.randn(SEQUENCES * TOKENS, rank + rope)
    up = torch.randn(HEADS, nope + value, rank) / rank**0.5
    found = kernels.latent_attention(q_nope, q_rope, latents, up, 0.2, batch())
    split = (torch.split(x, TOKENS) for x in (q_nope, q_rope, latents))
    expected = [
        reference.mla_attention(one_nope, one_rope, one_latents, up, 0.2)
        for one_nope, one_rope, one_latents in zip(*split, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=0)


def test_sequences_of_unlike_lengths_are_refused() -> None:
    unlike = Batch.pack([64, 128], [0, 0], [Placement(0, (0,)), Placement(1, (1, 2))])
    with pytest.raises(ValueError, match="one length"):
        kernels.short_convolution(torch.randn(192, 8), torch.randn(4, 8), NO_STATES, unlike)
