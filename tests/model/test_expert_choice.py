"""Experts are chosen and weighed as a plain loop over tokens does it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shared.kernels.cpu import expert_choice as compiled
from shared.kernels.dispatch import kernels_for
from shared.kernels.expert_choice import ExpertChoice, choose_experts
from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.feed_forward import MixtureOfExperts, expert_choice
from shared.kimi_linear.weights import MixtureWeights

Choose = Callable[[Tensor, Tensor, Tensor, ExpertChoice], tuple[Tensor, Tensor]]

HIDDEN, EXPERTS, WIDTH, TOKENS = 24, 16, 8, 40


def choose_plainly(
    x: Tensor, router: Tensor, bias: Tensor, config: KimiLinearConfig
) -> dict[int, float]:
    """One token's experts and their shares."""
    scores = torch.sigmoid(router @ x).tolist()
    biased = [score + b for score, b in zip(scores, bias.tolist(), strict=True)]
    size = EXPERTS // config.num_expert_group
    groups = [range(start, start + size) for start in range(0, EXPERTS, size)]
    if config.use_grouped_topk and config.num_expert_group > 1:
        groups.sort(key=lambda group: -sum(sorted(biased[e] for e in group)[-2:]))
        groups = groups[: config.topk_group]
    eligible = sorted((e for group in groups for e in group), key=lambda e: -biased[e])
    chosen = eligible[: config.num_experts_per_token]
    total = sum(scores[e] for e in chosen) if config.moe_renormalize and len(chosen) > 1 else 1.0
    shared = {EXPERTS + n: 1.0 for n in range(config.num_shared_experts)}
    return {e: config.routed_scaling_factor * scores[e] / total for e in chosen} | shared


@pytest.fixture(
    params=[
        {"num_expert_group": 1, "topk_group": 1},
        {"num_expert_group": 4, "topk_group": 2},
        {"num_expert_group": 8, "topk_group": 3},
        {"num_expert_group": 4, "topk_group": 4},
        {"num_expert_group": 4, "topk_group": 1, "use_grouped_topk": False},
        {"num_expert_group": 4, "topk_group": 2, "moe_renormalize": False},
        {"num_experts_per_token": 1, "moe_renormalize": True},
        {"num_shared_experts": 0},
    ],
    ids=str,
)
def config(request: pytest.FixtureRequest, reference_directory: Path) -> KimiLinearConfig:
    sizes = {"num_experts": EXPERTS, "num_experts_per_token": 4, "hidden_size": HIDDEN}
    return KimiLinearConfig.from_directory(reference_directory).model_copy(
        update={**sizes, **request.param}
    )


@pytest.mark.parametrize("choose", [choose_experts, compiled.choose_experts])
@pytest.mark.parametrize("bias_scale", [0.0, 0.3, 3.0])
def test_choice_and_shares_are_those_of_a_plain_loop(
    config: KimiLinearConfig, bias_scale: float, choose: Choose
) -> None:
    x, router = torch.randn(TOKENS, HIDDEN), torch.randn(EXPERTS, HIDDEN) / HIDDEN**0.5
    bias = bias_scale * torch.randn(EXPERTS) - bias_scale
    experts, shares = choose(x, router, bias, expert_choice(config))
    for token in range(TOKENS):
        expected = choose_plainly(x[token], router, bias, config)
        found = dict(zip(experts[token].tolist(), shares[token].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_mixture_is_the_weighted_sum_of_the_chosen_and_the_shared_experts(
    config: KimiLinearConfig,
) -> None:
    kernels = kernels_for("cpu", "float32")
    count = EXPERTS + config.num_shared_experts
    gate_and_up = torch.randn(count, 2 * WIDTH, HIDDEN)
    down = torch.randn(count, HIDDEN, WIDTH)
    weights = MixtureWeights(
        router=torch.randn(EXPERTS, HIDDEN),
        choice_bias=torch.randn(EXPERTS),
        experts=kernels.experts(gate_and_up, down),
    )
    x = torch.randn(TOKENS, HIDDEN)
    output = MixtureOfExperts(weights, config, kernels)(x)
    for token in range(TOKENS):
        expected = torch.zeros(HIDDEN)
        chosen = choose_plainly(x[token], weights.router, weights.choice_bias, config)
        for expert, share in chosen.items():
            gate, up = (gate_and_up[expert] @ x[token]).chunk(2)
            expected += share * (down[expert] @ (functional.silu(gate) * up))
        torch.testing.assert_close(output[token], expected, rtol=1e-4, atol=1e-3)
