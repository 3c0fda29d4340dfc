"""Matrix units multiply bf16 with rounded activations, and nothing else is lost on the way."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from shared.kernels.batch import Batch, Placement
from shared.kernels.cpu import mla
from shared.kernels.cpu.matrix_units.feed_forward import MatrixUnitExperts
from shared.kernels.cpu.matrix_units.linear import MatrixUnitLinear, has_matrix_units
from shared.kernels.cpu.matrix_units.mla import latent_attention
from shared.kernels.cpu.matrix_units.products import multiply
from tests.kernels.packing import ROWS, scattered

pytestmark = pytest.mark.skipif(not has_matrix_units(), reason="the processor has no matrix units")

EXPERTS, HIDDEN, WIDTH, CHOICES = 6, 96, 64, 3


@pytest.fixture
def weight() -> Tensor:
    return (torch.randn(168, 576) / 24).bfloat16()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    steps=st.integers(1, 20),
    outputs=st.integers(32, 200),
    threads=st.integers(1, 3),
)
def test_of_any_shape_only_the_activations_are_rounded(
    rows: int, steps: int, outputs: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    weight, x = torch.randn(outputs, 32 * steps).bfloat16(), torch.randn(rows, 32 * steps)
    product = MatrixUnitLinear(weight)(x)
    expected = x.bfloat16().double() @ weight.double().T
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 70), outputs=st.integers(32, 80), block=st.sampled_from([32, 64]))
def test_nothing_is_written_beside_the_product(rows: int, outputs: int, block: int) -> None:
    frame = np.full((rows + 2, outputs + 2), np.nan, np.float32)
    x, weight = torch.randn(rows, 32), torch.randn(outputs, 32).bfloat16()
    product = frame[1:-1, 1:-1]
    multiply(x.numpy(), weight.view(torch.uint16).numpy(), product, block)
    assert not np.isnan(product).any()
    assert np.isnan(frame).sum() == frame.size - product.size


def test_activations_are_rounded_to_the_nearest_and_of_two_to_the_even_one() -> None:
    ulp = 2.0**-7  # of bf16 between 1 and 2
    x = torch.ones(1, 32)
    x[0, :6] = torch.tensor([1 + ulp / 2, 1 + 3 * ulp / 2, 1 + ulp * 0.51, 1 - ulp / 8, 3e38, -0.0])
    identity = torch.eye(32).bfloat16()
    assert torch.equal(MatrixUnitLinear(identity)(x), x.bfloat16().float())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(weight: Tensor, wrong: float) -> None:
    linear, x = MatrixUnitLinear(weight), torch.randn(40, 576)
    expected = linear(x)
    x[17, 3] = wrong
    product = linear(x)
    assert not product[17].isfinite().any()
    others = torch.arange(40) != 17
    assert torch.equal(product[others], expected[others])


def test_a_row_is_bit_for_bit_the_same_in_any_batch(weight: Tensor) -> None:
    linear, x = MatrixUnitLinear(weight), torch.randn(300, 576)
    together = linear(x)
    for first, stop in ((0, 1), (1, 3), (299, 300), (0, 64), (7, 290)):
        assert torch.equal(linear(x[first:stop]), together[first:stop])


def test_a_part_of_a_wider_projection_is_multiplied_by_itself(weight: Tensor) -> None:
    wide = torch.randn(5, 600)
    linear = MatrixUnitLinear(weight)
    part = wide[:, 8:584]
    assert torch.equal(linear(part), linear(part.clone()))


def test_other_libraries_find_the_units_as_they_left_them(weight: Tensor) -> None:
    x, ours = torch.randn(64, 576), MatrixUnitLinear(weight)
    expected = functional.linear(x.bfloat16(), weight)
    for _ in range(3):
        product = ours(x)
        assert torch.equal(functional.linear(x.bfloat16(), weight), expected)
        assert torch.equal(ours(x), product)


# --- experts ---------------------------------------------------------------------------------


def expert_weights() -> tuple[Tensor, Tensor]:
    """Gate above up, and down."""
    return (
        (torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5).bfloat16(),
        (torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5).bfloat16(),
    )


def rounded_sum(
    x: Tensor, experts: Tensor, shares: Tensor, gate_and_up: Tensor, down: Tensor
) -> Tensor:
    """The plain sum of what a token's experts make of it, each operand rounded to bf16."""
    output = torch.zeros(x.shape, dtype=torch.float64)
    tokens = x.bfloat16().double()
    for token in range(x.shape[0]):
        for expert, share in zip(experts[token].tolist(), shares[token].tolist(), strict=True):
            gate, up = (gate_and_up[expert].double() @ tokens[token]).chunk(2)
            hidden = (functional.silu(gate) * up).float().bfloat16().double()
            output[token] += share * (down[expert].double() @ hidden)
    return output


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 120),
    among=st.sets(st.integers(0, EXPERTS - 1), min_size=CHOICES),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_any_choice_is_the_plain_sum(tokens: int, among: set[int], threads: int, seed: int) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    gate_and_up, down = expert_weights()
    order = torch.rand(tokens, len(among)).argsort(dim=-1)[:, :CHOICES]
    x, experts = torch.randn(tokens, HIDDEN), torch.tensor(sorted(among))[order]
    shares = torch.rand(tokens, CHOICES)
    output = MatrixUnitExperts(gate_and_up, down)(x, experts, shares)
    expected = rounded_sum(x, experts, shares, gate_and_up, down)
    # Of sums that fp32 and fp64 round to different bf16, a few thousandths remain.
    torch.testing.assert_close(output.double(), expected, rtol=1e-2, atol=1e-2)


def test_what_experts_make_of_a_token_is_bit_for_bit_the_same_in_any_batch() -> None:
    made = MatrixUnitExperts(*expert_weights())
    x, experts = torch.randn(90, HIDDEN), torch.rand(90, EXPERTS).argsort(dim=-1)[:, :CHOICES]
    shares = torch.rand(90, CHOICES)
    together = made(x, experts, shares)
    for rows in (slice(0, 1), slice(3, 10), slice(20, 80), slice(89, 90)):
        assert torch.equal(made(x[rows], experts[rows], shares[rows]), together[rows])


# --- attention -------------------------------------------------------------------------------

HEADS, NOPE, ROPE, RANK, VALUE = 3, 32, 16, 64, 64
SCALE = (NOPE + ROPE) ** -0.5
ATTENTION_ERROR = 0.01
"""Relative; a bf16 number has 8 significant bits."""

REQUESTS = [
    ([150], [0]),
    ([200], [64]),
    ([250], [50]),
    ([1100], [70]),
    ([9, 130, 1], [130, 64, 63]),
]
"""New tokens, and tokens before them, of the requests of a batch."""


def attention_operands(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, a pool full of latents, the expansion to keys and values."""
    queries = torch.randn(tokens, HEADS, NOPE + ROPE)
    return (
        queries[..., :NOPE],
        queries[..., NOPE:],
        torch.randn(ROWS, RANK + ROPE),
        torch.randn(HEADS, NOPE + VALUE, RANK) / RANK**0.5,
    )


@pytest.mark.parametrize(("counts", "seen"), REQUESTS, ids=str)
def test_attention_is_that_of_fp32_but_for_rounding(counts: list[int], seen: list[int]) -> None:
    batch = scattered(counts, seen)
    operands = attention_operands(batch.rows)
    expected = mla.latent_attention(*operands, SCALE, batch)
    output = latent_attention(*operands, SCALE, batch)
    assert (output - expected).norm() < ATTENTION_ERROR * expected.norm()
    worst = (output - expected).abs().max() / expected.abs().max()
    assert 0 < worst < 2 * ATTENTION_ERROR


@settings(max_examples=30, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 200), st.integers(0, 300)), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_so_it_is_for_any_requests(requests: list[tuple[int, int]], seed: int) -> None:
    counts, seen = zip(*requests, strict=True)
    batch = scattered(counts, seen, seed)
    operands = attention_operands(batch.rows)
    expected = mla.latent_attention(*operands, SCALE, batch)
    output = latent_attention(*operands, SCALE, batch)
    assert (output - expected).norm() < ATTENTION_ERROR * expected.norm()


def test_how_a_prompt_is_cut_and_by_how_many_threads_changes_no_bit() -> None:
    q_nope, q_rope, latents, up = attention_operands(700)
    placement = Placement(0, tuple(range(15)))
    whole = latent_attention(
        q_nope, q_rope, latents, up, SCALE, Batch.pack([700], [200], [placement])
    )
    for cut, threads in ((250, 1), (333, 3)):
        torch.set_num_threads(threads)
        for first, stop in ((0, cut), (cut, 700)):
            part = Batch.pack([stop - first], [200 + first], [placement])
            rows = slice(first, stop)
            output = latent_attention(q_nope[rows], q_rope[rows], latents, up, SCALE, part)
            assert torch.equal(output, whole[rows])


def test_latents_behind_a_prompt_are_not_looked_at() -> None:
    q_nope, q_rope, latents, up = attention_operands(130)
    batch = Batch.pack([130], [0], [Placement(0, (0, 1, 2))])
    expected = latent_attention(q_nope, q_rope, latents, up, SCALE, batch)
    latents[130:] = torch.nan
    assert torch.equal(latent_attention(q_nope, q_rope, latents, up, SCALE, batch), expected)


def test_heads_that_are_not_made_of_whole_tiles_are_attended_without_units() -> None:
    queries, up = torch.randn(130, 2, 40), torch.randn(2, 24 + 32, 64)
    operands = queries[..., :24], queries[..., 24:], torch.randn(ROWS, 64 + 16), up
    batch = Batch.pack([130], [0], [Placement(0, (0, 1, 2))])
    expected = mla.latent_attention(*operands, SCALE, batch)
    assert torch.equal(latent_attention(*operands, SCALE, batch), expected)
