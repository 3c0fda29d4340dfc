"""The decode kernel is latent attention over whatever pages and splits a request's latents fill."""

import pytest
import torch
from torch import Tensor

from shared.kernels import reference
from shared.kernels.batch import PAGE_TOKENS
from shared.kernels.triton.mla_decode import SPLIT_TOKENS, mean_latents

HEADS, NOPE, ROPE, RANK, VALUE = 3, 12, 8, 24, 10
SCALE = (NOPE + ROPE) ** -0.5
LENGTHS = [1, 2, 3, 4, 5, 63, 64, 65, 130]
SPLIT_BORDERS = [SPLIT_TOKENS - 1, SPLIT_TOKENS, SPLIT_TOKENS + 1, 2 * SPLIT_TOKENS + 70]


class PagedLatents:
    """Latents of requests in pages of no order; what is in no request's tokens is not a number."""

    def __init__(self, lengths: list[int], width: int, dtype: torch.dtype, device: str) -> None:
        counts = [-(-length // PAGE_TOKENS) for length in lengths]
        pages = torch.randperm(sum(counts) + 3, device=device)
        self.pool = torch.full((len(pages) * PAGE_TOKENS, width), torch.nan, device=device).to(
            dtype
        )
        self.page_table = torch.zeros(len(lengths), max(counts), dtype=torch.int32, device=device)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.by_request = [
            torch.randn(length, width, device=device).to(dtype) for length in lengths
        ]
        for request, (latents, count) in enumerate(zip(self.by_request, counts, strict=True)):
            own, pages = pages[:count], pages[count:]
            self.page_table[request, :count] = own
            rows = (own[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS, device=device)).flatten()
            self.pool[rows[: len(latents)]] = latents

    def mean(self, queries: Tensor, rank: int) -> Tensor:
        longest = int(self.lengths.max())
        return mean_latents(queries, self.pool, self.page_table, self.lengths, rank, longest)


def plain_mean(queries: Tensor, latents: Tensor, rank: int) -> Tensor:
    """Softmax-weighted latents of one request `[H, R]`, in fp64."""
    keys = latents.double()
    return (queries.double() @ keys.T).softmax(dim=-1) @ keys[:, :rank]


@pytest.mark.parametrize("length", [*LENGTHS, *SPLIT_BORDERS])
def test_it_is_latent_attention_with_the_expansions_absorbed(length: int, device: str) -> None:
    paged = PagedLatents([length], RANK + ROPE, torch.float32, device)
    nopes, ropes = torch.randn(1, HEADS, NOPE), torch.randn(1, HEADS, ROPE)
    up = torch.randn(HEADS, NOPE + VALUE, RANK)
    expected = reference.mla_attention(nopes, ropes, paged.by_request[0].cpu(), up, SCALE)
    absorbed = torch.einsum("bhn,hnr->bhr", nopes, up[:, :NOPE])
    queries = SCALE * torch.cat((absorbed, ropes), dim=-1)
    mean = paged.mean(queries.to(device), RANK).cpu()
    values = torch.einsum("bhr,hvr->bhv", mean, up[:, NOPE:])
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)


def test_requests_of_any_lengths_do_not_see_each_other(device: str) -> None:
    paged = PagedLatents([*LENGTHS, SPLIT_TOKENS + 1], RANK + ROPE, torch.float32, device)
    queries = torch.randn(len(paged.by_request), HEADS, RANK + ROPE, device=device)
    for mean, query, latents in zip(
        paged.mean(queries, RANK), queries, paged.by_request, strict=True
    ):
        expected = plain_mean(query, latents, RANK).float()
        torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)


def test_a_result_does_not_depend_on_the_rest_of_the_batch(device: str) -> None:
    paged = PagedLatents([70, 2 * SPLIT_TOKENS], RANK + ROPE, torch.float32, device)
    queries = torch.randn(2, HEADS, RANK + ROPE, device=device)
    alone = mean_latents(
        queries[:1], paged.pool, paged.page_table[:1], paged.lengths[:1], RANK, longest=70
    )
    assert torch.equal(paged.mean(queries, RANK)[:1], alone)


@pytest.mark.parametrize("length", [65, SPLIT_TOKENS + 1])
def test_scores_of_any_size_do_not_overflow(length: int, device: str) -> None:
    paged = PagedLatents([length], RANK + ROPE, torch.float32, device)
    queries = 1e4 * torch.randn(1, HEADS, RANK + ROPE, device=device)
    expected = plain_mean(queries[0], paged.by_request[0], RANK).float()
    torch.testing.assert_close(paged.mean(queries, RANK)[0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_latents_cost_no_more_than_rounded_weights(dtype: torch.dtype, device: str) -> None:
    paged = PagedLatents([130, 3], RANK + ROPE, dtype, device)
    queries = torch.randn(2, HEADS, RANK + ROPE, device=device).to(dtype)
    for mean, query, latents in zip(
        paged.mean(queries, RANK), queries, paged.by_request, strict=True
    ):
        expected = plain_mean(query, latents, RANK).float()
        torch.testing.assert_close(mean, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_it_runs_at_the_published_shape(device: str) -> None:
    heads, rank, rope = 32, 512, 64
    paged = PagedLatents([1, 65, 5000, 20_000], rank + rope, torch.bfloat16, device)
    queries = (192**-0.5 * torch.randn(4, heads, rank + rope, device=device)).bfloat16()
    for mean, query, latents in zip(
        paged.mean(queries, rank), queries, paged.by_request, strict=True
    ):
        torch.testing.assert_close(
            mean, plain_mean(query, latents, rank).float(), rtol=2e-2, atol=1e-2
        )
