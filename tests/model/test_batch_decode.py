"""A request's text does not depend on the requests that it is decoded with."""

from collections.abc import Callable
from typing import Any

import pytest
from numpy.typing import NDArray
from torch import Tensor

from shared.kimi_linear.engine import Engine
from shared.kimi_linear.request_state import RequestState

Arrays = dict[str, NDArray[Any]]
Greedy = Callable[[Tensor, RequestState, int], list[int]]

LENGTHS = [1, 2, 63, 64, 65, 200]
STEPS = 32


def prefilled(engine: Engine, reference: Arrays, length: int) -> tuple[int, RequestState]:
    state = engine.new_state()
    logits = engine.prefill(reference[f"tokens_{length}"].tolist(), state)
    return int(logits.argmax()), state


@pytest.mark.parametrize("order", [LENGTHS, LENGTHS[::-1]])
def test_requests_of_all_lengths_decode_together_as_alone(
    engine: Engine, reference: Arrays, order: list[int]
) -> None:
    tokens, states = zip(*(prefilled(engine, reference, length) for length in order), strict=True)
    texts = [[token] for token in tokens]
    for _ in range(STEPS - 1):
        logits = engine.decode([text[-1] for text in texts], states)
        for text, token in zip(texts, logits.argmax(dim=-1).tolist(), strict=True):
            text.append(token)
    assert texts == [reference[f"greedy_{length}"].tolist() for length in order]
    assert [state.length for state in states] == [length + STEPS - 1 for length in order]


def test_requests_join_and_leave_between_steps(engine: Engine, reference: Arrays) -> None:
    staying = prefilled(engine, reference, 200)
    text = [staying[0]]
    for step in range(STEPS - 1):
        guests = [prefilled(engine, reference, 2) for _ in range(step % 3)]
        batch = [*guests, (text[-1], staying[1])]
        logits = engine.decode([token for token, _ in batch], [state for _, state in batch])
        text.append(int(logits[-1].argmax()))
    assert text == reference["greedy_200"].tolist()


def test_a_state_may_occur_once_in_a_batch(engine: Engine) -> None:
    state = engine.new_state()
    with pytest.raises(ValueError, match="each to occur once"):
        engine.decode([1, 2], [state, state])


def test_every_state_needs_its_token(engine: Engine) -> None:
    with pytest.raises(ValueError, match="2 tokens for 1 states"):
        engine.decode([1, 2], [engine.new_state()])
