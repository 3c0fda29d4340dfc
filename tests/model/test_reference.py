"""The model is the published one: an independent implementation gets the same numbers."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.kimi_linear.engine import Engine
from shared.kimi_linear.request_state import RequestState
from tests.model.tolerances import REFERENCE_LOGITS, REFERENCE_STATE

Arrays = dict[str, NDArray[Any]]
Greedy = Callable[[Tensor, RequestState, int], list[int]]

LENGTHS = [1, 2, 63, 64, 65, 200, 1000]


def prefilled(engine: Engine, reference: Arrays, length: int) -> Tensor:
    with engine.new_state(length) as state:
        return engine.prefill_all_logits(reference[f"tokens_{length}"].tolist(), state)


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_agree_at_every_position(engine: Engine, reference: Arrays, length: int) -> None:
    logits = prefilled(engine, reference, length)
    assert logits.dtype == torch.float32
    assert np.abs(logits.numpy() - reference[f"logits_{length}"]).max() < REFERENCE_LOGITS


@pytest.mark.parametrize("length", LENGTHS)
def test_the_greedy_text_is_the_same(
    engine: Engine, reference: Arrays, greedy: Greedy, length: int
) -> None:
    expected = reference[f"greedy_{length}"].tolist()
    with engine.new_state(length + len(expected)) as state:
        (logits,) = engine.prefill([reference[f"tokens_{length}"].tolist()], [state])
        assert greedy(logits, state, len(expected)) == expected


@pytest.fixture(scope="module")
def state_200(engine: Engine, reference: Arrays) -> Iterator[RequestState]:
    with engine.new_state(200) as state:
        engine.prefill([reference["tokens_200"].tolist()], [state])
        yield state


def layers_of_kind(engine: Engine, kind: str) -> list[int]:
    return [layer for layer, other in enumerate(engine.config.layer_kinds) if other == kind]


def test_recurrent_states_agree(engine: Engine, reference: Arrays, state_200: RequestState) -> None:
    recurrent = state_200.snapshot().recurrent.numpy()
    for index, layer in enumerate(layers_of_kind(engine, "kda")):
        expected = reference[f"state_200_layer{layer}_recurrent_states"]
        assert np.abs(recurrent[index] - expected).max() < REFERENCE_STATE


def test_convolution_states_agree(
    engine: Engine, reference: Arrays, state_200: RequestState
) -> None:
    convolution = state_200.snapshot().convolution.numpy()
    for index, layer in enumerate(layers_of_kind(engine, "kda")):
        last_three = reference[f"state_200_layer{layer}_conv_states"][:, 1:]
        assert np.abs(convolution[index] - last_three).max() < REFERENCE_STATE


def test_latents_agree(engine: Engine, reference: Arrays, state_200: RequestState) -> None:
    latents = state_200.export_latents(0, 200).numpy()
    for index, layer in enumerate(layers_of_kind(engine, "mla")):
        compressed = reference[f"state_200_layer{layer}_keys"]
        key_rope = reference[f"state_200_layer{layer}_values"]
        expected = np.concatenate((compressed, key_rope), axis=-1)[0]
        assert np.abs(latents[index] - expected).max() < REFERENCE_STATE
