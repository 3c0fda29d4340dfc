"""Every form of Kimi Delta Attention computes the recurrence, whatever the decay."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from shared.kernels.cpu.kda import kda_chunked, kda_step
from shared.kernels.reference import kda_recurrence

REFERENCE = Path(__file__).parents[1] / "reference" / "kda_ops.npz"
CASES = [
    "single_token",
    "below_chunk",
    "one_chunk",
    "over_chunk",
    "long",
    "wide_head",
    "no_decay",
    "strong_decay",
    "very_strong_decay",
]
TOLERANCE = 1e-4

KdaForm = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def step_by_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """The decode kernel over a sequence, in the signature of the recurrence."""
    state = initial_state.clone()
    outputs = [
        kda_step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], list(state))
        for t in range(q.shape[1])
    ]
    return torch.stack(outputs, dim=1), state


def load_case(case: str) -> tuple[Operands, Tensor, Tensor]:
    with np.load(REFERENCE) as arrays:
        read = {
            name: torch.from_numpy(arrays[f"{case}/{name}"])
            for name in ("q", "k", "v", "g", "beta", "initial_state", "o", "final_state")
        }
    *operands, o, final_state = read.values()
    q, k, v, g, beta, initial_state = operands
    return (q, k, v, g, beta, initial_state), o, final_state


def random_operands(*, tokens: int, decay: float, batch: int = 1, seed: int = 0) -> Operands:
    generator = torch.Generator().manual_seed(seed)
    heads, key, value = 2, 16, 24

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return (
        functional.normalize(normal(batch, tokens, heads, key), dim=-1),
        functional.normalize(normal(batch, tokens, heads, key), dim=-1),
        normal(batch, tokens, heads, value),
        -decay * torch.rand(batch, tokens, heads, key, generator=generator),
        torch.rand(batch, tokens, heads, generator=generator),
        normal(batch, heads, key, value),
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", [kda_recurrence, kda_chunked, step_by_step])
def test_every_form_agrees_with_the_float64_reference(form: KdaForm, case: str) -> None:
    operands, expected_o, expected_state = load_case(case)
    o, state = form(*operands)
    assert relative_error(o, expected_o) < TOLERANCE
    assert relative_error(state, expected_state) < TOLERANCE


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 200),
    decay=st.sampled_from([0.0, 0.01, 1.0, 20.0, 500.0]),
    seed=st.integers(0, 2**16),
)
def test_the_chunked_form_is_the_recurrence_at_any_length_and_decay(
    tokens: int, decay: float, seed: int
) -> None:
    operands = random_operands(tokens=tokens, decay=decay, batch=2, seed=seed)
    expected_o, expected_state = kda_recurrence(*(x.double() for x in operands))
    o, state = kda_chunked(*operands)
    torch.testing.assert_close(o.double(), expected_o, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.double(), expected_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("split", [1, 63, 64, 65, 127, 128, 130])
def test_a_sequence_may_be_continued_at_any_token(split: int) -> None:
    q, k, v, g, beta, initial = random_operands(tokens=200, decay=1.0)
    expected_o, expected_state = kda_chunked(q, k, v, g, beta, initial)
    head, tail = slice(split), slice(split, None)
    first, state = kda_chunked(
        q[:, head], k[:, head], v[:, head], g[:, head], beta[:, head], initial
    )
    second, state = kda_chunked(
        q[:, tail], k[:, tail], v[:, tail], g[:, tail], beta[:, tail], state
    )
    torch.testing.assert_close(torch.cat((first, second), dim=1), expected_o, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-5)


def test_prefill_leaves_the_initial_state_alone_and_decode_advances_it_in_place() -> None:
    q, k, v, g, beta, initial = random_operands(tokens=1, decay=1.0)
    before = initial.clone()
    _, final = kda_chunked(q, k, v, g, beta, initial)
    assert torch.equal(initial, before)
    kda_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0], list(initial))
    torch.testing.assert_close(initial, final)


def test_requests_in_a_decode_step_do_not_touch_each_other() -> None:
    q, k, v, g, beta, initial = random_operands(tokens=1, decay=1.0, batch=3)
    q, k, v, g, beta = (x[:, 0] for x in (q, k, v, g, beta))
    together = initial.clone()
    o = kda_step(q, k, v, g, beta, list(together))
    for request in range(3):
        alone, row = initial[request].clone(), slice(request, request + 1)
        o_alone = kda_step(q[row], k[row], v[row], g[row], beta[row], [alone])
        assert torch.equal(o[request], o_alone[0])
        assert torch.equal(together[request], alone)


def test_half_precision_operands_are_computed_in_fp32() -> None:
    operands = tuple(x.bfloat16() for x in random_operands(tokens=70, decay=1.0))
    o, state = kda_chunked(*operands)
    expected_o, expected_state = kda_recurrence(*(x.double() for x in operands))
    assert o.dtype == state.dtype == torch.float32
    assert relative_error(o, expected_o) < TOLERANCE
    assert relative_error(state, expected_state) < TOLERANCE
