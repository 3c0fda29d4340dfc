"""The one place that chooses an implementation of the kernels, once, when a model is loaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from shared.kernels.cpu.convolution import short_convolution, short_convolution_step
from shared.kernels.cpu.kda import kda_chunked, kda_step
from shared.kernels.cpu.mla import mla_attention, mla_step

States = Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class Kernels:
    """The operations of the model that are written anew for each kind of device.

    Those for prefill take many tokens of one request and have a plain form in `reference`; those
    for decode take one token of each of several requests and advance their states in place.
    """

    kda_prefill: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """q, k, v, g, beta, initial state -> o, final state: `reference.kda_recurrence`."""
    kda_decode: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, States], Tensor]
    """q, k, v, g, beta, recurrent states -> o: `cpu.kda.kda_step`."""
    convolution_prefill: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """x, weight, state -> convolved, final state: `reference.short_convolution`."""
    convolution_decode: Callable[[Tensor, Tensor, States], Tensor]
    """x, weight, states -> convolved: `cpu.convolution.short_convolution_step`."""
    mla_prefill: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    """q_nope, q_rope, latents, key_value_up, scale -> values: `reference.mla_attention`."""
    mla_decode: Callable[[Tensor, Tensor, States, Tensor, float], Tensor]
    """q_nope, q_rope, all latents, key_value_up, scale -> values: `cpu.mla.mla_step`."""


CPU: Final = Kernels(
    kda_prefill=kda_chunked,
    kda_decode=kda_step,
    convolution_prefill=short_convolution,
    convolution_decode=short_convolution_step,
    mla_prefill=mla_attention,
    mla_decode=mla_step,
)


def kernels_for(device_type: str) -> Kernels:
    """Choose the kernels for a device.

    Raises:
        ValueError: there are none for this kind of device.
    """
    if device_type == "cpu":
        return CPU
    raise ValueError(f"there are no kernels for a {device_type!r} device")
