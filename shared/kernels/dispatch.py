"""The one place that chooses an implementation of the kernels, once, when a model is loaded."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from shared.errors import UnsupportedDeviceError
from shared.kernels.batch import Batch
from shared.kernels.cpu.convolution import convolved_heads
from shared.kernels.cpu.decay import decays_and_steps
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
from shared.kernels.cpu.normalization import gated_rms_norm, rms_norm
from shared.kernels.dtypes import StateDType, WeightDType
from shared.kernels.expert_choice import ExpertChoice
from shared.kernels.linear import Experts, Linear

AUTOMATIC: Final[WeightDType] = "bfloat16"
"""What `auto` is on every device: the width of the published weights, so nothing is rounded, with
half of what fp32 reads from memory. Matrix units (AMX, tensor cores) round activations to it too;
on other processors they are fp32. int8 rounds the weights, and has to be asked for."""


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
    choose_experts: Callable[[Tensor, Tensor, Tensor, ExpertChoice], tuple[Tensor, Tensor]]
    """x, router, bias, choice -> experts, shares: `expert_choice.choose_experts`."""
    experts: Callable[[Tensor, Tensor], Experts]
    """Gate above up `[E, 2 * I, hidden]`, down `[E, hidden, I]` -> experts."""
    feed_forward: Callable[[Tensor, Tensor], Linear]
    """Gate above up `[2 * I, hidden]`, down `[hidden, I]` -> down(silu(gate x) * up x)."""
    convolved_heads: Callable[[Tensor, Tensor, Tensor, Batch, int, float], Tensor]
    """x, weight, states, batch, H, epsilon -> q, k, v: `cpu.convolution.convolved_heads`."""
    decays_and_steps: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """raised, steps, bias, rate -> g, beta: `reference.decays_and_steps`."""
    kda: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Batch], Tensor]
    """q, k, v, g, beta, states, batch -> o: `cpu.kda.kda`."""
    store_latents: Callable[[Tensor, Tensor, float, Tensor, Batch], None]
    """x, weight, epsilon, latents, batch: `reference.store_latents`."""
    latent_attention: Callable[[Tensor, Tensor, Tensor, Tensor, float, Batch], Tensor]
    """q_nope, q_rope, latents, key_value_up, scale, batch -> values: `cpu.mla.latent_attention`."""
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """x, weight, epsilon -> normalised."""
    gated_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    """x, gate, weight, epsilon -> normalised and gated."""


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
    form: Callable[[Tensor], Matrix],
    linear: Callable[[Matrix], Linear] = TiledLinear,
    experts: Callable[[Matrix, Matrix], Experts] = TiledExperts,
) -> Kernels:
    """Kernels for weights in a form that they read, and what multiplies them."""
    return Kernels(
        loaded_dtype=dtype,
        activation_dtype=torch.float32,
        state_dtype="float32",
        linear=lambda weight: linear(form(weight)),
        choose_experts=choose_experts,
        experts=lambda gate_and_up, down: experts(form(gate_and_up), form(down)),
        feed_forward=lambda gate_and_up, down: DenseFeedForward(
            experts(form(gate_and_up.unsqueeze(0)), form(down.unsqueeze(0)))
        ),
        convolved_heads=convolved_heads,
        decays_and_steps=decays_and_steps,
        kda=kda,
        store_latents=store_latents,
        latent_attention=latent_attention,
        rms_norm=rms_norm,
        gated_rms_norm=gated_rms_norm,
    )


_CPU: Final[dict[WeightDType, Kernels]] = {
    "float32": _compiled(torch.float32, Matrix.of),
    "bfloat16": _compiled(torch.bfloat16, Matrix.of),
    "int8": _compiled(torch.float32, Matrix.rounded),
}


def _linear_on_units(weight: Matrix) -> Linear:
    return MatrixUnitLinear(weight) if fits_units(weight) else TiledLinear(weight)


def _experts_on_units(gate_and_up: Matrix, down: Matrix) -> Experts:
    fit = fits_units(gate_and_up) and fits_units(down)
    return (MatrixUnitExperts if fit else TiledExperts)(gate_and_up, down)


_MATRIX_UNITS: Final = replace(
    _compiled(torch.bfloat16, Matrix.of, linear=_linear_on_units, experts=_experts_on_units),
    latent_attention=matrix_units_mla.latent_attention,
)
"""bf16 on processors that have units for products of such matrices."""
