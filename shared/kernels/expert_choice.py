"""Which experts of a mixture see a token, and how much each counts in the sum."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class ExpertChoice:
    """How experts are chosen by their scores.

    Attributes:
        experts: of a token, k.
        groups: of neighbouring experts, of which only some may be chosen from; 1 is no groups.
        kept_groups: those whose two best biased scores have the largest sums.
        renormalizes: whether a token's shares sum up to `scale`.
        scale: factor of the shares.
        shared: experts behind those that are chosen from; every token has them, with a share of 1.
    """

    experts: int
    groups: int
    kept_groups: int
    renormalizes: bool
    scale: float
    shared: int


def choose_experts(
    x: Tensor, router: Tensor, choice_bias: Tensor, choice: ExpertChoice
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts and their shares in the result, in fp32.

    The bias steers the choice only.

    Args:
        x: `[T, hidden]`.
        router: `[E, hidden]`, fp32.
        choice_bias: `[E]`, fp32.
        choice: how.

    Returns:
        Experts `[T, k + S]` (int64) and shares `[T, k + S]` (fp32), shared experts last.
    """
    scores = functional.linear(x.float(), router).sigmoid()
    biased = scores + choice_bias
    if choice.groups > 1:
        biased = _only_best_groups(biased, choice.groups, choice.kept_groups)
    experts = biased.topk(choice.experts, dim=-1).indices
    shares = scores.gather(-1, experts)
    if choice.renormalizes:
        shares = shares / (shares.sum(dim=-1, keepdim=True) + 1e-20)
    shared = torch.arange(choice.shared, device=x.device) + router.shape[0]
    everyone = shared.expand(x.shape[0], -1)
    return (
        torch.cat((experts, everyone), dim=-1),
        torch.cat((shares * choice.scale, torch.ones_like(everyone, dtype=torch.float32)), dim=-1),
    )


def _only_best_groups(biased: Tensor, groups: int, kept: int) -> Tensor:
    """Put the experts of all but the best groups out of the question."""
    grouped = biased.view(biased.shape[0], groups, -1)
    group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
    best = group_scores.topk(kept, dim=-1).indices
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(-1, best, value=False)
    return grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(-2)
