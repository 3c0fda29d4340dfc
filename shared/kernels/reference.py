"""The plain form of every kernel: an equation a line, slow; the fast ones are tested against it.

Symbols: B requests, T tokens, S keys, H heads, K and V channels of a key and a value, C channels.
"""

import torch
from torch import Tensor
from torch.nn import functional

from shared.kernels.batch import Batch


def kda_recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Kimi Delta Attention token by token (arXiv 2510.26692, equation 1).

        S_t = Diag(exp g_t) S_{t-1};   S_t += k_t (beta_t (v_t - k_t^T S_t))^T
        o_t = K^-1/2 q_t^T S_t

    Args:
        q: `[B, T, H, K]`, L2-normalised.
        k: `[B, T, H, K]`, L2-normalised.
        v: `[B, T, H, V]`.
        g: `[B, T, H, K]`, log decay of each channel, never positive.
        beta: `[B, T, H]`, step size in (0, 1).
        initial_state: `[B, H, K, V]`; left as it is.

    Returns:
        o `[B, T, H, V]` and the state after the last token `[B, H, K, V]`, in the dtype of the
        arguments.
    """
    scale = q.shape[-1] ** -0.5
    state = initial_state
    outputs = []
    for t in range(q.shape[1]):
        state = g[:, t].exp().unsqueeze(-1) * state
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t].unsqueeze(-1) * error)
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1), state


def decays_and_steps(
    raised: Tensor, steps: Tensor, bias: Tensor, rate: Tensor
) -> tuple[Tensor, Tensor]:
    """How much a KDA layer forgets at each token, and how much it learns (arXiv 2510.26692).

    Args:
        raised: `[T, H * K]`, of the layer's low-rank projection.
        steps: `[T, H]`.
        bias: dt_bias, `[H * K]`, fp32.
        rate: -exp(A_log), `[H]`, fp32.

    Returns:
        Log decays g = rate * softplus(raised + bias), `[T, H, K]`, and steps beta = sigmoid(steps),
        `[T, H]`, fp32.
    """
    softplus = functional.softplus(raised.float() + bias)
    return softplus.view(*steps.shape, -1) * rate.unsqueeze(-1), torch.sigmoid(steps.float())


def short_convolution(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution that continues from the last inputs of the tokens before.

    Args:
        x: `[T, C]`.
        weight: `[taps + 1, C]`; its last row weighs the token itself.
        state: `[taps, C]`, inputs of the last tokens, oldest first; left as it is.

    Returns:
        The convolved inputs `[T, C]` and the state after them `[taps, C]`.
    """
    taps = state.shape[0]
    inputs = torch.cat((state, x))
    outputs = [(inputs[t : t + taps + 1] * weight).sum(dim=0) for t in range(x.shape[0])]
    return torch.stack(outputs), inputs[x.shape[0] :]


def add_rms_norm(
    x: Tensor, addend: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Sum two `[T, D]`.

    Returns:
        The sum, and the sum divided by the root mean square of its last dimension, times the
        weight `[D]`: x / sqrt(mean(x^2) + epsilon) * w. Both have the dtype of `x`; inside it is
        fp32.
    """
    total = x + addend
    return total, functional.rms_norm(total.float(), weight.shape, weight, epsilon).to(x.dtype)


def store_latents(x: Tensor, weight: Tensor, epsilon: float, latents: Tensor, batch: Batch) -> None:
    """Put the latents of the batch's tokens into the pool.

    Args:
        x: `[T, R + P]`: c_kv, which is normalised as by `rms_norm`, and k_pe as it is.
        weight: `[R]`, fp32.
        epsilon: added to the mean square.
        latents: `[rows, R + P]`, one layer's pool.
        batch: of T tokens.
    """
    rank = weight.shape[0]
    normalised = functional.rms_norm(x[:, :rank].float(), (rank,), weight, epsilon).to(x.dtype)
    latents.index_copy_(0, batch.latent_rows, torch.cat((normalised, x[:, rank:]), dim=-1))


def mla_attention(
    q_nope: Tensor, q_rope: Tensor, latents: Tensor, key_value_up: Tensor, scale: float
) -> Tensor:
    """Multi-head latent attention without rotation, every key and value expanded, one softmax.

    Args:
        q_nope: `[T, H, N]`, queries of the last T of the S tokens.
        q_rope: `[T, H, P]`.
        latents: `[S, R + P]`: normalised c_kv, then the key part k_pe that all heads share.
        key_value_up: `[H, N + V, R]`, from c_kv to the keys and values of each head.
        scale: factor of the scores, (N + P)^-1/2.

    Returns:
        `[T, H, V]`.
    """
    tokens, _, nope = q_nope.shape
    rank = key_value_up.shape[-1]
    keys_values = torch.einsum("sr,hdr->hsd", latents[:, :rank], key_value_up)
    keys, values = keys_values[..., :nope], keys_values[..., nope:]
    scores = torch.einsum("thn,hsn->hts", q_nope, keys)
    scores = scale * (scores + torch.einsum("thp,sp->hts", q_rope, latents[:, rank:]))
    length = latents.shape[0]
    hidden = torch.ones(tokens, length, dtype=torch.bool).triu(length - tokens + 1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("hts,hsv->thv", weights, values)
