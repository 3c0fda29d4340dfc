"""Multi-head latent attention where there are matrix units: for many queries they are used."""

from torch import Tensor

from shared.kernels.batch import Batch
from shared.kernels.cpu import mla
from shared.kernels.cpu.matrix_units.mla_prefill import attend_to_keys, attention_fits_units


def latent_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    latents: Tensor,
    key_value_up: Tensor,
    scale: float,
    batch: Batch,
) -> Tensor:
    """See `cpu.mla.latent_attention`."""
    operands = q_nope, q_rope, latents, key_value_up, scale, batch
    _, nope_and_value, rank = key_value_up.shape
    nope, rope = q_nope.shape[2], q_rope.shape[2]
    if attention_fits_units(nope, rope, rank, nope_and_value - nope):
        return mla.latent_attention(*operands, attend_to_keys)
    return mla.latent_attention(*operands)
