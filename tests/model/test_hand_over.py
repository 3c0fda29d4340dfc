"""A state may move at any time, in any batch: what follows is as if it had stayed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.exactness import HAND_OVER, Difference, moved, scattered_state
from shared.kernels.dtypes import WeightDType
from shared.kimi_linear.engine import Engine, Room
from shared.kimi_linear.request_state import RequestState
from tests.model.tolerances import SAME_MODEL_LOGITS

Arrays = dict[str, NDArray[Any]]
Greedy = Callable[[Tensor, RequestState, int], list[int]]

STEPS = 32


@pytest.fixture
def held() -> Iterator[ExitStack]:
    """Releases states at the end."""
    with ExitStack() as held:
        yield held


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_state_that_moves_gives_the_same_bits_whatever_the_weights(
    reference_directory: Path, dtype: WeightDType
) -> None:
    engine = Engine.load(reference_directory, dtype)
    texts = len(HAND_OVER.pairs)
    assert HAND_OVER.difference(engine, lengths=[140]) == Difference(0.0, texts, texts)


@pytest.mark.parametrize("cut", [1, 2, 3, 63, 64, 65, 127, 128, 130, 199])
def test_a_prompt_goes_on_at_any_cut_and_gives_the_references_text(
    engine: Engine, reference: Arrays, held: ExitStack, greedy: Greedy, cut: int
) -> None:
    prompt = reference["tokens_200"].tolist()
    first = held.enter_context(engine.new_state(300))
    engine.prefill([prompt[:cut]], [first])
    second = moved(engine, first, held)
    logits = engine.prefill([prompt[cut:]], [second])[0]
    expected = torch.from_numpy(reference["logits_200"][-1])
    torch.testing.assert_close(logits, expected, rtol=0, atol=SAME_MODEL_LOGITS)
    assert greedy(logits, second, STEPS) == reference["greedy_200"].tolist()


def test_latents_arrive_piece_by_piece_in_pages_that_are_not_neighbours(
    engine: Engine, reference_directory: Path, reference: Arrays, held: ExitStack
) -> None:
    prompt = reference["tokens_200"].tolist()
    first = held.enter_context(engine.new_state(150))
    engine.prefill([prompt[:150]], [first])
    other_engine = Engine.load(reference_directory, "float32", room=Room(slots=12, tokens=1024))
    second = scattered_state(other_engine, 300, held)
    for start, stop in ((0, 50), (50, 64), (64, 129), (129, 150)):
        second.import_latents(start, first.export_latents(start, stop))
    second.import_snapshot(first.snapshot())
    second.finish_import(150)
    logits = other_engine.prefill([prompt[150:]], [second])[0]
    expected = torch.from_numpy(reference["logits_200"][-1])
    torch.testing.assert_close(logits, expected, rtol=0, atol=SAME_MODEL_LOGITS)


@pytest.mark.parametrize("cut", [1, 63, 64])
def test_all_requests_of_a_packed_prefill_may_move_and_be_packed_in_another_order(
    engine: Engine, reference: Arrays, held: ExitStack, greedy: Greedy, cut: int
) -> None:
    lengths = [65, 1000, 200]
    prompts = [reference[f"tokens_{length}"].tolist() for length in lengths]
    states = [held.enter_context(engine.new_state(length + STEPS)) for length in lengths]
    engine.prefill([prompt[:cut] for prompt in prompts], states)
    new = [moved(engine, state, held) for state in states]
    logits = engine.prefill([prompt[cut:] for prompt in reversed(prompts)], new[::-1])
    for length, row, state in zip(lengths, reversed(logits), new, strict=True):
        expected = torch.from_numpy(reference[f"logits_{length}"][-1])
        torch.testing.assert_close(row, expected, rtol=0, atol=SAME_MODEL_LOGITS)
        assert greedy(row, state, STEPS) == reference[f"greedy_{length}"].tolist()


def test_a_request_of_a_decode_batch_moves_between_steps_and_goes_on_in_another_batch(
    engine: Engine, reference: Arrays, held: ExitStack
) -> None:
    lengths = [65, 200, 2]
    texts = {length: reference[f"greedy_{length}"].tolist() for length in lengths}
    states = {length: held.enter_context(engine.new_state(300)) for length in lengths}
    prompts = [reference[f"tokens_{length}"].tolist() for length in lengths]
    logits = engine.prefill(prompts, list(states.values()))
    batch = lengths
    for step in range(STEPS):
        assert logits.argmax(dim=-1).tolist() == [texts[length][step] for length in batch]
        if step == STEPS // 2:
            states[200] = moved(engine, states[200], held)
            batch = [200, 65]
        logits = engine.decode(
            [texts[length][step] for length in batch], [states[length] for length in batch]
        )
