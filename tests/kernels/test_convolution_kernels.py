"""Queries, keys and values come from exactly the inputs before a token, across any cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from shared.kernels import reference
from shared.kernels.batch import Batch
from shared.kernels.cpu.convolution import convolved_heads
from tests.kernels.packing import SLOTS, other_slots, scattered

HEADS, WIDTH = 2, 5
CHANNELS = 3 * HEADS * WIDTH
TAPS = 3
EPSILON = 1e-6


def random_states() -> Tensor:
    return torch.randn(SLOTS, TAPS, CHANNELS)


def heads_of(x: Tensor, weight: Tensor, states: Tensor, batch: Batch) -> Tensor:
    return convolved_heads(x, weight, states, batch, HEADS, EPSILON)


def activated(convolved: Tensor) -> Tensor:
    """SiLU, then heads, the queries and keys of which are normalised."""
    heads = functional.silu(convolved).view(-1, 3, HEADS, WIDTH)
    lengths = (heads[:, :2].square().sum(-1, keepdim=True) + EPSILON).sqrt()
    return torch.cat((heads[:, :2] / lengths, heads[:, 2:]), dim=1)


def expected_of(x: Tensor, weight: Tensor, states: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The plain form for each request by itself: heads, and all states after them."""
    outputs, after = [], states.clone()
    for part in batch.parts:
        slot = part.placement.slot
        output, after[slot] = reference.short_convolution(
            x[part.start : part.stop], weight, states[slot]
        )
        outputs.append(output)
    return activated(torch.cat(outputs)), after


@pytest.mark.parametrize(
    "counts", [(1,), (2,), (3,), (4,), (50,), (1, 2, 3, 4, 50), (5, 1), (1, 1, 1)], ids=str
)
def test_it_is_the_plain_sum_for_each_request(counts: tuple[int, ...]) -> None:
    batch, weight, states = scattered(counts), torch.randn(TAPS + 1, CHANNELS), random_states()
    x = torch.randn(batch.rows, 2 * CHANNELS)[:, :CHANNELS]  # as a part of a wider projection
    expected, expected_states = expected_of(x, weight, states, batch)
    untouched = states[other_slots(batch)].clone()
    torch.testing.assert_close(heads_of(x, weight, states, batch), expected)
    assert torch.equal(states, expected_states)
    assert torch.equal(states[other_slots(batch)], untouched)


def test_without_earlier_inputs_it_is_a_causal_depthwise_convolution() -> None:
    x, weight = torch.randn(20, CHANNELS), torch.randn(TAPS + 1, CHANNELS)
    padded = functional.pad(x.T, (TAPS, 0))
    expected = functional.conv1d(padded, weight.T.unsqueeze(1), groups=CHANNELS).T
    output = heads_of(x, weight, torch.zeros(SLOTS, TAPS, CHANNELS), scattered([20]))
    torch.testing.assert_close(output, activated(expected))


@settings(max_examples=50, deadline=None)
@given(
    cuts=st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=3), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
)
def test_sequences_may_be_cut_anywhere_each_in_its_own_way(
    cuts: list[list[int]], seed: int
) -> None:
    """`cuts[n]` are the tokens that three requests get in the n-th batch."""
    totals = [sum(counts) for counts in zip(*cuts, strict=True)]
    sequences = [torch.randn(total, CHANNELS) for total in totals]
    weight, states = torch.randn(TAPS + 1, CHANNELS), random_states()
    whole = scattered(totals, seed=seed)
    expected, expected_states = expected_of(torch.cat(sequences), weight, states, whole)
    pieces: list[list[Tensor]] = [[], [], []]
    done = [0, 0, 0]
    for counts in cuts:
        batch = scattered(counts, seed=seed)
        x = [
            sequence[start : start + count]
            for sequence, start, count in zip(sequences, done, counts, strict=True)
        ]
        output = heads_of(torch.cat(x), weight, states, batch)
        for request, piece in enumerate(torch.split(output, counts)):
            pieces[request].append(piece)
        done = [start + count for start, count in zip(done, counts, strict=True)]
    torch.testing.assert_close(torch.cat([torch.cat(one) for one in pieces]), expected)
    assert torch.equal(states, expected_states)


def test_decode_steps_continue_a_prefill() -> None:
    x, weight = torch.randn(2, 20, CHANNELS), torch.randn(TAPS + 1, CHANNELS)
    whole_states, states = torch.zeros(2, SLOTS, TAPS, CHANNELS).unbind()
    whole = heads_of(x.flatten(0, 1), weight, whole_states, scattered([20, 20]))
    heads_of(x[:, :5].flatten(0, 1), weight, states, scattered([5, 5]))
    for t in range(5, 20):
        output = heads_of(x[:, t], weight, states, scattered([1, 1]))
        torch.testing.assert_close(output, whole.view(2, 20, *whole.shape[1:])[:, t])
    assert torch.equal(states, whole_states)
