"""Kimi Delta Attention on the CPU: `kda_prefill` for many tokens a request, `kda_decode` for one.

The recurrent state and everything that touches it is fp32, whatever the dtype of the activations.
"""

import numpy as np
import torch
from torch import Tensor

from shared.kernels.batch import Batch
from shared.kernels.cpu.kda_decode import attend_step
from shared.kernels.cpu.kda_prefill import attend_chunks


def kda(
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
    output = torch.empty_like(v, dtype=torch.float32, memory_format=torch.contiguous_format)
    queries, keys, values, log_decays, steps = (x.float().numpy() for x in (q, k, v, g, beta))
    operands = (queries, keys, values, log_decays, steps, states.numpy())
    if batch.is_decode:
        attend_step(*operands, batch.slots.numpy(), output.numpy())
    else:
        parts = np.array([(part.placement.slot, part.start, part.stop) for part in batch.parts])
        attend_chunks(*operands, parts, output.numpy())
    return output
