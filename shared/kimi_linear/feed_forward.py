"""The feed-forward part of most layers: a mixture of experts."""

from torch import Tensor

from shared.kernels.expert_choice import ExpertChoice
from shared.kernels.interface import Kernels
from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.weights import MixtureWeights


class MixtureOfExperts:
    """The weighted sum of the chosen experts and the shared one."""

    def __init__(self, weights: MixtureWeights, config: KimiLinearConfig, kernels: Kernels) -> None:
        self.weights = weights
        self.choice = expert_choice(config)
        self._kernels = kernels

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, hidden]` to `[T, hidden]`."""
        return self.weights.experts(x, *self.choose(x))

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token and their shares: see `choose_experts`."""
        weights = self.weights
        return self._kernels.choose_experts(x, weights.router, weights.choice_bias, self.choice)


def expert_choice(config: KimiLinearConfig) -> ExpertChoice:
    """How a model chooses; a single expert keeps its own score."""
    return ExpertChoice(
        experts=config.num_experts_per_token,
        groups=config.num_expert_group if config.chooses_groups else 1,
        kept_groups=config.topk_group,
        renormalizes=config.moe_renormalize and config.num_experts_per_token > 1,
        scale=config.routed_scaling_factor,
        shared=config.num_shared_experts,
    )
