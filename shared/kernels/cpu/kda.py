"""Kimi Delta Attention on the CPU: operation by operation for prompts, all at once for a token.

The recurrent state and everything that touches it is fp32, whatever the dtype of the activations.
"""

from typing import Final

import numpy as np
from torch import Tensor

from shared.kernels.batch import Batch
from shared.kernels.cpu.convolution import convolved_heads
from shared.kernels.cpu.decay import decays_and_steps
from shared.kernels.cpu.kda_decode import attend_step
from shared.kernels.cpu.kda_prefill import attend_chunks
from shared.kernels.cpu.normalization import gated_rms_norm
from shared.kernels.cpu.recording import empty
from shared.kernels.kda_layer import L2_EPSILON, KdaConstants, KdaInputs, KdaOperations, KdaStates


def kda(inputs: KdaInputs, constants: KdaConstants, states: KdaStates, batch: Batch) -> Tensor:
    """See `Kernels.kda`; activations are fp32."""
    if not batch.is_decode:
        return OPERATIONS(inputs, constants, states, batch)
    output = empty(*inputs.gate.shape)
    attend_step(
        inputs.heads.numpy(),
        inputs.decays.numpy(),
        inputs.steps.numpy(),
        inputs.gate.numpy(),
        constants.convolution.numpy(),
        constants.decay_bias.numpy(),
        constants.decay_rate.numpy(),
        constants.norm.numpy(),
        np.float32(L2_EPSILON),
        np.float32(constants.epsilon),
        states.convolution.numpy(),
        states.recurrent.numpy(),
        batch.slots.numpy(),
        output.numpy(),
    )
    return output


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, states: Tensor, batch: Batch
) -> Tensor:
    """Kimi Delta Attention over the tokens of each request, continued from its state.

    Tokens and heads may lie apart (slices of one projection, say), elements of the last dimension
    may not.

    Args:
        q: `[T, H, K]`, L2-normalised.
        k: `[T, H, K]`, L2-normalised.
        v: `[T, H, V]`.
        g: `[T, H, K]`, log decay of each channel, never positive.
        beta: `[T, H]`, step size in (0, 1).
        states: `[slots, H, K, V]`, fp32; those of the batch advance in place.
        batch: of T tokens.

    Returns:
        `[T, H, V]`, fp32: what `reference.kda_recurrence` gives for each request by itself.
    """
    output = empty(*v.shape)
    queries, keys, values, log_decays, steps = (x.float().numpy() for x in (q, k, v, g, beta))
    operands = (queries, keys, values, log_decays, steps, states.numpy())
    parts = np.array([(part.placement.slot, part.start, part.stop) for part in batch.parts])
    attend_chunks(*operands, parts, output.numpy())
    return output


OPERATIONS: Final = KdaOperations(convolved_heads, decays_and_steps, delta_rule, gated_rms_norm)
