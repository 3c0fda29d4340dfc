"""Narrow weights change the logits by a stated amount, which does not grow with the text.

The reference model's weights are random. Where rounding tips the choice between two experts, their
answers have nothing in common, so that single tokens differ a lot: the median says what rounding
does, and the bound on it is the stated one. A trained model's experts are less unlike.
"""

import pytest
import torch
from torch import Tensor

from benchmarks.exactness import MODEL, WINDOW, drift, logits_after_every_token
from shared.kernels.dtypes import WeightDType

TOKENS = 8 * WINDOW
BOUNDS: dict[WeightDType, float] = {"bfloat16": 0.12, "int8": 0.25}
"""On the median relative error of the logits in any window of 1,024 tokens."""


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    torch.manual_seed(1)
    drawn: list[int] = torch.randint(512, (TOKENS,)).tolist()
    return drawn


@pytest.fixture(scope="module")
def wide(tokens: list[int]) -> Tensor:
    return logits_after_every_token(MODEL, "float32", tokens)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_drift_over_8192_tokens(wide: Tensor, tokens: list[int], dtype: WeightDType) -> None:
    windows = drift(wide, logits_after_every_token(MODEL, dtype, tokens))
    errors = [window.relative_error for window in windows]
    assert max(errors) < BOUNDS[dtype]
    assert min(errors) > 1e-4, "the weights were not narrow at all"
    assert sum(errors[4:]) < 1.25 * sum(errors[:4]), "it grows with the text"
