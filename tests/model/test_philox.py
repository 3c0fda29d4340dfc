"""The random numbers are those of Philox 4x64-10, wherever they are computed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.kimi_linear.philox import uniform

seeds = st.integers(-(2**63), 2**63 - 1)


@pytest.mark.parametrize(
    ("seed", "position", "expected"),
    [
        (0, 0, 0.011546754286331562),
        (0, 1, 0.8133540609793564),
        (-1, 0, 0.23494158814525556),
        (2**63 - 1, 2**40, 0.8413283553663722),
    ],
)
def test_random_numbers_are_the_same_on_every_machine(
    seed: int, position: int, expected: float
) -> None:
    assert uniform(seed, position) == expected


@given(seed=seeds, position=st.integers(0, 2**64 - 1))
def test_a_number_is_the_first_of_numpys_generator_with_that_key(seed: int, position: int) -> None:
    key = np.array([seed % 2**64, position], dtype=np.uint64)
    assert uniform(seed, position) == np.random.Generator(np.random.Philox(key=key)).random()


def test_seeds_and_positions_give_unrelated_numbers() -> None:
    by_position = np.array([uniform(1, position) for position in range(2000)])
    by_seed = np.array([uniform(seed, 1) for seed in range(2000)])
    for numbers in (by_position, by_seed):
        assert abs(numbers.mean() - 0.5) < 0.03
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.06
