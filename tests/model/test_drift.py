"""Narrow weights change the logits by a stated amount, which does not grow with the text.

KDA states are fp32 and take in what narrow products give, thousands of times over, so an error
could build up. What the bounds mean: the reference model's weights are random, and so are its
experts. Where rounding tips the choice between two experts that are about as good, answers that
have nothing in common are exchanged, and the logits of that token, and of some after it, are off by
as much as they are large. That says nothing of rounding, and little of a trained model, so

* with the experts that fp32 weights choose, every single token is held to the bound;
* with experts of its own, a model is held to the median, and to how often it says the same.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.exactness import LONG, WINDOW, drift, logits_after_every_token, prompt_of
from benchmarks.expert_choices import ExpertChoices
from shared.kimi_linear.engine import SLICE_TOKENS, Engine
from tests.model.tolerances import (
    DRIFT_AGREEMENT,
    DRIFT_GROWTH,
    DRIFT_MEDIAN_ERROR,
    ROUNDING_AGREEMENT,
    ROUNDING_ERROR,
    SAME_MODEL_LOGITS,
)

SHORT = 2 * WINDOW


@pytest.fixture(scope="module")
def tokens(engine: Engine) -> list[int]:
    return prompt_of(engine, LONG)


@pytest.fixture(scope="module")
def choices() -> ExpertChoices:
    return ExpertChoices()


@pytest.fixture(scope="module")
def wide(engine: Engine, tokens: list[int], choices: ExpertChoices) -> Tensor:
    """Logits of fp32 weights; their choices are recorded."""
    with choices.recorded():
        return logits_after_every_token(engine, tokens)


@pytest.fixture(scope="module", params=["bfloat16", "int8"])
def narrow(request: pytest.FixtureRequest, reference_directory: Path) -> Engine:
    return Engine.load(reference_directory, request.param)


def test_drift_is_bounded_and_does_not_grow_over_8192_tokens(
    wide: Tensor, narrow: Engine, tokens: list[int]
) -> None:
    windows = drift(wide, logits_after_every_token(narrow, tokens))
    errors = [window.median_error for window in windows]
    assert min(errors) > 1e-3, "the weights were not narrow at all"
    assert max(errors) < DRIFT_MEDIAN_ERROR[narrow.dtype]
    assert min(window.agreement for window in windows) > DRIFT_AGREEMENT[narrow.dtype]
    assert sum(errors[4:]) < DRIFT_GROWTH * sum(errors[:4])


def test_with_the_same_experts_every_token_is_off_by_rounding_only(
    wide: Tensor, narrow: Engine, tokens: list[int], choices: ExpertChoices
) -> None:
    with choices.repeated():
        logits = logits_after_every_token(narrow, tokens[:SHORT])
    windows = drift(wide[:SHORT], logits)
    assert max(window.largest_error for window in windows) < ROUNDING_ERROR[narrow.dtype]
    assert min(window.agreement for window in windows) > ROUNDING_AGREEMENT[narrow.dtype]


def test_repeating_its_own_choices_changes_nothing(
    engine: Engine, wide: Tensor, tokens: list[int], choices: ExpertChoices
) -> None:
    with choices.repeated():
        logits = logits_after_every_token(engine, tokens[:SLICE_TOKENS])
    torch.testing.assert_close(logits, wide[:SLICE_TOKENS], rtol=0, atol=SAME_MODEL_LOGITS)
