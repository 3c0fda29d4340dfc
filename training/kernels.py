"""The engine's operations in a form that autograd can go through: nothing is written in place.

All requests of a batch begin with it and have the same number of tokens, so states are neither read
nor written. Each of these is tested against `shared.kernels.reference`.
"""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from shared.kernels.batch import Batch
from shared.kernels.expert_choice import choose_experts
from shared.kernels.interface import Kernels
from shared.kernels.kda_layer import KdaOperations
from shared.kernels.linear import Experts, GatedFeedForward, Linear
from shared.kernels.reference import add_rms_norm, decays_and_steps, store_latents
from training.experts import GroupedExperts
from training.linear import PlainEmbedding, PlainLinear

CHUNK: Final = 32
"""Tokens between two updates of the recurrent state; sequences have a multiple of it."""
MOST_DECAY: Final = 80.0
"""Of log decays: the exponentials of half of it, squared, are within fp32."""


def training_kernels(observe_choices: Callable[[Tensor], None]) -> Kernels:
    """Kernels for autograd, fp32.

    Args:
        observe_choices: told the experts that were chosen, `[T, k]`, by each mixture in turn.
    """

    def experts(gate_and_up: Tensor, down: Tensor) -> Experts:
        return _ObservedExperts(gate_and_up, down, observe_choices)

    return Kernels(
        loaded_dtype=torch.float32,
        activation_dtype=torch.float32,
        state_dtype="float32",
        embedding=PlainEmbedding,
        linear=PlainLinear,
        choose_experts=choose_experts,
        experts=experts,
        feed_forward=_feed_forward,
        kda=KdaOperations(convolved_heads, decays_and_steps, delta_rule, gated_rms_norm),
        store_latents=store_latents,
        latent_attention=latent_attention,
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
    )


class _ObservedExperts:
    """Experts that tell which of them were chosen."""

    def __init__(
        self, gate_and_up: Tensor, down: Tensor, observe_choices: Callable[[Tensor], None]
    ) -> None:
        self._experts = GroupedExperts(
            [PlainLinear(weight) for weight in gate_and_up],
            [PlainLinear(weight) for weight in down],
        )
        self._observe_choices = observe_choices

    def __call__(self, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        """See `Experts`."""
        self._observe_choices(experts)
        return self._experts(x, experts, shares)


def _feed_forward(gate_and_up: Tensor, down: Tensor) -> Linear:
    return GatedFeedForward(PlainLinear(gate_and_up), PlainLinear(down))


# --- normalisations --------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`cpu.normalization.rms_norm`."""
    return functional.rms_norm(x, weight.shape, weight, epsilon)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`cpu.normalization.gated_rms_norm`."""
    return rms_norm(x, weight, epsilon) * torch.sigmoid(gate)


# --- operations over time --------------------------------------------------------------------


def convolved_heads(
    x: Tensor, weight: Tensor, states: Tensor, batch: Batch, heads: int, epsilon: float
) -> Tensor:
    """`cpu.convolution.convolved_heads` from empty states."""
    convolved = functional.silu(short_convolution(x, weight, states, batch))
    by_head = convolved.view(x.shape[0], 3, heads, -1)
    return torch.cat((l2_normalize(by_head[:, :2], epsilon), by_head[:, 2:]), dim=1)


def l2_normalize(x: Tensor, epsilon: float) -> Tensor:
    """Divide by the length of the last dimension: x / sqrt(sum(x^2) + epsilon)."""
    return x * (x.square().sum(dim=-1, keepdim=True) + epsilon).rsqrt()


def short_convolution(x: Tensor, weight: Tensor, states: Tensor, batch: Batch) -> Tensor:
    """`reference.short_convolution` of each sequence from an empty state."""
    del states
    sequences = x.view(_sequences(batch), -1, x.shape[-1])
    taps, tokens = weight.shape[0] - 1, sequences.shape[1]
    padded = functional.pad(sequences, (0, 0, taps, 0))
    output = padded[:, taps:] * weight[taps]
    for tap in range(taps):
        output = torch.addcmul(output, padded[:, tap : tap + tokens], weight[tap])
    return output.flatten(0, 1)


def latent_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    latents: Tensor,
    key_value_up: Tensor,
    scale: float,
    batch: Batch,
) -> Tensor:
    """`cpu.mla.latent_attention`, with every key and value expanded."""
    sequences, heads = _sequences(batch), q_nope.shape[1]
    nope, rank = q_nope.shape[-1], key_value_up.shape[-1]
    own = latents[batch.latent_rows]  # a copy: the pool is written again by the next layer
    expanded = functional.linear(own[:, :rank], key_value_up.flatten(0, 1))
    keys_values = expanded.view(own.shape[0], heads, -1)
    shared = own[:, rank:].unsqueeze(1).expand(-1, heads, -1)
    queries = torch.cat((q_nope, q_rope), dim=-1)
    keys = torch.cat((keys_values[..., :nope], shared), dim=-1)
    attended = functional.scaled_dot_product_attention(
        _by_sequence(queries, sequences),
        _by_sequence(keys, sequences),
        _by_sequence(keys_values[..., nope:], sequences),
        is_causal=True,
        scale=scale,
    )
    return attended.transpose(1, 2).flatten(0, 1)


def _by_sequence(x: Tensor, sequences: int) -> Tensor:
    """`[T, H, D]` to `[R, H, T / R, D]`."""
    return x.reshape(sequences, -1, *x.shape[1:]).transpose(1, 2)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, states: Tensor, batch: Batch
) -> Tensor:
    """`cpu.kda.delta_rule` from empty states; the equations are told there."""
    del states
    sequences, channels = _sequences(batch), q.shape[-1]
    q, k, v, g, beta = (_by_chunk(x, sequences) for x in (q, k, v, g, beta.unsqueeze(-1)))
    total = g.cumsum(dim=-2)
    last = total[..., -1:, :]
    of_keys, of_queries = _decayed_products(torch.stack((k, q)), k, total)
    grown = total.exp()
    solved = torch.linalg.solve_triangular(
        beta * of_keys,
        beta * torch.cat((v, k * grown), dim=-1),
        upper=False,
        unitriangular=True,
    )
    values, keys = solved.split((v.shape[-1], channels), dim=-1)
    to_end = k * (last - total).exp()
    output = _carry_state(values, keys, q * grown, of_queries, to_end, last.exp())
    by_token = output.view(output.shape[0], sequences, -1, *output.shape[2:])
    scaled: Tensor = by_token.permute(1, 0, 3, 2, 4) * channels**-0.5
    return scaled.reshape(-1, *scaled.shape[3:])


def _by_chunk(x: Tensor, sequences: int) -> Tensor:
    """`[T, H, D]` to `[chunks, R * H, chunk, D]`."""
    heads, channels = x.shape[1:]
    by_sequence = x.view(sequences, -1, CHUNK, heads, channels)
    return by_sequence.permute(1, 0, 3, 2, 4).reshape(-1, sequences * heads, CHUNK, channels)


def _decayed_products(rows: Tensor, keys: Tensor, total: Tensor) -> Sequence[Tensor]:
    """Products of the tokens of a chunk with those before, decayed over what lies between.

    Inside blocks that are short enough for it, the decay is divided at their middle, and what is
    above the diagonal is dropped. Then neighbouring blocks are joined: rows of the second carry the
    decay from its start, keys of the first the decay to its end, neither of which can overflow.

    Args:
        rows: k and q, `[2, chunks, N, chunk, K]`.
        keys: `[chunks, N, chunk, K]`.
        total: G, running sums of log decays, of the same shape.

    Returns:
        A and B, `[chunks, N, chunk, chunk]`, zero above the diagonal.
    """
    size = _block_size(total)
    row_blocks, key_blocks, totals = (_blocks(x, size) for x in (rows, keys, total))
    middle = totals[..., size // 2, :].unsqueeze(-2)
    products = (row_blocks * (totals - middle).exp()) @ (key_blocks * (middle - totals).exp()).mT
    products = products.tril()
    while size < CHUNK:
        first_keys, _ = _pairs(keys, size)
        first_total, second_total = _pairs(total, size)
        _, second_rows = _pairs(rows, size)
        border = first_total[..., -1:, :]
        carried = second_rows * (second_total - border).exp()
        between = carried @ (first_keys * (border - first_total).exp()).mT
        upper, lower = _pairs(products.flatten(-3, -2), size)
        products = _join(upper, lower, between)
        size *= 2
    return products.squeeze(-3).unbind()


def _block_size(total: Tensor) -> int:
    """The largest blocks in which no exponential of half a block's decay overflows a product."""
    strongest = -float(total.detach().diff(dim=-2).amin())
    size = CHUNK
    while size > 1 and size * strongest > MOST_DECAY:
        size //= 2
    return size


def _join(upper: Tensor, lower: Tensor, between: Tensor) -> Tensor:
    """Blocks on the diagonal and what is left of the lower one, to a block of twice the size."""
    top = torch.cat((upper, torch.zeros_like(between)), dim=-1)
    return torch.cat((top, torch.cat((between, lower), dim=-1)), dim=-2)


def _blocks(x: Tensor, size: int) -> Tensor:
    """`[..., tokens, D]` to `[..., blocks, size, D]`."""
    return x.reshape(*x.shape[:-2], -1, size, x.shape[-1])


def _pairs(x: Tensor, size: int) -> Sequence[Tensor]:
    """The first and the second of each two neighbouring blocks: `[..., pairs, size, D]`."""
    return x.reshape(*x.shape[:-2], -1, 2, size, x.shape[-1]).unbind(-3)


def _carry_state(
    values: Tensor,
    keys: Tensor,
    queries: Tensor,
    of_queries: Tensor,
    keys_to_end: Tensor,
    decay: Tensor,
) -> Tensor:
    """The part that runs from chunk to chunk, `[chunks, N, chunk, V]`; values and keys solved."""
    state = values.new_zeros(values.shape[1], keys.shape[-1], values.shape[-1])
    terms = (values, keys, queries, of_queries, keys_to_end.mT, decay.mT)
    outputs = []
    for value, key, query, of_query, to_end, kept in zip(*terms, strict=True):
        updates = torch.baddbmm(value, key, state, alpha=-1)
        outputs.append(torch.baddbmm(torch.bmm(query, state), of_query, updates))
        state = torch.baddbmm(state * kept, to_end, updates)
    return torch.stack(outputs)


def _sequences(batch: Batch) -> int:
    """R; they all have the same number of tokens, and none before."""
    lengths = {part.tokens for part in batch.parts}
    if len(lengths) != 1 or lengths.pop() % CHUNK or any(part.seen for part in batch.parts):
        raise ValueError(f"sequences have to be of one length, a multiple of {CHUNK}, from 0 on")
    return len(batch.parts)
