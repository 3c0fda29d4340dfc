"""A multi-head latent attention layer without rotation (NoPE): it keeps one latent a token."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from shared.kernels.dispatch import Kernels
from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.normalization import LATENT_EPSILON, rms_norm
from shared.kimi_linear.request_state import RequestState
from shared.kimi_linear.weights import MlaWeights


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
        self._rank = config.kv_lora_rank
        self._scale = (self._nope + self._rope) ** -0.5

    def prefill(self, x: Tensor, state: RequestState) -> Tensor:
        """Attend T successive tokens of one request, `[T, hidden]`, and append their latents."""
        q_nope, q_rope, new = self._project(x)
        latents = state.append_latents(self._index, new)
        attended = self._kernels.mla_prefill(
            q_nope, q_rope, latents, self._weights.key_value_up, self._scale
        )
        return functional.linear(attended.flatten(-2), self._weights.output)

    def decode(self, x: Tensor, states: Sequence[RequestState]) -> Tensor:
        """Attend one token of each of B requests, `[B, hidden]`, and append their latents."""
        q_nope, q_rope, new = self._project(x)
        latents = [
            state.append_latents(self._index, row)
            for state, row in zip(states, new.unsqueeze(1), strict=True)
        ]
        attended = self._kernels.mla_decode(
            q_nope, q_rope, latents, self._weights.key_value_up, self._scale
        )
        return functional.linear(attended.flatten(-2), self._weights.output)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[T, H, N]` and `[T, H, P]`, and latents `[T, R + P]`."""
        projected = functional.linear(x, self._weights.projections)
        query_channels = self._heads * (self._nope + self._rope)
        queries = projected[:, :query_channels].reshape(-1, self._heads, self._nope + self._rope)
        latents = projected[:, query_channels:]
        compressed, key_rope = latents[:, : self._rank], latents[:, self._rank :]
        normalised = rms_norm(compressed, self._weights.latent_norm, LATENT_EPSILON)
        new = torch.cat((normalised, key_rope), dim=-1)
        return queries[..., : self._nope], queries[..., self._nope :], new
