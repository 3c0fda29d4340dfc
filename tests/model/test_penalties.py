"""Bias and penalties change the logits of the tokens they name, and no others."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.kimi_linear.penalties import History, apply_bias, apply_penalties
from shared.messages import Sampling

IMPOSSIBLE = -math.inf
LARGEST = float(np.finfo(np.float32).max)

token_lists = st.lists(st.integers(0, 9), max_size=12)


def biased(logits: list[float], bias: dict[int, float]) -> list[float]:
    changed = np.array(logits, dtype=np.float32)
    apply_bias(changed, bias.items())
    return [float(logit) for logit in changed]


def penalised(
    logits: list[float], prompt: list[int], text: list[int], **penalties: float
) -> list[float]:
    changed = np.array(logits, dtype=np.float32)
    sampling = Sampling(temperature=1, top_p=1, seed=0, **penalties)
    apply_penalties(changed, sampling, History.of(prompt, text))
    return [float(logit) for logit in changed]


# --- bias ------------------------------------------------------------------------------------


def test_a_bias_is_added_to_its_token() -> None:
    assert biased([1, 2, 3], {2: -100, 0: 0.5}) == [1.5, 2, -97]


def test_no_bias_makes_an_impossible_token_possible() -> None:
    assert biased([IMPOSSIBLE, 0], {0: 100}) == [IMPOSSIBLE, 0]


# --- penalties -------------------------------------------------------------------------------


def test_the_repetition_penalty_divides_positive_logits_and_multiplies_the_others() -> None:
    assert penalised([4, -4, 0, 4], [0, 1, 2], [], repetition_penalty=2) == [2, -8, 0, 4]
    assert penalised([4, -4, 0, 4], [0, 1, 2], [], repetition_penalty=0.5) == [8, -2, 0, 4]


def test_the_repetition_penalty_counts_prompt_and_text_and_each_token_once() -> None:
    assert penalised([8, 8, 8], [0, 0, 1], [0, 0], repetition_penalty=2) == [4, 4, 8]
    assert penalised([8, 8, 8], [0], [2, 2, 2], repetition_penalty=2) == [4, 8, 4]


def test_the_presence_penalty_counts_each_token_of_the_text_once() -> None:
    assert penalised([1, 1, 1], [0, 1], [1, 1, 2], presence_penalty=0.5) == [1, 0.5, 0.5]


def test_the_frequency_penalty_counts_every_time_a_token_is_in_the_text() -> None:
    assert penalised([1, 1, 1], [0, 0, 1], [1, 1, 2], frequency_penalty=0.5) == [1, 0, 0.5]


def test_a_negative_penalty_makes_tokens_more_likely() -> None:
    assert penalised([0, 0], [], [0, 0], presence_penalty=-1, frequency_penalty=-2) == [5, 0]


def test_the_repetition_penalty_comes_before_the_others() -> None:
    changed = penalised(
        [8, 8], [], [0, 0], repetition_penalty=2, presence_penalty=1, frequency_penalty=0.25
    )
    assert changed == [8 / 2 - 1 - 2 * 0.25, 8]


@pytest.mark.parametrize("repetition_penalty", [5e-324, 1e-45, 1e300])
def test_no_penalty_takes_a_logit_out_of_the_finite_numbers(repetition_penalty: float) -> None:
    changed = penalised(
        [3e38, -3e38, 0, IMPOSSIBLE, 1],
        [0, 1, 2, 3],
        [4],
        repetition_penalty=repetition_penalty,
        presence_penalty=2,
    )
    assert changed[3] == IMPOSSIBLE
    assert all(abs(logit) <= LARGEST for index, logit in enumerate(changed) if index != 3)


# --- history ---------------------------------------------------------------------------------


@given(prompt=token_lists, text=token_lists)
def test_a_history_holds_each_token_once_and_how_often_it_was_said(
    prompt: list[int], text: list[int]
) -> None:
    history = History.of(prompt, text)
    assert history.seen.tolist() == sorted({*prompt, *text})
    assert history.counts.tolist() == [Counter(text)[token] for token in history.seen.tolist()]


@given(prompt=token_lists, text=token_lists, more=token_lists)
def test_a_history_that_grew_is_the_one_of_the_whole_text(
    prompt: list[int], text: list[int], more: list[int]
) -> None:
    grown = History.of(prompt, text)
    for token_id in more:
        grown = grown.followed_by(token_id)
    whole = History.of(prompt, text + more)
    assert grown.seen.tolist() == whole.seen.tolist()
    assert grown.counts.tolist() == whole.counts.tolist()


@given(prompt=token_lists, text=token_lists, token_id=st.integers(0, 9))
def test_a_history_stays_as_it_is_when_a_longer_one_is_made(
    prompt: list[int], text: list[int], token_id: int
) -> None:
    history = History.of(prompt, text)
    before = (history.seen.tolist(), history.counts.tolist())
    history.followed_by(token_id)
    assert (history.seen.tolist(), history.counts.tolist()) == before
