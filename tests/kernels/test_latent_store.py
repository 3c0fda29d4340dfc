"""Latents are normalised and put where their requests have room, and nowhere else."""

import pytest
import torch

from shared.kernels import reference
from shared.kernels.cpu.latents import store_latents
from tests.kernels.packing import ROWS, scattered

RANK, ROPE, EPSILON = 24, 8, 1e-6


@pytest.mark.parametrize(
    ("counts", "seen"), [([1], [0]), ([1, 1, 1], [5, 64, 200]), ([70, 3], [0, 63])]
)
def test_latents_are_stored_in_the_pages_of_their_requests(
    counts: list[int], seen: list[int]
) -> None:
    batch, weight = scattered(counts, seen), torch.randn(RANK)
    x = torch.randn(batch.rows, 50 + RANK + ROPE)[:, 50:]  # as a part of a wider projection
    latents = torch.randn(ROWS, RANK + ROPE)
    expected = latents.clone()
    reference.store_latents(x, weight, EPSILON, expected, batch)
    store_latents(x, weight, EPSILON, latents, batch)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-6)
    others = torch.ones(ROWS, dtype=torch.bool).index_fill(0, batch.latent_rows, False)
    assert torch.equal(latents[others], expected[others])
