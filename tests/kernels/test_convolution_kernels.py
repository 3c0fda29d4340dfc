"""The short convolution sees exactly the inputs before a token, across any cut of the sequence."""

import pytest
import torch
from torch.nn import functional

from shared.kernels import reference
from shared.kernels.cpu.convolution import short_convolution, short_convolution_step

CHANNELS = 12
TAPS = 3


@pytest.fixture(autouse=True)
def one_thread_and_the_same_operands_every_time() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 50])
def test_it_is_the_plain_sum(tokens: int) -> None:
    x, weight = torch.randn(tokens, CHANNELS), torch.randn(TAPS + 1, CHANNELS)
    state = torch.randn(TAPS, CHANNELS)
    expected, expected_state = reference.short_convolution(x, weight, state)
    output, final = short_convolution(x, weight, state)
    torch.testing.assert_close(output, expected)
    assert torch.equal(final, expected_state)


def test_without_earlier_inputs_it_is_a_causal_depthwise_convolution() -> None:
    x, weight = torch.randn(20, CHANNELS), torch.randn(TAPS + 1, CHANNELS)
    padded = functional.pad(x.T, (TAPS, 0))
    expected = functional.conv1d(padded, weight.T.unsqueeze(1), groups=CHANNELS).T
    output, _ = short_convolution(x, weight, torch.zeros(TAPS, CHANNELS))
    torch.testing.assert_close(output, expected)


def test_decode_steps_continue_a_prefill() -> None:
    x, weight = torch.randn(2, 20, CHANNELS), torch.randn(TAPS + 1, CHANNELS)
    nothing = torch.zeros(TAPS, CHANNELS)
    whole = [short_convolution(sequence, weight, nothing) for sequence in x]
    states = [short_convolution(sequence[:5], weight, nothing)[1].clone() for sequence in x]
    for t in range(5, 20):
        output = short_convolution_step(x[:, t], weight, states)
        torch.testing.assert_close(output, torch.stack([expected[t] for expected, _ in whole]))
    for state, (_, final) in zip(states, whole, strict=True):
        assert torch.equal(state, final)
