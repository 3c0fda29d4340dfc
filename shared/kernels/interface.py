"""What kernels are for the model around them, whatever the device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from shared.kernels.batch import Batch
from shared.kernels.dtypes import StateDType
from shared.kernels.expert_choice import ExpertChoice
from shared.kernels.kda_layer import KdaConstants, KdaInputs, KdaStates
from shared.kernels.linear import Embedding, Experts, Linear

Step: TypeAlias = Callable[[], Tensor]
"""Computes something from tensors that stay where they are, and may be run any number of times."""


def as_it_is(step: Step) -> Step:
    """Capture nothing: the step is run as it is written each time."""
    return step


@dataclass(frozen=True, slots=True)
class Kernels:
    """The operations of the model that are written anew for each kind of device.

    Those that have a plain form in `reference` are tested against it.
    """

    loaded_dtype: torch.dtype
    """Of the matrices that `embedding`, `linear` and `experts` take."""
    activation_dtype: torch.dtype
    state_dtype: StateDType
    """Of latents and convolution states; KDA states are fp32."""
    embedding: Callable[[Tensor], Embedding]
    """Matrix `[vocabulary, hidden]` -> what looks tokens up in it."""
    linear: Callable[[Tensor], Linear]
    """Matrix `[outputs, inputs]` -> product; the matrix itself need not be kept."""
    choose_experts: Callable[[Tensor, Tensor, Tensor, ExpertChoice], tuple[Tensor, Tensor]]
    """x, router, bias, choice -> experts, shares: `expert_choice.choose_experts`."""
    experts: Callable[[Tensor, Tensor], Experts]
    """Gate above up `[E, 2 * I, hidden]`, down `[E, hidden, I]` -> experts."""
    feed_forward: Callable[[Tensor, Tensor], Linear]
    """Gate above up `[2 * I, hidden]`, down `[hidden, I]` -> down(silu(gate x) * up x)."""
    kda: Callable[[KdaInputs, KdaConstants, KdaStates, Batch], Tensor]
    """What lies between a KDA layer's projections: `kda_layer.KdaOperations`, `[T, H * K]`."""
    store_latents: Callable[[Tensor, Tensor, float, Tensor, Batch], None]
    """x, weight, epsilon, latents, batch: `reference.store_latents`."""
    latent_attention: Callable[[Tensor, Tensor, Tensor, Tensor, float, Batch], Tensor]
    """q_nope, q_rope, latents, key_value_up, scale, batch -> values: `cpu.mla.latent_attention`."""
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """x, weight, epsilon -> normalised."""
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    """x, addend, weight, epsilon -> sum, normalised sum: `reference.add_rms_norm`."""
    captured: Callable[[Step], Step] = as_it_is
    """A step of these operations -> the same step, which costs less from its second run on.

    What it computes from what changes has to be computed by these operations alone; its result may
    be overwritten by the next run.
    """
