"""Texts get stuck, and what leaves a repetition is scored."""

import random

from hypothesis import given
from hypothesis import strategies as st

from training.escapes import BETWEEN, PIECE, REPEATS, with_loops
from training.recall import UNSCORED


@given(st.integers(0, 1000), st.integers(200, 600))
def test_a_text_goes_on_where_it_got_stuck(seed: int, length: int) -> None:
    text = list(range(length))
    stuck = with_loops(random.Random(seed), text, length, escape_weight=5)
    assert len(stuck.ids) == len(stuck.weights) == length
    scored = [i for i, w in zip(stuck.ids, stuck.weights, strict=True) if w != UNSCORED]
    assert scored == text[: len(scored)]
    escapes = [n for n, weight in enumerate(stuck.weights) if weight == 5]
    assert all(stuck.ids[n] == stuck.ids[n - 1] + 1 for n in escapes)
    assert all(stuck.weights[n - 1] == UNSCORED for n in escapes)
    assert len(escapes) <= length // BETWEEN[0]
    assert stuck.weights.count(UNSCORED) >= REPEATS[0] * PIECE[0]
