"""Decays and steps of Kimi Delta Attention in compiled form."""

import numba
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shared.kernels.cpu.compiled import kernel, part
from shared.kernels.cpu.elementary import sigmoid, softplus
from shared.kernels.cpu.recording import empty
from shared.kernels.cpu.rows import dense_row

Floats = NDArray[np.float32]


def decays_and_steps(
    raised: Tensor, steps: Tensor, bias: Tensor, rate: Tensor
) -> tuple[Tensor, Tensor]:
    """See `reference.decays_and_steps`."""
    tokens, heads = steps.shape
    decays = empty(tokens, heads, raised.shape[1] // heads)
    beta = empty(tokens, heads)
    operands = (raised.numpy(), steps.numpy(), bias.numpy(), rate.numpy())
    _decays_and_steps(*operands, decays.numpy(), beta.numpy())
    return decays, beta


@kernel
def _decays_and_steps(
    raised: Floats, steps: Floats, bias: Floats, rate: Floats, decays: Floats, beta: Floats
) -> None:
    channels = decays.shape[2]
    for token in numba.prange(raised.shape[0]):
        own = dense_row(raised, token)
        for head in range(rate.shape[0]):
            beta[token, head] = sigmoid(steps[token, head])
            start = head * channels
            x, offset = own[start : start + channels], bias[start : start + channels]
            decay_channels(x, offset, rate[head], decays[token, head])


@part
def decay_channels(x: Floats, bias: Floats, rate: np.float32, g: Floats) -> None:
    """Write rate * softplus(x + bias) to g."""
    for channel in range(x.shape[0]):
        g[channel] = rate * softplus(x[channel] + bias[channel])
