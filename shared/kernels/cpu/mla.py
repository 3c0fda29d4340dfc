"""Multi-head latent attention on the CPU: which of its two forms is computed, for which requests.

Both are fp32, compiled, and in bounded memory however long the context.
"""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.kernels.batch import Batch, Part
from shared.kernels.cpu.mla_decode import attend_to_latents
from shared.kernels.cpu.mla_prefill import attend_to_keys
from shared.kernels.cpu.recording import empty

Floats = NDArray[np.float32]

ExpandedForm = Callable[..., None]
"""As `cpu.mla_prefill.attend_to_keys`."""

PREPARATION_KEYS: Final = 8
"""What the expanded form does once costs about as much as expanding so many keys."""


def latent_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    latents: Tensor,
    key_value_up: Tensor,
    scale: float,
    batch: Batch,
    attend_to_keys: ExpandedForm = attend_to_keys,
) -> Tensor:
    """Causal latent attention of each request's tokens over all its latents, in bounded memory.

    A few queries attend to the latents themselves, with the key expansion absorbed into them; for
    many it is less work to expand each block of keys and values.

    Args:
        q_nope: `[T, H, N]`.
        q_rope: `[T, H, P]`.
        latents: `[rows, R + P]`, one layer's pool; those of the batch's tokens are in it.
        key_value_up: `[H, N + V, R]`.
        scale: factor of the scores, (N + P)^-1/2.
        batch: of T tokens.
        attend_to_keys: the expanded form for one request.

    Returns:
        `[T, H, V]` in the dtype of the queries: what `reference.mla_attention` gives for each
        request by itself.
    """
    nopes, ropes, pool, up = map(_floats, (q_nope, q_rope, latents, key_value_up))
    tokens, heads, nope = nopes.shape
    output = empty(tokens, heads, up.shape[1] - nope).numpy()
    factor, threads = np.float32(scale), torch.get_num_threads()
    pages = batch.page_table.numpy()
    absorbed, expanded = _by_form(batch, up)
    for n in expanded:
        part = batch.parts[n]
        rows = slice(part.start, part.stop)
        queries = nopes[rows], ropes[rows]
        attend_to_keys(*queries, pool, pages[n], up, factor, part.seen, threads, output[rows])
    if absorbed:
        requests = pages, batch.bounds.numpy(), batch.lengths.numpy(), np.array(absorbed)
        attend_to_latents(nopes, ropes, pool, *requests, up, factor, threads, output)
    return torch.from_numpy(output).to(q_nope.dtype)


def _floats(x: Tensor) -> Floats:
    floats: Floats = x.float().numpy()
    return floats


def _by_form(batch: Batch, key_value_up: Floats) -> tuple[Sequence[int], Sequence[int]]:
    """Requests whose queries attend to latents, and those whose keys and values are expanded."""
    requests = range(len(batch.parts))
    if batch.is_decode:
        return requests, ()
    absorbed = [n for n in requests if _absorbs(batch.parts[n], key_value_up)]
    return absorbed, [n for n in requests if n not in absorbed]


def _absorbs(part: Part, key_value_up: Floats) -> bool:
    """Whether wider scores and values are fewer multiplications than expanding keys and values."""
    _, nope_and_value, rank = key_value_up.shape
    pairs = part.tokens * (part.seen + (part.tokens + 1) / 2)
    wider = pairs * (2 * rank - nope_and_value)
    expanded = (part.seen + PREPARATION_KEYS) * rank * nope_and_value
    return bool(wider < expanded)
