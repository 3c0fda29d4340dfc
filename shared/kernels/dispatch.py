"""The one place that chooses an implementation of the kernels, once, when a model is loaded."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from shared.errors import UnsupportedDeviceError
from shared.kernels.batch import Batch
from shared.kernels.cpu.convolution import short_convolution
from shared.kernels.cpu.experts import float_experts
from shared.kernels.cpu.int8 import Int8Linear, int8_experts
from shared.kernels.cpu.kda import kda
from shared.kernels.cpu.linear import float_linear
from shared.kernels.cpu.mla import latent_attention
from shared.kernels.cpu.normalization import gated_rms_norm, l2_normalize, rms_norm
from shared.kernels.dtypes import StateDType, WeightDType
from shared.kernels.linear import Experts, Linear


@dataclass(frozen=True, slots=True)
class Kernels:
    """The operations of the model that are written anew for each kind of device.

    Those that have a plain form in `reference` are tested against it.
    """

    loaded_dtype: torch.dtype
    """Of the matrices that `linear` and `experts` take."""
    activation_dtype: torch.dtype
    state_dtype: StateDType
    """Of latents and convolution states; KDA states are fp32."""
    linear: Callable[[Tensor], Linear]
    """Matrix `[outputs, inputs]` -> product; the matrix itself need not be kept."""
    experts: Callable[[Tensor, Tensor], Experts]
    """Gate above up `[E, 2 * I, hidden]`, down `[E, hidden, I]` -> experts."""
    convolution: Callable[[Tensor, Tensor, Tensor, Batch], Tensor]
    """x, weight, states, batch -> convolved: `cpu.convolution.short_convolution`."""
    kda: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Batch], Tensor]
    """q, k, v, g, beta, states, batch -> o: `cpu.kda.kda`."""
    latent_attention: Callable[[Tensor, Tensor, Tensor, Tensor, float, Batch], Tensor]
    """q_nope, q_rope, latents, key_value_up, scale, batch -> values: `cpu.mla.latent_attention`."""
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """x, weight, epsilon -> normalised."""
    gated_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    """x, gate, weight, epsilon -> normalised and gated."""
    l2_normalize: Callable[[Tensor, float], Tensor]
    """x, epsilon -> normalised."""


def kernels_for(device_type: str, dtype: WeightDType) -> Kernels:
    """Choose the kernels for a device and a width of the weights.

    Raises:
        UnsupportedDeviceError: there are none for this device, or not for this width on it, or the
            machine has no such device.
    """
    if device_type == "cpu":
        return _CPU[dtype]
    if device_type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedDeviceError("device: torch finds no CUDA device on this machine")
    if device_type == "cuda":
        # Imported here: Triton is needed, and to be had, with a GPU only.
        from shared.kernels.triton.kernels import triton_kernels  # noqa: PLC0415

        return triton_kernels(dtype)
    raise UnsupportedDeviceError(f"device: there are no kernels for a {device_type!r} device")


_CPU_FLOAT32: Final = Kernels(
    loaded_dtype=torch.float32,
    activation_dtype=torch.float32,
    state_dtype="float32",
    linear=float_linear,
    experts=float_experts,
    convolution=short_convolution,
    kda=kda,
    latent_attention=latent_attention,
    rms_norm=rms_norm,
    gated_rms_norm=gated_rms_norm,
    l2_normalize=l2_normalize,
)
_CPU: Final[dict[WeightDType, Kernels]] = {
    "float32": _CPU_FLOAT32,
    "int8": replace(_CPU_FLOAT32, linear=Int8Linear, experts=int8_experts),
    "bfloat16": replace(_CPU_FLOAT32, loaded_dtype=torch.bfloat16),
}


def fastest_dtype(device_type: str) -> WeightDType:
    """Choose by the processor: bf16 where it has matrix units for it, fp32 otherwise.

    Published weights are bf16, so neither rounds them. int8 does, and has to be asked for.
    """
    has_matrix_units = device_type != "cpu" or torch.cpu._is_amx_tile_supported()  # noqa: SLF001
    return "bfloat16" if has_matrix_units else "float32"
