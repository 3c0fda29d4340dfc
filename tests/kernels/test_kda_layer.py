"""A decode step of a KDA layer, all at once, is what its operations make one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from shared.kernels import reference
from shared.kernels.batch import Batch
from shared.kernels.cpu.kda import OPERATIONS, kda
from shared.kernels.kda_layer import L2_EPSILON, KdaConstants, KdaInputs, KdaStates
from tests.kernels.packing import SLOTS, other_slots, scattered

TAPS, EPSILON = 3, 1e-5


def constants(heads: int, channels: int) -> KdaConstants:
    width = heads * channels
    return KdaConstants(
        heads=heads,
        convolution=torch.randn(TAPS + 1, 3 * width) / 2,
        decay_bias=torch.randn(width),
        decay_rate=-torch.rand(heads) * 4,
        norm=torch.rand(channels) + 0.5,
        epsilon=EPSILON,
    )


def inputs(tokens: int, heads: int, channels: int) -> KdaInputs:
    """Parts of one projection, as a layer has them, and what is raised from it."""
    width = heads * channels
    projected = torch.randn(tokens, 3 * width + heads + 5)
    return KdaInputs(
        heads=projected[:, : 3 * width],
        decays=torch.randn(tokens, width),
        steps=projected[:, 3 * width : 3 * width + heads],
        gate=torch.randn(tokens, width),
    )


def states(heads: int, channels: int) -> KdaStates:
    width = 3 * heads * channels
    return KdaStates(torch.randn(SLOTS, TAPS, width), torch.randn(SLOTS, heads, channels, channels))


def copied(pool: KdaStates) -> KdaStates:
    return KdaStates(pool.convolution.clone(), pool.recurrent.clone())


def rows_of(whole: KdaInputs, rows: slice) -> KdaInputs:
    return KdaInputs(whole.heads[rows], whole.decays[rows], whole.steps[rows], whole.gate[rows])


def plainly(
    one: KdaInputs, of: KdaConstants, convolution: Tensor, recurrent: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A token of one request by the reference, fp64: output and states."""
    heads, width = of.heads, one.decays.shape[1]
    convolved, kept = reference.short_convolution(
        one.heads.double(), of.convolution.double(), convolution.double()
    )
    q, k, v = functional.silu(convolved).view(1, 3, heads, -1).unbind(dim=1)
    q, k = (x * (x.square().sum(-1, keepdim=True) + L2_EPSILON).rsqrt() for x in (q, k))
    g, beta = reference.decays_and_steps(
        one.decays.double(), one.steps.double(), of.decay_bias.double(), of.decay_rate.double()
    )
    q, k, v, g, beta, initial = (x.double().unsqueeze(0) for x in (q, k, v, g, beta, recurrent))
    o, state = reference.kda_recurrence(q, k, v, g, beta, initial)
    normalised = functional.rms_norm(o[0, 0], o.shape[-1:], of.norm.double(), EPSILON)
    gated = normalised * torch.sigmoid(one.gate.double()).view(heads, -1)
    return gated.view(1, width), kept, state[0]


@settings(max_examples=20, deadline=None)
@given(
    requests=st.integers(1, 4),
    heads=st.integers(1, 4),
    channels=st.sampled_from([4, 20, 33, 70, 128]),
    seed=st.integers(0, 2**16),
)
def test_a_step_is_the_reference_for_each_request(
    requests: int, heads: int, channels: int, seed: int
) -> None:
    batch = scattered([1] * requests, seed=seed)
    given_inputs, of = inputs(requests, heads, channels), constants(heads, channels)
    pool = states(heads, channels)
    before = copied(pool)
    found = kda(given_inputs, of, pool, batch)
    for request, slot in enumerate(batch.slots.tolist()):
        one = rows_of(given_inputs, slice(request, request + 1))
        output, kept, state = plainly(one, of, before.convolution[slot], before.recurrent[slot])
        torch.testing.assert_close(found[request].double(), output[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pool.convolution[slot].double(), kept)
        torch.testing.assert_close(pool.recurrent[slot].double(), state, rtol=1e-4, atol=1e-5)
    others = other_slots(batch)
    assert torch.equal(pool.convolution[others], before.convolution[others])
    assert torch.equal(pool.recurrent[others], before.recurrent[others])


def test_a_step_is_what_the_operations_make_of_it() -> None:
    batch = scattered([1, 1, 1])
    given_inputs, of, pool = inputs(3, 2, 32), constants(2, 32), states(2, 32)
    other_pool = copied(pool)
    one_by_one = OPERATIONS(given_inputs, of, other_pool, batch)
    torch.testing.assert_close(kda(given_inputs, of, pool, batch), one_by_one)
    assert torch.equal(pool.convolution, other_pool.convolution)
    torch.testing.assert_close(pool.recurrent, other_pool.recurrent)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_request_in_a_step_is_bit_for_bit_what_it_is_alone(threads: int) -> None:
    torch.set_num_threads(threads)
    batch = scattered([1, 1, 1])
    given_inputs, of, pool = inputs(3, 3, 40), constants(3, 40), states(3, 40)
    pool_alone = copied(pool)
    together = kda(given_inputs, of, pool, batch)
    for request, part in enumerate(batch.parts):
        row = slice(request, request + 1)
        alone = Batch.pack([1], [0], [part.placement])
        assert torch.equal(kda(rows_of(given_inputs, row), of, pool_alone, alone), together[row])
    assert torch.equal(pool_alone.recurrent, pool.recurrent)
    assert torch.equal(pool_alone.convolution, pool.convolution)
