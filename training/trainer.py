"""One run of a recipe: forward, backward, step, checkpoint, and on from there."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from shared.kernels.batch import CPU, Batch
from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.model import KimiLinear
from shared.kimi_linear.state_pool import StatePool
from training.batches import TrainingBatch
from training.kernels import training_kernels
from training.muon import Muon
from training.parameters import CHOICE_BIAS, Parameters, initial_parameters, weights_of
from training.recipe import Recipe

SURE: Final = 1e-5
"""The least `-log p` for which `-log(1 - p)` is told apart from that of p = 1, where it ends."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step found, before it changed the model."""

    text_loss: float
    """Nats a token of the sequences that are text."""
    recall_loss: float
    """Nats a token that answers a question."""
    recall_accuracy: float
    """Part of these tokens that the model found likeliest."""
    gradient: float
    """Norm."""
    least_used: float
    """Choices of the least chosen expert of any layer, as a part of an even share."""


class ExpertTally:
    """Counts how often each expert of each mixture was chosen in a forward pass."""

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self.counts: list[Tensor] = []

    def __call__(self, chosen: Tensor) -> None:
        """Count the choices `[T, k]` of the next mixture, without those of shared experts."""
        self.counts.append(chosen.flatten().bincount(minlength=self._experts)[: self._experts])


def forward(
    parameters: Mapping[str, Tensor], config: KimiLinearConfig, inputs: Tensor, tally: ExpertTally
) -> Tensor:
    """Logits after every token of R sequences `[R, T]`: `[R * T, vocabulary]`, differentiable."""
    rows, length = inputs.shape
    pool = StatePool(config.state_layout("float32"), rows, inputs.numel(), CPU)
    batch = Batch.pack([length] * rows, [0] * rows, [pool.place(length) for _ in range(rows)])
    kernels = training_kernels(tally)
    model = KimiLinear(weights_of(parameters, config, kernels), config, kernels)
    return model.logits(model(inputs.flatten(), pool, batch))


def weighted_loss(losses: Tensor, weights: Tensor) -> Tensor:
    """The sum over targets: likelihood where weights are above 0, unlikelihood where below.

    Args:
        losses: `-log p` of each target `[T]`.
        weights: `[T]`; a target with a weight below 0 costs `-log(1 - p)` (arXiv 1908.04319).
    """
    unlikely = -torch.log(-torch.expm1(-losses.clamp(min=SURE)))
    return (weights.relu() * losses + (-weights).relu() * unlikely).sum()


class Trainer:
    """A model in training.

    Attributes:
        parameters: by published name.
        step: the next one, counted from 0.
        averaged: the sum of the parameters at the recipe's `averaged` steps so far.
        averages: how many these are.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.parameters: Parameters = initial_parameters(recipe.config, recipe.seed)
        self.step = 0
        self.averaged = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.averages = 0
        self._pool = ThreadPoolExecutor(recipe.shards)
        self._choice_biases = [
            tensor for name, tensor in self.parameters.items() if name.endswith(CHOICE_BIAS)
        ]
        learned = {n: p for n, p in self.parameters.items() if not n.endswith(CHOICE_BIAS)}
        for parameter in learned.values():
            parameter.requires_grad_()
        self._learned = list(learned.values())
        self._muon = Muon(
            (tensor for name, tensor in learned.items() if _is_for_muon(name, tensor)),
            momentum=recipe.matrix_momentum,
            weight_decay=recipe.matrix_weight_decay,
        )
        self._adamw = torch.optim.AdamW(
            [tensor for name, tensor in learned.items() if not _is_for_muon(name, tensor)],
            betas=recipe.betas,
            weight_decay=0.0,
            fused=True,
        )

    def train(self, shards: Sequence[TrainingBatch]) -> StepReport:
        """Take the next step on a batch, whose shards are computed side by side."""
        total = float(sum(shard.weights.abs().sum() for shard in shards))
        passes = list(self._pool.map(lambda shard: self._pass(shard, total), shards))
        for n, parameter in enumerate(self._learned):
            parameter.grad = passes[0].gradients[n]
            for other in passes[1:]:
                parameter.grad.add_(other.gradients[n])
        gradient = torch.nn.utils.clip_grad_norm_(self._learned, self.recipe.largest_gradient)
        self._move()
        counts = [sum(each) for each in zip(*(done.tally.counts for done in passes), strict=True)]
        self._balance(counts)
        self.step += 1
        if self.recipe.is_averaged(self.step):
            self._add_to_average()
        losses = torch.cat([done.losses for done in passes])
        is_found = torch.cat([done.is_found for done in passes])
        return _report(shards, losses, is_found, float(gradient), counts)

    def _pass(self, shard: TrainingBatch, total_weight: float) -> "_Pass":
        """Forward and backward over a part of a batch."""
        tally = ExpertTally(self.recipe.config.num_experts)
        logits = forward(self.parameters, self.recipe.config, shard.inputs, tally)
        targets = shard.targets.flatten()
        losses = functional.cross_entropy(logits, targets, reduction="none")
        loss = weighted_loss(losses, shard.weights.flatten()) / total_weight
        gradients = torch.autograd.grad(loss, self._learned)
        is_found = logits.detach().argmax(dim=-1) == targets
        return _Pass(gradients, losses.detach(), is_found, tally)

    def _move(self) -> None:
        """Change the parameters by their gradients, which are dropped."""
        pace = self.recipe.pace(self.step)
        self._muon.step(pace * self.recipe.matrix_learning_rate)
        for group in self._adamw.param_groups:
            group["lr"] = pace * self.recipe.learning_rate
        self._adamw.step()
        for parameter in self._learned:
            parameter.grad = None

    def result(self) -> Parameters:
        """The mean that the recipe asks for; before its first part, the parameters as they are."""
        if not self.averages:
            return {name: parameter.detach() for name, parameter in self.parameters.items()}
        return {name: total / self.averages for name, total in self.averaged.items()}

    def _add_to_average(self) -> None:
        self.averages += 1
        for name, total in self.averaged.items():
            total.add_(self.parameters[name].detach())

    def save(self, path: Path) -> None:
        """Write all that `restore` needs; a file is there whole or not at all."""
        beside = path.with_suffix(".partial")
        torch.save(
            {
                "step": self.step,
                "parameters": {n: p.detach() for n, p in self.parameters.items()},
                "averaged": self.averaged,
                "averages": self.averages,
                "momenta": self._muon.momenta,
                "adamw": self._adamw.state_dict(),
            },
            beside,
        )
        os.replace(beside, path)

    def restore(self, path: Path) -> None:
        """Go on from where `save` was called."""
        saved: dict[str, Any] = torch.load(path, weights_only=True)
        self.step = saved["step"]
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved["parameters"][name])
        self.averaged, self.averages = saved["averaged"], saved["averages"]
        self._muon.momenta = saved["momenta"]
        self._adamw.load_state_dict(saved["adamw"])

    def _balance(self, counts: Sequence[Tensor]) -> None:
        """Favour experts that were chosen too seldom, without a loss (arXiv 2408.15664)."""
        for bias, of_layer in zip(self._choice_biases, counts, strict=True):
            shortage = of_layer.float().mean() - of_layer
            bias.add_(shortage.sign(), alpha=self.recipe.balance_rate)


_NOT_FOR_MUON: Final = ("embed_tokens", "lm_head", "conv1d", "block_sparse_moe.gate", ".b_proj")
"""Tables of tokens, and what decides rather than transports."""


def _is_for_muon(name: str, parameter: Tensor) -> bool:
    return parameter.dim() == 2 and not any(part in name for part in _NOT_FOR_MUON)


def _report(
    shards: Sequence[TrainingBatch],
    losses: Tensor,
    is_found: Tensor,
    gradient: float,
    counts: Sequence[Tensor],
) -> StepReport:
    is_text = torch.cat([shard.is_text.flatten() for shard in shards])
    is_answer = torch.cat([shard.is_answer.flatten() for shard in shards])
    least = min(float(of_layer.min() / of_layer.float().mean()) for of_layer in counts)
    return StepReport(
        text_loss=float(losses[is_text].mean()),
        recall_loss=float(losses[is_answer].mean()),
        recall_accuracy=float(is_found[is_answer].float().mean()),
        gradient=gradient,
        least_used=least,
    )


@dataclass(frozen=True, slots=True)
class _Pass:
    """What a shard of a batch gave: gradients, and by token its loss and whether it was found."""

    gradients: tuple[Tensor, ...]
    losses: Tensor
    is_found: Tensor
    tally: ExpertTally
