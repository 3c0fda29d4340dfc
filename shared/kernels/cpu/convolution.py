"""The short causal convolutions before KDA, as multiply-adds in the layout of the activations."""

from collections.abc import Sequence

import torch
from torch import Tensor


def short_convolution(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution as shifted multiply-adds in the layout of the activations.

    Args and results are those of `reference.short_convolution`.
    """
    tokens, taps = x.shape[0], state.shape[0]
    inputs = torch.cat((state, x))
    output = x * weight[taps]
    for tap in range(taps):
        output.addcmul_(inputs[tap : tap + tokens], weight[tap])
    return output, inputs[tokens:]


def short_convolution_step(x: Tensor, weight: Tensor, states: Sequence[Tensor]) -> Tensor:
    """One token of the convolution for each of B requests.

    Args:
        x: `[B, C]`.
        weight: `[taps + 1, C]`.
        states: B tensors `[taps, C]`, oldest input first; advanced in place.

    Returns:
        `[B, C]`.
    """
    window = torch.cat((torch.stack(list(states)), x.unsqueeze(1)), dim=1)
    for state, inputs in zip(states, window, strict=True):
        state.copy_(inputs[1:])
    return (window * weight).sum(dim=1)
