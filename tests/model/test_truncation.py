"""What top_k, min_p and top_p keep: a head of the tokens in order of their probability."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.kimi_linear.truncation import truncate
from shared.messages import Sampling

NEUTRAL = {"top_k": 0, "min_p": 0.0, "top_p": 1.0}

# Powers of two add up without rounding, so that no rounding decides who is kept.
exact_weights = st.lists(st.integers(0, 8).map(lambda n: 2.0**-n), max_size=40).map(
    lambda others: [*others, 1.0]
)
limits = st.fixed_dictionaries(
    {
        "top_k": st.integers(0, 50),
        "min_p": st.integers(0, 64).map(lambda part: part / 64),
        "top_p": st.integers(1, 64).map(lambda part: part / 64),
    }
)


def sampling(**changes: float) -> Sampling:
    return Sampling.model_validate({"temperature": 1, "seed": 0, **NEUTRAL, **changes})


def kept(weights: list[float], **changes: float) -> list[int]:
    truncated = np.array([weights], dtype=np.float32)
    truncate(truncated, [sampling(**changes)])
    assert set(truncated[0].tolist()) <= {0, *weights}
    return np.flatnonzero(truncated[0]).tolist()


def by_the_book(weights: list[float], top_k: int, min_p: float, top_p: float) -> list[int]:
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    order = order[: top_k or None]
    order = [token for token in order if weights[token] >= min_p * weights[order[0]]]
    wanted = top_p * sum(weights[token] for token in order)
    mass = 0.0
    for length, token in enumerate(order, start=1):
        mass += weights[token]
        if mass >= wanted:
            return sorted(order[:length])
    return sorted(order)


def test_nothing_is_left_out_by_neutral_limits() -> None:
    assert kept([0.25, 1, 2.0**-100, 0.5]) == [0, 1, 2, 3]


def test_top_k_keeps_the_k_likeliest_and_the_lower_of_equals() -> None:
    assert kept([0.5, 1, 0.5, 0.25, 0.5], top_k=3) == [0, 1, 2]
    assert kept([0.5, 1], top_k=1000) == [0, 1]


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest() -> None:
    assert kept([0.25, 1, 0.5, 0.125], min_p=0.25) == [0, 1, 2]
    assert kept([0.25, 1, 0.5, 1], min_p=1) == [1, 3]


def test_top_p_keeps_the_smallest_head_with_that_much_mass() -> None:
    assert kept([0.5, 1, 0.25, 0.25], top_p=0.5) == [1]
    assert kept([0.5, 1, 0.25, 0.25], top_p=0.51) == [0, 1]
    assert kept([0.5, 1, 0.25, 0.25], top_p=0.8) == [0, 1, 2]


def test_top_p_is_of_what_the_others_keep() -> None:
    assert kept([1, 1, 1, 1], top_p=0.5) == [0, 1]
    assert kept([1, 1, 1, 1], top_k=2, top_p=0.5) == [0]
    assert kept([1, 1, 0.5, 0.5], min_p=0.75, top_p=0.5) == [0]


def test_the_likeliest_token_is_kept_by_the_smallest_top_p() -> None:
    assert kept([0.5, 1], top_p=5e-324) == [1]


@settings(deadline=None)
@given(rows=st.lists(st.tuples(exact_weights, limits), min_size=1, max_size=4))
def test_each_row_keeps_what_its_own_limits_say(
    rows: list[tuple[list[float], dict[str, float]]],
) -> None:
    width = max(len(weights) for weights, _ in rows)
    together = np.array(
        [weights + [0.0] * (width - len(weights)) for weights, _ in rows], dtype=np.float32
    )
    truncate(together, [sampling(**asked) for _, asked in rows])
    for row, (weights, asked) in zip(together, rows, strict=True):
        assert np.flatnonzero(row).tolist() == by_the_book(
            weights, int(asked["top_k"]), asked["min_p"], asked["top_p"]
        )


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32), asked=limits, top_k=st.sampled_from([0, 1, 1500, 2500]))
def test_heads_of_thousands_of_tokens_are_kept_as_short_ones_are(
    seed: int, asked: dict[str, float], top_k: int
) -> None:
    weights = (2.0 ** -np.random.default_rng(seed).integers(0, 5, 3000)).tolist()
    weights[seed % 3000] = 1.0
    asked = asked | {"top_k": top_k}
    assert kept(weights, **asked) == by_the_book(weights, top_k, asked["min_p"], asked["top_p"])
