"""What a KDA layer computes between its projections: operands, and the operations one by one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from shared.kernels.batch import Batch

L2_EPSILON: Final = 1e-6
"""Of the query and key normalisation: fixed in the published model."""


@dataclass(frozen=True, slots=True)
class KdaInputs:
    """What the projections make of T tokens; rows may lie apart.

    Attributes:
        heads: `[T, 3 * H * K]`, q, k and v before their convolutions.
        decays: `[T, H * K]`, raised from low rank.
        steps: `[T, H]`.
        gate: `[T, H * K]`, raised from low rank.
    """

    heads: Tensor
    decays: Tensor
    steps: Tensor
    gate: Tensor


@dataclass(frozen=True, slots=True)
class KdaConstants:
    """The weights of a layer that multiply no matrix.

    Attributes:
        heads: H.
        convolution: `[taps + 1, 3 * H * K]`: oldest tap first; q, k and v channels.
        decay_bias: dt_bias, `[H * K]`, fp32.
        decay_rate: -exp(A_log), `[H]`, fp32.
        norm: of the output, `[K]`, fp32.
        epsilon: of that norm.
    """

    heads: int
    convolution: Tensor
    decay_bias: Tensor
    decay_rate: Tensor
    norm: Tensor
    epsilon: float


@dataclass(frozen=True, slots=True)
class KdaStates:
    """Of all requests in a layer; those of a batch advance in place.

    Attributes:
        convolution: `[slots, taps, 3 * H * K]`, oldest input first.
        recurrent: `[slots, H, K, V]`, fp32.
    """

    convolution: Tensor
    recurrent: Tensor


@dataclass(frozen=True, slots=True)
class KdaOperations:
    """Each of them by itself, in the order in which they are called."""

    convolved_heads: Callable[[Tensor, Tensor, Tensor, Batch, int, float], Tensor]
    """x, weight, states, batch, H, epsilon -> q, k, v: `cpu.convolution.convolved_heads`."""
    decays_and_steps: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """raised, steps, bias, rate -> g, beta: `reference.decays_and_steps`."""
    delta_rule: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Batch], Tensor]
    """q, k, v, g, beta, states, batch -> o: `cpu.kda.delta_rule`."""
    gated_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    """x, gate, weight, epsilon -> normalised and gated."""

    def __call__(
        self, inputs: KdaInputs, constants: KdaConstants, states: KdaStates, batch: Batch
    ) -> Tensor:
        """Attend the batch's tokens: `[T, H * K]`."""
        convolved = self.convolved_heads(
            inputs.heads,
            constants.convolution,
            states.convolution,
            batch,
            constants.heads,
            L2_EPSILON,
        )
        q, k, v = convolved.unbind(dim=1)
        g, beta = self.decays_and_steps(
            inputs.decays, inputs.steps, constants.decay_bias, constants.decay_rate
        )
        attended = self.delta_rule(q, k, v, g, beta, states.recurrent, batch)
        gate = inputs.gate.view(attended.shape)
        gated = self.gated_rms_norm(attended, gate, constants.norm, constants.epsilon)
        return gated.flatten(-2)
