"""How well a model in training predicts held-out text: a sample, for the curve."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.tokenizer.interface import Tokenizer
from training.batches import Tokens
from training.trainer import ExpertTally, forward

ROWS, LENGTH = 4, 512


def bits_per_byte(
    parameters: Mapping[str, Tensor],
    config: KimiLinearConfig,
    works: Mapping[str, Tokens],
    tokenizer: Tokenizer,
) -> dict[str, float]:
    """Bits a byte of each work, over `ROWS` windows of `LENGTH` tokens of it."""
    with torch.no_grad():
        return {
            source: _bits_per_byte(parameters, config, _windows(work), tokenizer)
            for source, work in works.items()
        }


def _windows(work: Tokens) -> Tensor:
    starts = [row * (len(work) - LENGTH - 1) // (ROWS - 1) for row in range(ROWS)]
    return torch.stack([torch.from_numpy(work[start : start + LENGTH + 1]) for start in starts])


def _bits_per_byte(
    parameters: Mapping[str, Tensor],
    config: KimiLinearConfig,
    windows: Tensor,
    tokenizer: Tokenizer,
) -> float:
    targets = windows[:, 1:].long().flatten()
    logits = forward(parameters, config, windows[:, :-1].long(), ExpertTally(config.num_experts))
    nats = functional.cross_entropy(logits, targets, reduction="sum")
    read = sum(len(tokenizer.token_bytes(token)) for token in targets.tolist())
    return float(nats) / math.log(2) / read
