"""A multi-head latent attention layer without rotation (NoPE): it keeps one latent a token."""

from typing import Final

from torch import Tensor

from shared.kernels.batch import Batch
from shared.kernels.interface import Kernels
from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.state_pool import StatePool
from shared.kimi_linear.weights import MlaWeights

LATENT_EPSILON: Final = 1e-6
"""Of the latent normalisation: fixed in the published model."""


class MlaAttention:
    """One MLA layer (arXiv 2510.26692, section 4); `index` counts the MLA layers from 0."""

    def __init__(
        self, weights: MlaWeights, config: KimiLinearConfig, kernels: Kernels, index: int
    ) -> None:
        self._weights = weights
        self._kernels = kernels
        self._index = index
        self._heads = config.num_attention_heads
        self._nope = config.qk_nope_head_dim
        self._rope = config.qk_rope_head_dim
        self._scale = (self._nope + self._rope) ** -0.5

    def __call__(self, x: Tensor, pool: StatePool, batch: Batch) -> Tensor:
        """Attend the batch's tokens, `[T, hidden]`, and store their latents."""
        weights, kernels = self._weights, self._kernels
        q_nope, q_rope, compressed = self._project(x)
        latents = pool.latents[self._index]
        kernels.store_latents(compressed, weights.latent_norm, LATENT_EPSILON, latents, batch)
        attended = kernels.latent_attention(
            q_nope, q_rope, latents, weights.key_value_up, self._scale, batch
        )
        return weights.output(attended.flatten(-2))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[T, H, N]` and `[T, H, P]`, and latents as they are before the norm."""
        projected = self._weights.projections(x)
        query_channels = self._heads * (self._nope + self._rope)
        queries = projected[:, :query_channels].reshape(-1, self._heads, self._nope + self._rope)
        return queries[..., : self._nope], queries[..., self._nope :], projected[:, query_channels:]
