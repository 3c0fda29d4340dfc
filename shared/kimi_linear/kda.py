"""A Kimi Delta Attention layer: projections, and what the kernels make of them."""

import torch
from torch import Tensor

from shared.kernels.batch import Batch
from shared.kernels.interface import Kernels
from shared.kernels.kda_layer import KdaInputs, KdaStates
from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.state_pool import StatePool
from shared.kimi_linear.weights import KdaWeights


class KdaAttention:
    """One KDA layer (arXiv 2510.26692, section 4); `index` counts the KDA layers from 0."""

    def __init__(
        self, weights: KdaWeights, config: KimiLinearConfig, kernels: Kernels, index: int
    ) -> None:
        self._weights = weights
        self._kda = kernels.kda
        self._index = index
        linear = config.linear_attn_config
        rank = linear.head_dim
        self._outputs = [3 * linear.num_heads * linear.head_dim, rank, rank, linear.num_heads]

    def __call__(self, x: Tensor, pool: StatePool, batch: Batch) -> Tensor:
        """Attend the batch's tokens, `[T, hidden]`, and advance their requests' KDA states."""
        weights = self._weights
        heads, decays, gate, steps = torch.split(weights.projections(x), self._outputs, dim=-1)
        inputs = KdaInputs(heads, weights.decay_up(decays), steps, weights.gate_up(gate))
        states = KdaStates(pool.convolution[self._index], pool.recurrent[self._index])
        return weights.output(self._kda(inputs, weights.constants, states, batch))
