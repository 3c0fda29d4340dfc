"""A token is a pure function of seed, position and logits, of the distribution asked for."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import BrokenLogitsError
from shared.kimi_linear.sampling import IMPOSSIBLE_LOGPROB, nucleus, sample, uniform
from shared.messages import Sampling

VOCABULARY = 12

finite_rows = st.lists(st.floats(-30, 30, width=32), min_size=VOCABULARY, max_size=VOCABULARY)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.2, 1.0, 2.0]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    top_logprobs=st.sampled_from([None, 0, 3]),
)


def drawing(**changes: object) -> Sampling:
    fields: dict[str, object] = {"temperature": 1.0, "top_p": 1.0, "seed": 0}
    return Sampling.model_validate({**fields, **changes})


# --- pure ------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    requests=st.lists(
        st.tuples(finite_rows, samplings, st.integers(0, 2**40)), min_size=1, max_size=5
    )
)
def test_the_rest_of_the_batch_does_not_matter(
    requests: list[tuple[list[float], Sampling, int]],
) -> None:
    rows, wanted, positions = zip(*requests, strict=True)
    together = sample(torch.tensor(rows), wanted, positions)
    alone = [
        sample(torch.tensor([row]), [sampling], [position])[0]
        for row, sampling, position in requests
    ]
    assert together == alone
    backwards = sample(torch.tensor(rows[::-1]), wanted[::-1], positions[::-1])
    assert backwards == together[::-1]


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


@given(seed=st.integers(-(2**63), 2**63 - 1), position=st.integers(0, 2**63))
def test_random_numbers_are_in_the_unit_interval(seed: int, position: int) -> None:
    assert 0 <= uniform(seed, position) < 1


def test_seeds_and_positions_give_unrelated_numbers() -> None:
    by_position = np.array([uniform(1, position) for position in range(2000)])
    by_seed = np.array([uniform(seed, 1) for seed in range(2000)])
    for numbers in (by_position, by_seed):
        assert abs(numbers.mean() - 0.5) < 0.03
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.06


# --- from the right distribution -------------------------------------------------------------


def test_temperature_zero_takes_the_first_of_the_most_likely() -> None:
    logits = torch.tensor([[0.0, 7.0, 7.0, 1.0]])
    assert sample(logits, [drawing(temperature=0)], [3])[0].token_id == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_at_the_temperature(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    draws = 4000
    tokens = sample(
        logits.expand(draws, 4), [drawing(temperature=temperature)] * draws, range(draws)
    )
    counts = np.bincount([token.token_id for token in tokens], minlength=4)
    expected = (logits / temperature).softmax(dim=-1).numpy()
    assert np.abs(counts / draws - expected).max() < 0.03


def plain_nucleus(probabilities: list[float], top_p: float) -> set[int]:
    kept: set[int] = set()
    mass = 0.0
    for token in sorted(range(len(probabilities)), key=lambda t: (-probabilities[t], t)):
        kept.add(token)
        mass += probabilities[token]
        if mass >= top_p:
            break
    return kept


@settings(max_examples=200, deadline=None)
@given(
    eighths=st.lists(st.integers(0, 64), min_size=1, max_size=40).filter(any),
    top_p=st.integers(1, 63).map(lambda part: part / 64),
)
def test_the_nucleus_is_the_smallest_set_of_likely_tokens_with_that_much_mass(
    eighths: list[int], top_p: float
) -> None:
    # Sums of powers of two are exact, so that no rounding decides who is in the nucleus.
    total = 2 ** math.ceil(math.log2(sum(eighths)))
    probabilities = [part / total for part in (*eighths, total - sum(eighths))]
    kept = set(np.flatnonzero(nucleus(np.array(probabilities), top_p)).tolist())
    assert kept == plain_nucleus(probabilities, top_p)


@settings(max_examples=50, deadline=None)
@given(row=finite_rows, top_p=st.floats(0.05, 0.95), seed=st.integers(0, 2**32))
def test_only_tokens_of_the_nucleus_are_drawn(row: list[float], top_p: float, seed: int) -> None:
    probabilities = torch.tensor(row, dtype=torch.float64).softmax(dim=-1).tolist()
    allowed = plain_nucleus(probabilities, top_p + 1e-9)
    token = sample(torch.tensor([row]), [drawing(top_p=top_p, seed=seed)], [0])[0]
    assert token.token_id in allowed


# --- log probabilities -----------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(row=finite_rows, sampling=samplings, count=st.integers(0, VOCABULARY + 3))
def test_logprobs_are_those_of_the_unfiltered_logits(
    row: list[float], sampling: Sampling, count: int
) -> None:
    sampling = sampling.model_copy(update={"top_logprobs": count})
    token = sample(torch.tensor([row]), [sampling], [0])[0]
    expected = torch.tensor(row, dtype=torch.float64).log_softmax(dim=-1).tolist()
    assert token.logprob == pytest.approx(expected[token.token_id])
    ranked = sorted(range(VOCABULARY), key=lambda t: (-row[t], t))[:count]
    assert [other for other, _ in token.top_logprobs] == ranked
    assert [logprob for _, logprob in token.top_logprobs] == pytest.approx(
        [expected[t] for t in ranked]
    )


def test_logprobs_are_left_out_when_nobody_asked() -> None:
    token = sample(torch.zeros(1, 4), [drawing()], [0])[0]
    assert token.logprob is None
    assert token.top_logprobs == ()


# --- extreme and broken logits ---------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 1e-300, 1.0, 1e300])
def test_impossible_tokens_are_never_drawn(temperature: float) -> None:
    row = [-math.inf, 3e38, -3e38, -math.inf, 3e38]
    sampling = drawing(temperature=temperature, top_logprobs=5)
    for position in range(50):
        token = sample(torch.tensor([row]), [sampling], [position])[0]
        assert token.token_id in ({1} if temperature == 0 else {1, 2, 4})
        reported = [token.logprob, *(logprob for _, logprob in token.top_logprobs)]
        assert all(value is not None and value >= IMPOSSIBLE_LOGPROB for value in reported)


def test_one_possible_token_is_certain() -> None:
    row = torch.full((1, 5), -math.inf)
    row[0, 3] = -1e30
    token = sample(row, [drawing(top_p=0.5, top_logprobs=1)], [0])[0]
    assert (token.token_id, token.logprob) == (3, 0)


@pytest.mark.parametrize("broken", [[math.nan, 0, 0], [math.inf, 0, 0], [-math.inf] * 3])
def test_logits_that_are_not_numbers_are_refused_with_their_rows(broken: list[float]) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], broken, [2.0, 1.0, 0.0]])
    with pytest.raises(BrokenLogitsError) as refusal:
        sample(logits, [drawing()] * 3, [0] * 3)
    assert refusal.value.rows == (1,)
