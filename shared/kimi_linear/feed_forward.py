"""The feed-forward part of most layers: a mixture of experts."""

import torch
from torch import Tensor
from torch.nn import functional

from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.weights import MixtureWeights


class MixtureOfExperts:
    """The chosen experts' weighted sum, plus the shared experts."""

    def __init__(self, weights: MixtureWeights, config: KimiLinearConfig) -> None:
        self._weights = weights
        self._config = config

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, hidden]` to `[T, hidden]`."""
        experts, shares = choose_experts(
            x, self._weights.router, self._weights.choice_bias, self._config
        )
        output = self._weights.experts(x, experts, shares)
        shared = self._weights.shared
        return output if shared is None else output + shared(x)


def choose_experts(
    x: Tensor, router: Tensor, choice_bias: Tensor, config: KimiLinearConfig
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts and their shares in the result, in fp32.

    The bias steers the choice only. With groups, experts come from the groups whose two best
    biased scores have the largest sums.

    Args:
        x: `[T, hidden]`.
        router: `[E, hidden]`, fp32.
        choice_bias: `[E]`, fp32.
        config: number of experts a token, groups, renormalisation and scale.

    Returns:
        Experts `[T, k]` (int64) and shares `[T, k]` (fp32).
    """
    scores = functional.linear(x.float(), router).sigmoid()
    biased = scores + choice_bias
    if config.chooses_groups:
        biased = _only_best_groups(biased, config.num_expert_group, config.topk_group)
    experts = biased.topk(config.num_experts_per_token, dim=-1).indices
    shares = scores.gather(-1, experts)
    if config.moe_renormalize and config.num_experts_per_token > 1:
        shares = shares / (shares.sum(dim=-1, keepdim=True) + 1e-20)
    return experts, shares * config.routed_scaling_factor


def _only_best_groups(biased: Tensor, groups: int, kept: int) -> Tensor:
    """Put the experts of all but the best groups out of the question."""
    grouped = biased.view(biased.shape[0], groups, -1)
    group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
    best = group_scores.topk(kept, dim=-1).indices
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(-1, best, value=False)
    return grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(-2)
