"""Texts get stuck: going on so is to be unlikely, and leaving it is scored."""

import random

from hypothesis import given
from hypothesis import strategies as st

from training.escapes import BETWEEN, PIECE, REPEATS, with_loops
from training.recall import UNSCORED


@given(st.integers(0, 1000), st.integers(250, 600))
def test_a_text_goes_on_where_it_got_stuck(seed: int, length: int) -> None:
    text = list(range(length))
    stuck = with_loops(random.Random(seed), text, length, escape_weight=5, loop_weight=2)
    assert len(stuck.ids) == len(stuck.weights) == length
    scored = [i for i, w in zip(stuck.ids, stuck.weights, strict=True) if w > UNSCORED]
    assert scored == text[: len(scored)]
    escapes = [n for n, weight in enumerate(stuck.weights) if weight == 5]
    assert all(stuck.ids[n] == stuck.ids[n - 1] + 1 for n in escapes)
    assert all(stuck.weights[n - 1] == -2 for n in escapes)
    assert len(escapes) <= length // BETWEEN[0]
    assert stuck.weights.count(UNSCORED) >= PIECE[0]


@given(st.integers(0, 1000))
def test_what_comes_a_third_time_is_to_be_unlikely_and_nothing_else_is(seed: int) -> None:
    text = list(range(600))
    stuck = with_loops(random.Random(seed), text, 600, escape_weight=5, loop_weight=2)
    seen = dict.fromkeys(text, 0)
    for token, weight in zip(stuck.ids, stuck.weights, strict=True):
        seen[token] += 1
        assert (weight < 0) == (seen[token] > 2)
        assert (weight == UNSCORED) == (seen[token] == 2)
    assert 2 < max(seen.values()) <= 1 + REPEATS[1]
