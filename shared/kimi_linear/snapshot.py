"""The part of a request's state that is valid at exactly one length."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class KdaSnapshot:
    """State of all KDA layers after `length` tokens."""

    length: int
    recurrent: Tensor
    """`[kda_layers, heads, K, V]`, fp32."""
    convolution: Tensor
    """`[kda_layers, 3 * heads * K, taps]`: last inputs of the convolutions, oldest first."""
