"""The weights of a model as its layers use them: typed, immutable, fused where one product will do.

Matrices, `[outputs, inputs]`, are in the form in which the kernels multiply. What decides rather
than transports (norms, decays, the router) is fp32.
"""

from dataclasses import dataclass

from torch import Tensor

from shared.kernels.kda_layer import KdaConstants
from shared.kernels.linear import Embedding, Experts, Linear


@dataclass(frozen=True, slots=True)
class KdaWeights:
    """One KDA layer with H heads of K channels."""

    projections: Linear
    """`[3 * H * K + 2 * K + H, hidden]`: q, k, v, then f_a and g_a (low rank), then b (beta)."""
    decay_up: Linear
    """f_b, `[H * K, K]`."""
    gate_up: Linear
    """g_b, `[H * K, K]`."""
    constants: KdaConstants
    """Of the operations between the projections."""
    output: Linear
    """`[hidden, H * K]`."""


@dataclass(frozen=True, slots=True)
class MlaWeights:
    """One MLA layer with H heads, N + P channels a key, V a value, and latents of R + P."""

    projections: Linear
    """`[H * (N + P) + R + P, hidden]`: queries, then c_kv and k_pe."""
    latent_norm: Tensor
    """`[R]`, fp32."""
    key_value_up: Tensor
    """kv_b, `[H, N + V, R]`, in the dtype of the activations."""
    output: Linear
    """`[hidden, H * V]`."""


@dataclass(frozen=True, slots=True)
class MixtureWeights:
    """E experts of width I and their router, and S shared experts of the same width."""

    router: Tensor
    """`[E, hidden]`, fp32."""
    choice_bias: Tensor
    """e_score_correction_bias, `[E]`, fp32."""
    experts: Experts
    """w1 and w3 (gate above up), `[E + S, 2 * I, hidden]`, and w2 (down), `[E + S, hidden, I]`."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer."""

    attention_norm: Tensor
    """`[hidden]`, fp32."""
    attention: KdaWeights | MlaWeights
    feed_forward_norm: Tensor
    """`[hidden]`, fp32."""
    feed_forward: Linear | MixtureWeights
    """The first is dense: down(silu(gate x) * up x)."""


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """The whole model."""

    embedding: Embedding
    """`[vocabulary, hidden]`."""
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    """`[hidden]`, fp32."""
    head: Linear
    """`[vocabulary, hidden]`; the embedding itself when they are tied."""
