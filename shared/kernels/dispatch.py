"""The one place that chooses an implementation of the kernels, once, when a model is loaded."""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from shared.errors import UnsupportedDeviceError
from shared.kernels.cpu.captured_step import CapturedStep
from shared.kernels.cpu.embedding import EmbeddingRows
from shared.kernels.cpu.expert_choice import choose_experts
from shared.kernels.cpu.feed_forward import DenseFeedForward, TiledExperts
from shared.kernels.cpu.kda import kda
from shared.kernels.cpu.latents import store_latents
from shared.kernels.cpu.linear import TiledLinear
from shared.kernels.cpu.matrix import Matrix
from shared.kernels.cpu.matrix_units import mla as matrix_units_mla
from shared.kernels.cpu.matrix_units.feed_forward import MatrixUnitExperts
from shared.kernels.cpu.matrix_units.linear import MatrixUnitLinear, fits_units, has_matrix_units
from shared.kernels.cpu.mla import latent_attention
from shared.kernels.cpu.normalization import add_rms_norm, rms_norm
from shared.kernels.dtypes import WeightDType
from shared.kernels.interface import Kernels
from shared.kernels.linear import Experts, Linear

AUTOMATIC: Final[WeightDType] = "bfloat16"
"""What `auto` is on every device: the width of the published weights, so nothing is rounded, with
half of what fp32 reads from memory. Matrix units (AMX, tensor cores) round activations to it too;
on other processors they are fp32. int8 rounds the weights, and has to be asked for."""


def kernels_for(device_type: str, dtype: WeightDType) -> Kernels:
    """Choose the kernels for a device and a width of the weights.

    Raises:
        UnsupportedDeviceError: there are none for this device, or not for this width on it, or the
            machine has no such device.
    """
    if device_type == "cpu":
        return _MATRIX_UNITS if dtype == "bfloat16" and has_matrix_units() else _CPU[dtype]
    if device_type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedDeviceError("device: torch finds no CUDA device on this machine")
    if device_type == "cuda":
        # Imported here: Triton is needed, and to be had, with a GPU only.
        from shared.kernels.triton.kernels import triton_kernels  # noqa: PLC0415

        return triton_kernels(dtype)
    raise UnsupportedDeviceError(f"device: there are no kernels for a {device_type!r} device")


def _compiled(
    dtype: torch.dtype,
    linear: Callable[[Tensor], Linear],
    experts: Callable[[Tensor, Tensor], Experts],
) -> Kernels:
    """Kernels for weights that are loaded in a dtype, and what multiplies them."""
    return Kernels(
        loaded_dtype=dtype,
        activation_dtype=torch.float32,
        state_dtype="float32",
        embedding=EmbeddingRows,
        linear=linear,
        choose_experts=choose_experts,
        experts=experts,
        feed_forward=lambda gate_and_up, down: DenseFeedForward(
            experts(gate_and_up.unsqueeze(0), down.unsqueeze(0))
        ),
        kda=kda,
        store_latents=store_latents,
        latent_attention=latent_attention,
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        captured=CapturedStep,
    )


def _tiled(dtype: torch.dtype, form: Callable[[Tensor], Matrix]) -> Kernels:
    """Kernels for weights in a form of `Matrix`."""
    return _compiled(
        dtype,
        lambda weight: TiledLinear(form(weight)),
        lambda gate_and_up, down: TiledExperts(gate_and_up, down, form),
    )


_CPU: Final[dict[WeightDType, Kernels]] = {
    "float32": _tiled(torch.float32, Matrix.of),
    "bfloat16": _tiled(torch.bfloat16, Matrix.of),
    "int8": _tiled(torch.float32, Matrix.rounded),
}


def _linear_on_units(weight: Tensor) -> Linear:
    return MatrixUnitLinear(weight) if fits_units(weight) else _CPU["bfloat16"].linear(weight)


def _experts_on_units(gate_and_up: Tensor, down: Tensor) -> Experts:
    fit = fits_units(gate_and_up) and fits_units(down)
    return (MatrixUnitExperts if fit else _CPU["bfloat16"].experts)(gate_and_up, down)


_MATRIX_UNITS: Final = replace(
    _compiled(torch.bfloat16, _linear_on_units, _experts_on_units),
    latent_attention=matrix_units_mla.latent_attention,
)
"""bf16 on processors that have units for products of such matrices."""
