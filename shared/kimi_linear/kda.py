"""A Kimi Delta Attention layer: projections, short convolutions, recurrence, gated output."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from shared.kernels.dispatch import Kernels
from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.normalization import gated_rms_norm, l2_normalize
from shared.kimi_linear.request_state import RequestState
from shared.kimi_linear.weights import KdaWeights


class KdaAttention:
    """One KDA layer (arXiv 2510.26692, section 4); `index` counts the KDA layers from 0."""

    def __init__(
        self, weights: KdaWeights, config: KimiLinearConfig, kernels: Kernels, index: int
    ) -> None:
        self._weights = weights
        self._kernels = kernels
        self._index = index
        self._heads = config.linear_attn_config.num_heads
        self._head_dim = config.linear_attn_config.head_dim
        self._epsilon = config.rms_norm_eps

    def prefill(self, x: Tensor, state: RequestState) -> Tensor:
        """Attend T successive tokens of one request, `[T, hidden]`, and advance its state."""
        recurrent, convolution = state.recurrent[self._index], state.convolution[self._index]
        inputs, low_rank = self._project(x)
        convolved, inputs_left = self._kernels.convolution_prefill(
            inputs, self._weights.convolution, convolution
        )
        q, k, v = (operand.unsqueeze(0) for operand in self._heads_of(convolved))
        g, beta = (operand.unsqueeze(0) for operand in self._decay_and_step(low_rank))
        attended, final = self._kernels.kda_prefill(q, k, v, g, beta, recurrent.unsqueeze(0))
        convolution.copy_(inputs_left)
        recurrent.copy_(final.squeeze(0))
        return self._output(attended.squeeze(0), low_rank)

    def decode(self, x: Tensor, states: Sequence[RequestState]) -> Tensor:
        """Attend one token of each of B requests, `[B, hidden]`, and advance their states."""
        inputs, low_rank = self._project(x)
        convolved = self._kernels.convolution_decode(
            inputs, self._weights.convolution, [state.convolution[self._index] for state in states]
        )
        attended = self._kernels.kda_decode(
            *self._heads_of(convolved),
            *self._decay_and_step(low_rank),
            [state.recurrent[self._index] for state in states],
        )
        return self._output(attended, low_rank)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of the convolutions `[T, 3 * H * K]`, and f_a, g_a and b `[T, 2 * K + H]`."""
        channels = 3 * self._heads * self._head_dim
        projected = functional.linear(x, self._weights.projections)
        return projected[:, :channels], projected[:, channels:]

    def _heads_of(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each `[T, H, K]`."""
        activated = functional.silu(convolved).view(-1, 3, self._heads, self._head_dim)
        query, key = l2_normalize(activated[:, :2]).unbind(dim=1)
        return query, key, activated[:, 2]

    def _decay_and_step(self, low_rank: Tensor) -> tuple[Tensor, Tensor]:
        """Log decays g `[T, H, K]` and steps beta `[T, H]`, fp32."""
        weights = self._weights
        raised = functional.linear(low_rank[:, : self._head_dim], weights.decay_up).float()
        softplus = functional.softplus(raised + weights.decay_bias)
        g = -weights.decay_rate.unsqueeze(-1) * softplus.view(-1, self._heads, self._head_dim)
        return g, torch.sigmoid(low_rank[:, 2 * self._head_dim :].float())

    def _output(self, attended: Tensor, low_rank: Tensor) -> Tensor:
        weights = self._weights
        low_rank_gate = low_rank[:, self._head_dim : 2 * self._head_dim]
        gate = functional.linear(low_rank_gate, weights.gate_up).view(attended.shape)
        gated = gated_rms_norm(attended, gate, weights.output_norm, self._epsilon)
        return functional.linear(gated.flatten(-2), weights.output)
