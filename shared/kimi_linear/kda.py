"""A Kimi Delta Attention layer: projections, short convolutions, recurrence, gated output."""

from torch import Tensor

from shared.kernels.batch import Batch
from shared.kernels.interface import Kernels
from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.state_pool import StatePool
from shared.kimi_linear.weights import KdaWeights

L2_EPSILON = 1e-6
"""Of the query and key normalisation: fixed in the published model."""


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

    def __call__(self, x: Tensor, pool: StatePool, batch: Batch) -> Tensor:
        """Attend the batch's tokens, `[T, hidden]`, and advance their requests' KDA states."""
        weights, kernels = self._weights, self._kernels
        inputs, low_rank = self._project(x)
        heads = kernels.convolved_heads(
            inputs,
            weights.convolution,
            pool.convolution[self._index],
            batch,
            self._heads,
            L2_EPSILON,
        )
        q, k, v = heads.unbind(dim=1)
        g, beta = kernels.decays_and_steps(
            weights.decay_up(low_rank[:, : self._head_dim]),
            low_rank[:, 2 * self._head_dim :],
            weights.decay_bias,
            weights.negative_decay_rate,
        )
        attended = kernels.kda(q, k, v, g, beta, pool.recurrent[self._index], batch)
        gate = weights.gate_up(low_rank[:, self._head_dim : 2 * self._head_dim])
        gated = kernels.gated_rms_norm(
            attended, gate.view(attended.shape), weights.output_norm, self._epsilon
        )
        return weights.output(gated.flatten(-2))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of the convolutions `[T, 3 * H * K]`, and f_a, g_a and b `[T, 2 * K + H]`."""
        channels = 3 * self._heads * self._head_dim
        projected = self._weights.projections(x)
        return projected[:, :channels], projected[:, channels:]
