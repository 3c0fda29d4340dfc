"""The short causal convolutions before KDA, as multiply-adds in the layout of the activations."""

import torch
from torch import Tensor

from shared.kernels.batch import Batch


def short_convolution(x: Tensor, weight: Tensor, states: Tensor, batch: Batch) -> Tensor:
    """Causal depthwise convolution of each request's tokens, continued from its last inputs.

    Args:
        x: `[T, C]`.
        weight: `[taps + 1, C]`; its last row weighs the token itself.
        states: `[slots, taps, C]`, oldest input first; those of the batch advance in place.
        batch: of T tokens.

    Returns:
        `[T, C]`.
    """
    if batch.is_decode:
        return _step(x, weight, states, batch.slots)
    output = torch.empty(x.shape, dtype=x.dtype)
    for part in batch.parts:
        rows = slice(part.start, part.stop)
        _continue(x[rows], weight, states[part.placement.slot], output[rows])
    return output


def _continue(x: Tensor, weight: Tensor, state: Tensor, output: Tensor) -> None:
    """The tokens of one request: each tap is a product of shifted rows."""
    tokens, taps = x.shape[0], state.shape[0]
    torch.mul(x, weight[taps], out=output)
    head = torch.cat((state, x[:taps]))
    for tap in range(taps):
        distance = taps - tap
        near = min(distance, tokens)
        output[:near].addcmul_(head[tap : tap + near], weight[tap])
        output[near:].addcmul_(x[: tokens - near], weight[tap])
    state.copy_(head[tokens:] if tokens < taps else x[tokens - taps :])


def _step(x: Tensor, weight: Tensor, states: Tensor, slots: Tensor) -> Tensor:
    """One token of each of B requests."""
    window = torch.cat((states[slots], x.unsqueeze(1)), dim=1)
    states.index_copy_(0, slots, window[:, 1:])
    return (window * weight).sum(dim=1)
