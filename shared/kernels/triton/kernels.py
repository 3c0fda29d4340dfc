"""The Triton kernels in the form in which the model calls kernels."""

import torch
from torch import Tensor
from torch.nn import functional

from shared.errors import UnsupportedDeviceError
from shared.kernels.batch import Batch
from shared.kernels.dtypes import WeightDType
from shared.kernels.expert_choice import choose_experts
from shared.kernels.interface import Kernels
from shared.kernels.kda_layer import KdaOperations
from shared.kernels.linear import GatedFeedForward, Linear
from shared.kernels.reference import decays_and_steps
from shared.kernels.torch_dtypes import TORCH_DTYPES
from shared.kernels.triton.convolution import convolution_step, short_convolution
from shared.kernels.triton.experts import GroupedExperts
from shared.kernels.triton.kda_decode import kda_decode
from shared.kernels.triton.kda_prefill import kda_prefill
from shared.kernels.triton.mla_decode import mean_latents
from shared.kernels.triton.mla_prefill import latent_attention
from shared.kernels.triton.normalization import gated_rms_norm, l2_normalize, rms_norm


def triton_kernels(dtype: WeightDType) -> Kernels:
    """Kernels with weights, activations, latents and convolution states of one dtype.

    Raises:
        UnsupportedDeviceError: int8 weights, which are for processors.
    """
    if dtype == "int8":
        raise UnsupportedDeviceError(
            "dtype: int8 weights are for CPUs; a CUDA device takes bfloat16 or float32"
        )
    return Kernels(
        loaded_dtype=TORCH_DTYPES[dtype],
        activation_dtype=TORCH_DTYPES[dtype],
        state_dtype=dtype,
        embedding=_Embedding,
        linear=_Linear,
        choose_experts=choose_experts,
        experts=GroupedExperts,
        feed_forward=_feed_forward,
        kda=KdaOperations(_convolved_heads, decays_and_steps, _delta_rule, _gated_rms_norm),
        store_latents=_store_latents,
        latent_attention=_latent_attention,
        rms_norm=rms_norm,
        add_rms_norm=_add_rms_norm,
    )


class _Embedding:
    """A matrix with a row for each token."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, tokens: Tensor) -> Tensor:
        return functional.embedding(tokens, self._weight)


class _Linear:
    """A product with one matrix, by cuBLAS."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._weight)


def _feed_forward(gate_and_up: Tensor, down: Tensor) -> Linear:
    return GatedFeedForward(_Linear(gate_and_up), _Linear(down))


def _convolved_heads(
    x: Tensor, weight: Tensor, states: Tensor, batch: Batch, heads: int, epsilon: float
) -> Tensor:
    activated = functional.silu(_convolution(x, weight, states, batch), inplace=True)
    by_head = activated.view(x.shape[0], 3, heads, -1)
    by_head[:, :2] = l2_normalize(by_head[:, :2], epsilon)
    return by_head


def _convolution(x: Tensor, weight: Tensor, states: Tensor, batch: Batch) -> Tensor:
    slots = batch.slots.int()
    if batch.is_decode:
        return convolution_step(x, weight, states, slots)
    longest = max(part.tokens for part in batch.parts)
    return short_convolution(x, weight, states, batch.bounds, slots, longest)


def _delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, states: Tensor, batch: Batch
) -> Tensor:
    g, beta, slots = g.contiguous(), beta.contiguous(), batch.slots.int()
    if batch.is_decode:
        return kda_decode(q, k, v, g, beta, states, slots)
    return kda_prefill(q, k, v, g, beta, states, batch.bounds, slots)


def _store_latents(
    x: Tensor, weight: Tensor, epsilon: float, latents: Tensor, batch: Batch
) -> None:
    rank = weight.shape[0]
    normalised = rms_norm(x[:, :rank], weight, epsilon)
    latents.index_copy_(0, batch.latent_rows, torch.cat((normalised, x[:, rank:]), dim=-1))


def _latent_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    latents: Tensor,
    key_value_up: Tensor,
    scale: float,
    batch: Batch,
) -> Tensor:
    """Prefill multiplies in blocks of keys, which is work for cuBLAS; decode has a kernel."""
    if not batch.is_decode:
        return latent_attention(q_nope, q_rope, latents, key_value_up, scale, batch)
    nope, rank = q_nope.shape[-1], key_value_up.shape[-1]
    absorbed = torch.bmm(q_nope.transpose(0, 1), key_value_up[:, :nope]).transpose(0, 1)
    queries = scale * torch.cat((absorbed, q_rope), dim=-1)
    means = mean_latents(queries, latents, batch.page_table, batch.lengths, rank, batch.longest)
    values = torch.bmm(means.to(q_nope.dtype).transpose(0, 1), key_value_up[:, nope:].mT)
    return values.transpose(0, 1)


def _add_rms_norm(
    x: Tensor, addend: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    total = x + addend
    return total, rms_norm(total, weight, epsilon)


def _gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return gated_rms_norm(x, gate, weight, epsilon).to(gate.dtype)
