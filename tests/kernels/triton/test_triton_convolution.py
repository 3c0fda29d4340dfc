"""The convolution kernels give each request the plain sum and advance its state and no other."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from shared.kernels import reference
from shared.kernels.triton.convolution import (
    convolution_step,
    short_convolution,
)

CHANNELS = 136  # one block and a part of the next
TAPS = 3
SLOTS = 6
# Triton's interpreter cuts off what a GPU rounds to nearest.
BF16_STEP = 2**-7

LENGTHS = [(1,), (2,), (3,), (4,), (5,), (63,), (64,), (65,), (130,), (1, 2, 3, 4, 65), (5, 1)]


def int32(values: list[int], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def inputs_of(tokens: int, device: str, dtype: torch.dtype, channels: int = CHANNELS) -> Tensor:
    """Part of a wider projection, so that rows are further apart than they are long."""
    return torch.randn(tokens, 2 * channels, device=device).to(dtype)[:, :channels]


def convolve(
    x: Tensor,
    weight: Tensor,
    states: Tensor,
    lengths: tuple[int, ...],
    slots: list[int],
) -> Tensor:
    bounds = int32([0, *accumulate(lengths)], str(x.device))
    return short_convolution(x, weight, states, bounds, int32(slots, str(x.device)), max(lengths))


def plain(
    x: Tensor,
    weight: Tensor,
    states: Tensor,
    lengths: tuple[int, ...],
    slots: list[int],
) -> tuple[Tensor, Tensor]:
    """The plain form for each request by itself: outputs in fp32, and all states after them."""
    outputs, after = [], states.clone()
    for rows, slot in zip(torch.split(x, list(lengths)), slots, strict=True):
        output, state = reference.short_convolution(
            rows.float(), weight.float(), states[slot].float()
        )
        after[slot] = state.to(states.dtype)
        outputs.append(output)
    return torch.cat(outputs), after


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_prefill_is_the_plain_sum_for_each_request(lengths: tuple[int, ...], device: str) -> None:
    slots = [3, 0, 5, 1, 4][: len(lengths)]
    x = inputs_of(sum(lengths), device, torch.float32)
    weight = torch.randn(TAPS + 1, CHANNELS, device=device)
    states = torch.randn(SLOTS, TAPS, CHANNELS, device=device)
    expected, expected_states = plain(x, weight, states, lengths, slots)
    torch.testing.assert_close(convolve(x, weight, states, lengths, slots), expected)
    assert torch.equal(states, expected_states)  # those of other slots are as they were


def test_prefill_in_bf16_rounds_nothing_but_the_outputs(device: str) -> None:
    lengths, slots = (20, 2, 33), [2, 4, 1]
    x = inputs_of(sum(lengths), device, torch.bfloat16)
    weight = torch.randn(TAPS + 1, CHANNELS, device=device).bfloat16()
    states = torch.randn(SLOTS, TAPS, CHANNELS, device=device).bfloat16()
    expected, expected_states = plain(x, weight, states, lengths, slots)
    output = convolve(x, weight, states, lengths, slots)
    torch.testing.assert_close(output.float(), expected, rtol=BF16_STEP, atol=1e-5)
    assert torch.equal(states, expected_states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_decode_step_is_a_prefill_of_one_token(dtype: torch.dtype, device: str) -> None:
    slots = [5, 2, 3]
    x = inputs_of(3, device, dtype)
    weight = torch.randn(TAPS + 1, CHANNELS, device=device).to(dtype)
    states = torch.randn(SLOTS, TAPS, CHANNELS, device=device).to(dtype)
    prefilled = states.clone()
    expected = convolve(x, weight, prefilled, (1, 1, 1), slots)
    output = convolution_step(x, weight, states, int32(slots, device))
    torch.testing.assert_close(output, expected)
    assert torch.equal(states, prefilled)


@pytest.mark.parametrize("cut", [1, 2, 3, 16, 17])
def test_a_sequence_may_be_cut_anywhere(cut: int, device: str) -> None:
    x, weight = inputs_of(20, device, torch.float32), torch.randn(TAPS + 1, CHANNELS, device=device)
    whole_states, states = torch.zeros(2, SLOTS, TAPS, CHANNELS, device=device).unbind()
    whole = convolve(x, weight, whole_states, (20,), [4])
    pieces = [
        convolve(piece, weight, states, (piece.shape[0],), [4])
        for piece in torch.split(x, [cut, 20 - cut])
    ]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(states, whole_states)


@pytest.mark.gpu
def test_it_runs_at_the_published_shape(device: str) -> None:
    channels, lengths, slots = 3 * 32 * 128, (4096, 1, 1000), [0, 5, 2]
    x = inputs_of(sum(lengths), device, torch.bfloat16, channels)
    weight = torch.randn(TAPS + 1, channels, device=device).bfloat16()
    states = torch.randn(SLOTS, TAPS, channels, device=device).bfloat16()
    expected, expected_states = plain(x, weight, states, lengths, slots)
    output = convolve(x, weight, states, lengths, slots)
    torch.testing.assert_close(output.float(), expected, rtol=BF16_STEP, atol=1e-5)
    assert torch.equal(states, expected_states)
    x = inputs_of(3, device, torch.bfloat16, channels)
    expected, expected_states = plain(x, weight, states, (1, 1, 1), slots)
    output = convolution_step(x, weight, states, int32(slots, device))
    torch.testing.assert_close(output.float(), expected, rtol=BF16_STEP, atol=1e-5)
    assert torch.equal(states, expected_states)
