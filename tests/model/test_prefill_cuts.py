"""A prompt may be cut anywhere: logits, state and text stay the same."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from shared.kimi_linear import engine as engine_module
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.request_state import RequestState
from tests.model.tolerances import SAME_MODEL_LOGITS

Arrays = dict[str, NDArray[Any]]
Greedy = Callable[[Tensor, RequestState, int], list[int]]

CUTS = [63, 64, 65, 127, 128, 130]


@pytest.fixture(scope="module")
def prompt(reference: Arrays) -> list[int]:
    tokens: list[int] = reference["tokens_200"].tolist()
    return tokens


@pytest.fixture(scope="module")
def at_once(engine: Engine, prompt: list[int]) -> Tensor:
    """Logits of the prompt in one forward pass."""
    with engine.new_state(300) as state:
        return engine.prefill([prompt], [state])[0]


@pytest.fixture
def state(engine: Engine) -> Iterator[RequestState]:
    with engine.new_state(300) as state:
        yield state


@pytest.fixture
def assert_same_end(
    at_once: Tensor, reference: Arrays, greedy: Greedy
) -> Callable[[Tensor, RequestState], None]:
    def check(logits: Tensor, state: RequestState) -> None:
        torch.testing.assert_close(logits, at_once, rtol=0, atol=SAME_MODEL_LOGITS)
        assert greedy(logits, state, 32) == reference["greedy_200"].tolist()

    return check


Check = Callable[[Tensor, RequestState], None]


@pytest.mark.parametrize("size", [1, *CUTS])
def test_chunks_of_any_size_give_the_same_text(
    engine: Engine, state: RequestState, assert_same_end: Check, prompt: list[int], size: int
) -> None:
    for start in range(0, len(prompt), size):
        logits = engine.prefill([prompt[start : start + size]], [state])[0]
    assert state.length == len(prompt)
    assert_same_end(logits, state)


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(cuts=st.sets(st.integers(1, 199), max_size=8))
def test_any_cuts_leave_the_same_logits_and_state(
    engine: Engine, at_once: Tensor, prompt: list[int], cuts: set[int]
) -> None:
    with engine.new_state(200) as whole, engine.new_state(200) as state:
        engine.prefill([prompt], [whole])
        for start, stop in pairwise([0, *sorted(cuts), 200]):
            logits = engine.prefill([prompt[start:stop]], [state])[0]
        torch.testing.assert_close(logits, at_once, rtol=0, atol=SAME_MODEL_LOGITS)
        for found, expected in (
            (state.snapshot().recurrent, whole.snapshot().recurrent),
            (state.snapshot().convolution, whole.snapshot().convolution),
            (state.export_latents(0, 200), whole.export_latents(0, 200)),
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=SAME_MODEL_LOGITS)


def test_tokens_decoded_one_by_one_leave_the_state_that_prefill_leaves(
    engine: Engine, state: RequestState, assert_same_end: Check, prompt: list[int]
) -> None:
    engine.prefill([prompt[:100]], [state])
    for token in prompt[100:]:
        logits = engine.decode([token], [state])[0]
    assert_same_end(logits, state)


def test_slices_inside_the_engine_do_not_show(
    engine: Engine,
    state: RequestState,
    assert_same_end: Check,
    prompt: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_module, "SLICE_TOKENS", 33)
    logits = engine.prefill_all_logits(prompt, state)
    assert logits.shape == (len(prompt), engine.config.vocab_size)
    assert_same_end(logits[-1], state)
