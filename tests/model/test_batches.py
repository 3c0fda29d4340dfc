"""A request's text does not depend on the requests that it is computed with."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from shared.kimi_linear import engine as engine_module
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.model import LayerPassed
from shared.kimi_linear.request_state import RequestState
from tests.model.tolerances import SAME_MODEL_LOGITS

Arrays = dict[str, NDArray[Any]]
NewState = Callable[[], RequestState]

LENGTHS = [1, 2, 63, 64, 65, 200]
STEPS = 32


@pytest.fixture
def new_state(engine: Engine) -> Iterator[NewState]:
    """States with room for 300 tokens, released at the end."""
    with ExitStack() as states:
        yield lambda: states.enter_context(engine.new_state(300))


def prompts_of(reference: Arrays, lengths: Sequence[int]) -> list[list[int]]:
    return [reference[f"tokens_{length}"].tolist() for length in lengths]


def take_over(source: RequestState, target: RequestState) -> None:
    """Import all that another state exports."""
    target.import_latents(0, source.export_latents(0, source.length))
    target.import_snapshot(source.snapshot())
    target.finish_import(source.length)


def greedy_together(
    engine: Engine, logits: Tensor, states: Sequence[RequestState], steps: int
) -> list[list[int]]:
    texts = [[token] for token in logits.argmax(dim=-1).tolist()]
    for _ in range(steps - 1):
        logits = engine.decode([text[-1] for text in texts], states)
        for text, token in zip(texts, logits.argmax(dim=-1).tolist(), strict=True):
            text.append(token)
    return texts


@pytest.mark.parametrize("slice_tokens", [512, 100, 7], ids="slices of {}".format)
@pytest.mark.parametrize("order", [LENGTHS, LENGTHS[::-1]], ids=str)
def test_prompts_that_are_prefilled_and_decoded_together_say_what_each_says_alone(
    engine: Engine,
    reference: Arrays,
    new_state: NewState,
    order: list[int],
    slice_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_module, "SLICE_TOKENS", slice_tokens)
    states = [new_state() for _ in order]
    logits = engine.prefill(prompts_of(reference, order), states)
    expected = torch.stack(
        [torch.from_numpy(reference[f"logits_{length}"][-1]) for length in order]
    )
    torch.testing.assert_close(logits, expected, rtol=0, atol=SAME_MODEL_LOGITS)
    texts = greedy_together(engine, logits, states, STEPS)
    assert texts == [reference[f"greedy_{length}"].tolist() for length in order]
    assert [state.length for state in states] == [length + STEPS - 1 for length in order]


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(1, 140)), min_size=1, max_size=4),
    st.sampled_from([7, 64, 100, 512]),
)
def test_packed_prompts_continue_states_of_any_lengths(
    engine: Engine, requests: list[tuple[int, int]], slice_tokens: int
) -> None:
    """Requests that have seen some tokens, and now get some more."""

    def begun(states: ExitStack, number: int, seen: int) -> RequestState:
        state = states.enter_context(engine.new_state(300))
        if seen:
            engine.prefill([[(31 * number + n) % 512 for n in range(seen)]], [state])
        return state

    more = [
        [(17 * number + 3 * n) % 512 for n in range(count)]
        for number, (_, count) in enumerate(requests)
    ]
    with ExitStack() as states:
        together = [begun(states, number, seen) for number, (seen, _) in enumerate(requests)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_module, "SLICE_TOKENS", slice_tokens)
            logits = engine.prefill(more, together)
        for number, (seen, _) in enumerate(requests):
            alone = begun(states, number, seen)
            expected = engine.prefill([more[number]], [alone])[0]
            torch.testing.assert_close(logits[number], expected, rtol=0, atol=SAME_MODEL_LOGITS)
            torch.testing.assert_close(
                together[number].snapshot().recurrent,
                alone.snapshot().recurrent,
                rtol=0,
                atol=SAME_MODEL_LOGITS,
            )


def test_requests_join_and_leave_between_steps(
    engine: Engine, reference: Arrays, new_state: NewState
) -> None:
    staying = new_state()
    logits = engine.prefill(prompts_of(reference, [200]), [staying])
    text = [int(logits.argmax())]
    for step in range(STEPS - 1):
        with ExitStack() as leaving:
            guests = [leaving.enter_context(engine.new_state(50)) for _ in range(step % 3)]
            if guests:
                engine.prefill([[step + 1, 2]] * len(guests), guests)
            logits = engine.decode([5] * len(guests) + text[-1:], [*guests, staying])
        text.append(int(logits[-1].argmax()))
    assert text == reference["greedy_200"].tolist()


@pytest.fixture(scope="module")
def prefilled(engine: Engine, reference: Arrays) -> Iterator[list[RequestState]]:
    """States of the prompts of all lengths, to be copied."""
    with ExitStack() as held:
        states = [held.enter_context(engine.new_state(length)) for length in LENGTHS]
        engine.prefill(prompts_of(reference, LENGTHS), states)
        yield states


@pytest.fixture(scope="module")
def alone(
    engine: Engine, reference: Arrays, prefilled: list[RequestState]
) -> dict[tuple[int, int], Tensor]:
    """Logits after each token of each text, `[vocabulary]`, decoded one request at a time."""
    logits: dict[tuple[int, int], Tensor] = {}
    for request, length in enumerate(LENGTHS):
        with ExitStack() as held:
            state = held.enter_context(engine.new_state(300))
            take_over(prefilled[request], state)
            for step, token in enumerate(reference[f"greedy_{length}"].tolist()):
                logits[request, step] = engine.decode([token], [state])[0]
    return logits


batch_of_a_step = st.permutations(range(len(LENGTHS))).flatmap(
    lambda order: st.integers(1, len(order)).map(lambda size: tuple(order[:size]))
)


@settings(max_examples=15, deadline=None)
@given(st.lists(batch_of_a_step, min_size=1, max_size=12))
def test_any_requests_may_be_decoded_together_in_any_order_and_others_at_the_next_step(
    engine: Engine,
    reference: Arrays,
    prefilled: list[RequestState],
    alone: dict[tuple[int, int], Tensor],
    batches: list[tuple[int, ...]],
) -> None:
    texts = [reference[f"greedy_{length}"].tolist() for length in LENGTHS]
    steps = [0] * len(LENGTHS)
    with ExitStack() as held:
        states = [held.enter_context(engine.new_state(300)) for _ in LENGTHS]
        for source, state in zip(prefilled, states, strict=True):
            take_over(source, state)
        for batch in batches:
            tokens = [texts[request][steps[request]] for request in batch]
            logits = engine.decode(tokens, [states[request] for request in batch])
            expected = torch.stack([alone[request, steps[request]] for request in batch])
            torch.testing.assert_close(logits, expected, rtol=0, atol=SAME_MODEL_LOGITS)
            for request in batch:
                steps[request] += 1


def test_a_request_that_is_released_between_two_slices_disturbs_no_other(
    engine: Engine, new_state: NewState, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [list(range(120)), list(range(7, 90))]
    (expected,) = engine.prefill(prompts[1:], [new_state()])
    leaving, staying = new_state(), new_state()
    forward = engine._forward

    def compute_and_leave(
        parts: Sequence[Sequence[int]], states: Sequence[RequestState], passed: LayerPassed
    ) -> Tensor:
        hidden = forward(parts, states, passed)
        leaving.release()
        return hidden

    monkeypatch.setattr(engine_module, "SLICE_TOKENS", 50)
    monkeypatch.setattr(engine, "_forward", compute_and_leave)
    logits = engine.prefill(prompts, [leaving, staying])
    torch.testing.assert_close(logits[1], expected, rtol=0, atol=SAME_MODEL_LOGITS)
    with pytest.raises(ValueError, match="released"):
        engine.prefill([[1]], [leaving])


def test_a_state_may_occur_once_in_a_batch(engine: Engine, new_state: NewState) -> None:
    state = new_state()
    with pytest.raises(ValueError, match="each to occur once"):
        engine.decode([1, 2], [state, state])


def test_every_state_needs_its_token(engine: Engine, new_state: NewState) -> None:
    with pytest.raises(ValueError, match="2 requests for 1 states"):
        engine.decode([1, 2], [new_state()])
