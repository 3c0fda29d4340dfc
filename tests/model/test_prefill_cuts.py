"""A prompt may be cut anywhere, and its state may move in between: the text stays the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.kimi_linear import engine as engine_module
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.request_state import RequestState

Arrays = dict[str, NDArray[Any]]
Greedy = Callable[[Tensor, RequestState, int], list[int]]

CUTS = [63, 64, 65, 127, 128, 130]


@pytest.fixture(scope="module")
def prompt(reference: Arrays) -> list[int]:
    tokens: list[int] = reference["tokens_200"].tolist()
    return tokens


def assert_same_end(logits: Tensor, state: RequestState, reference: Arrays, greedy: Greedy) -> None:
    expected = torch.from_numpy(reference["logits_200"][-1])
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3)
    assert greedy(logits, state, 32) == reference["greedy_200"].tolist()


@pytest.mark.parametrize("size", [1, *CUTS])
def test_chunks_of_any_size_give_the_same_text(
    engine: Engine, reference: Arrays, greedy: Greedy, prompt: list[int], size: int
) -> None:
    state = engine.new_state()
    for start in range(0, len(prompt), size):
        logits = engine.prefill(prompt[start : start + size], state)
    assert state.length == len(prompt)
    assert_same_end(logits, state, reference, greedy)


@pytest.mark.parametrize("cut", [1, 2, 3, *CUTS, 199])
def test_a_state_restored_at_any_cut_continues_the_same_text(
    engine: Engine, reference: Arrays, greedy: Greedy, prompt: list[int], cut: int
) -> None:
    exported = engine.new_state()
    engine.prefill(prompt[:cut], exported)
    parts = [exported.export_latents(0, cut // 2), exported.export_latents(cut // 2, cut)]
    state = RequestState.restore(engine.layout, exported.snapshot(), torch.cat(parts, dim=1))
    logits = engine.prefill(prompt[cut:], state)
    assert_same_end(logits, state, reference, greedy)


def test_tokens_decoded_one_by_one_leave_the_state_that_prefill_leaves(
    engine: Engine, reference: Arrays, greedy: Greedy, prompt: list[int]
) -> None:
    state = engine.new_state()
    engine.prefill(prompt[:100], state)
    for token in prompt[100:]:
        logits = engine.decode([token], [state])[0]
    assert_same_end(logits, state, reference, greedy)


def test_slices_inside_the_engine_do_not_show(
    engine: Engine,
    reference: Arrays,
    greedy: Greedy,
    prompt: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_module, "SLICE_TOKENS", 33)
    state = engine.new_state()
    logits = engine.prefill_all_logits(prompt, state)
    assert logits.shape == (len(prompt), engine.config.vocab_size)
    assert_same_end(logits[-1], state, reference, greedy)
