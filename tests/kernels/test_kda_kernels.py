"""Every form of Kimi Delta Attention computes the recurrence, whatever the decay."""

from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from shared.kernels.batch import Batch
from shared.kernels.cpu.compiled import kernel
from shared.kernels.cpu.kda import delta_rule
from shared.kernels.cpu.kda_decode import attend_head
from shared.kernels.cpu.kda_prefill import CHUNK
from shared.kernels.reference import kda_recurrence
from tests.kernels.packing import SLOTS, other_slots, scattered

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

Floats = NDArray[np.float32]
KdaForm = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """The kernel over whole sequences, packed, in the signature of the recurrence."""
    batch = scattered([q.shape[1]] * q.shape[0])
    states = in_pool(initial_state, batch)
    q_rows, k_rows, v_rows, g_rows, beta_rows = (x.flatten(0, 1) for x in (q, k, v, g, beta))
    o = delta_rule(q_rows, k_rows, v_rows, g_rows, beta_rows, states, batch)
    return o.view(*q.shape[:2], *o.shape[1:]), states[batch.slots]


def step_by_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """What decode does for a head, a token at a time."""
    states, o = initial_state.float().clone(), torch.empty(v.shape)
    queries, keys, values, decays, steps = (x.float().numpy() for x in (q, k, v, g, beta))
    attend_heads(queries, keys, values, decays, steps, states.numpy(), o.numpy())
    return o, states


@kernel
def attend_heads(
    q: Floats, k: Floats, v: Floats, g: Floats, beta: Floats, states: Floats, o: Floats
) -> None:
    for request in numba.prange(q.shape[0]):
        for head in range(q.shape[2]):
            own, following = states[request, head], states[request, (head + 1) % q.shape[2]]
            scratch = np.empty(3 * own.shape[0] + 2 * own.shape[1], np.float32)
            for t in range(q.shape[1]):
                attend_head(
                    q[request, t, head],
                    k[request, t, head],
                    v[request, t, head],
                    g[request, t, head],
                    beta[request, t, head],
                    own,
                    following,
                    scratch,
                    o[request, t, head],
                )


def in_pool(initial_state: Tensor, batch: Batch) -> Tensor:
    """States `[B, H, K, V]` in the slots of a batch, and others around them."""
    states = torch.randn(SLOTS, *initial_state.shape[1:])
    states[batch.slots] = initial_state.float()
    return states


def load_case(case: str) -> tuple[Operands, Tensor, Tensor]:
    with np.load(REFERENCE) as arrays:
        read = {
            name: torch.from_numpy(arrays[f"{case}/{name}"])
            for name in ("q", "k", "v", "g", "beta", "initial_state", "o", "final_state")
        }
    *operands, o, final_state = read.values()
    q, k, v, g, beta, initial_state = operands
    return (q, k, v, g, beta, initial_state), o, final_state


def random_operands(
    *,
    tokens: int,
    decay: float,
    batch: int = 1,
    heads: int = 2,
    key: int = 16,
    value: int = 24,
    seed: int = 0,
) -> Operands:
    generator = torch.Generator().manual_seed(seed)

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
@pytest.mark.parametrize("form", [kda_recurrence, chunked, step_by_step])
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
    o, state = chunked(*operands)
    torch.testing.assert_close(o.double(), expected_o, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.double(), expected_state, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(1, 140), min_size=1, max_size=4),
    decay=st.sampled_from([0.01, 1.0, 500.0]),
    seed=st.integers(0, 2**16),
)
def test_packed_requests_are_each_computed_as_alone(
    counts: list[int], decay: float, seed: int
) -> None:
    batch = scattered(counts, seed=seed)
    (q, k, v, g, beta, _) = (
        x[0] for x in random_operands(tokens=batch.rows, decay=decay, seed=seed)
    )
    states = torch.randn(SLOTS, *q.shape[1:], v.shape[-1])
    before = states.clone()
    o = delta_rule(q, k, v, g, beta, states, batch)
    for part in batch.parts:
        rows, slot = slice(part.start, part.stop), part.placement.slot
        one_q, one_k, one_v, one_g, one_beta, initial = (
            x.unsqueeze(0).double()
            for x in (q[rows], k[rows], v[rows], g[rows], beta[rows], before[slot])
        )
        expected_o, expected_state = kda_recurrence(one_q, one_k, one_v, one_g, one_beta, initial)
        torch.testing.assert_close(o[rows].double(), expected_o[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(states[slot].double(), expected_state[0], rtol=1e-4, atol=1e-5)
    others = other_slots(batch)
    assert torch.equal(states[others], before[others])


@pytest.mark.parametrize("form", [chunked, step_by_step])
@pytest.mark.parametrize(("key", "value"), [(4, 4), (20, 28), (33, 70), (128, 144)])
def test_heads_may_have_any_number_of_channels(form: KdaForm, key: int, value: int) -> None:
    operands = random_operands(tokens=70, decay=1.0, key=key, value=value)
    expected_o, expected_state = kda_recurrence(*(x.double() for x in operands))
    o, state = form(*operands)
    assert relative_error(o, expected_o) < TOLERANCE
    assert relative_error(state, expected_state) < TOLERANCE


def test_operands_may_be_slices_of_one_projection() -> None:
    batch = scattered([70, 1])
    projected = functional.normalize(torch.randn(batch.rows, 3, 2, 16), dim=-1)
    q, k, v = projected.unbind(dim=1)
    g, beta = -torch.rand(batch.rows, 2, 16), torch.rand(batch.rows, 2)
    states = torch.randn(SLOTS, 2, 16, 16)
    same_states = states.clone()
    o = delta_rule(q, k, v, g, beta, states, batch)
    q, k, v = (x.contiguous() for x in (q, k, v))
    assert torch.equal(delta_rule(q, k, v, g, beta, same_states, batch), o)
    assert torch.equal(same_states, states)


@pytest.mark.parametrize("split", [1, 63, 64, 65, 127, 128, 130])
def test_a_sequence_may_be_continued_at_any_token(split: int) -> None:
    q, k, v, g, beta, initial = random_operands(tokens=200, decay=1.0)
    expected_o, expected_state = chunked(q, k, v, g, beta, initial)
    head, tail = slice(split), slice(split, None)
    first, state = chunked(q[:, head], k[:, head], v[:, head], g[:, head], beta[:, head], initial)
    second, state = chunked(q[:, tail], k[:, tail], v[:, tail], g[:, tail], beta[:, tail], state)
    torch.testing.assert_close(torch.cat((first, second), dim=1), expected_o, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("split", [CHUNK, 3 * CHUNK])
def test_a_sequence_continued_where_a_chunk_begins_is_the_same_to_the_bit(split: int) -> None:
    q, k, v, g, beta, initial = random_operands(tokens=4 * CHUNK + 5, decay=1.0)
    whole, whole_state = chunked(q, k, v, g, beta, initial)
    head, tail = slice(split), slice(split, None)
    first, state = chunked(q[:, head], k[:, head], v[:, head], g[:, head], beta[:, head], initial)
    second, state = chunked(q[:, tail], k[:, tail], v[:, tail], g[:, tail], beta[:, tail], state)
    assert torch.equal(torch.cat((first, second), dim=1), whole)
    assert torch.equal(state, whole_state)


def test_a_packed_request_is_bit_for_bit_what_it_is_alone_in_any_number_of_threads() -> None:
    batch = scattered([70, 1, 33, 130])
    (q, k, v, g, beta, _) = (x[0] for x in random_operands(tokens=batch.rows, decay=1.0, heads=3))
    states = torch.randn(SLOTS, *q.shape[1:], v.shape[-1])
    states_alone = states.clone()
    torch.set_num_threads(2)
    together = delta_rule(q, k, v, g, beta, states, batch)
    torch.set_num_threads(1)
    for part in batch.parts:
        rows = slice(part.start, part.stop)
        alone = Batch.pack([part.tokens], [0], [part.placement])
        o = delta_rule(q[rows], k[rows], v[rows], g[rows], beta[rows], states_alone, alone)
        assert torch.equal(together[rows], o)
        assert torch.equal(states[part.placement.slot], states_alone[part.placement.slot])


@pytest.mark.parametrize("form", [chunked, step_by_step])
def test_a_key_that_keeps_coming_back_overwrites_its_value(form: KdaForm) -> None:
    """Without decay and with steps of one: the system that a chunk solves is at its worst."""
    _, k, v, g, beta, initial = random_operands(tokens=150, decay=0.0)
    repeated = (k, k[:, :1].expand_as(k), v, g, torch.ones_like(beta), initial)
    o, state = form(*repeated)
    expected_o, expected_state = kda_recurrence(*(x.double() for x in repeated))
    assert relative_error(o, expected_o) < TOLERANCE
    assert relative_error(state, expected_state) < TOLERANCE
    read_back = torch.einsum("bhk,bhkv->bhv", k[:, 0], state)
    torch.testing.assert_close(read_back, v[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [chunked, step_by_step])
def test_half_precision_operands_are_computed_in_fp32(form: KdaForm) -> None:
    operands = tuple(x.bfloat16() for x in random_operands(tokens=70, decay=1.0))
    o, state = form(*operands)
    expected_o, expected_state = kda_recurrence(*(x.double() for x in operands))
    assert o.dtype == state.dtype == torch.float32
    assert relative_error(o, expected_o) < TOLERANCE
    assert relative_error(state, expected_state) < TOLERANCE
