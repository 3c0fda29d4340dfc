"""A token is a pure function of seed, position, logits and history, and as likely as asked for."""

import hashlib
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import BrokenLogitsError
from shared.kimi_linear.philox import uniform
from shared.kimi_linear.sampling import IMPOSSIBLE_LOGPROB, Draw, sample
from shared.messages import Sampling, Token, encode

VOCABULARY = 12

token_lists = st.lists(st.integers(0, VOCABULARY - 1), max_size=6)
seeds = st.integers(-(2**63), 2**63 - 1)
quarters = st.integers(-8, 8).map(lambda number: number / 4)
# Multiples of a quarter stay exact under the penalties below, and no sum of a few of their
# exponentials comes near these parts of the whole: rounding decides nothing.
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.25, 1.0, 2.0]),
    top_p=st.sampled_from([0.137, 0.53, 0.91, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 8, 100]),
    min_p=st.sampled_from([0.0, 0.013, 0.37]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 2.0]),
    presence_penalty=quarters,
    frequency_penalty=quarters,
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), quarters, max_size=3).map(
        lambda bias: tuple(bias.items())
    ),
    seed=seeds,
    top_logprobs=st.sampled_from([None, 0, 3]),
)


@dataclass(frozen=True)
class Request:
    """A row of logits, and what belongs to it."""

    row: tuple[float, ...]
    sampling: Sampling
    prompt: tuple[int, ...]
    text: tuple[int, ...]

    @property
    def draw(self) -> Draw:
        return Draw.of(self.sampling, self.prompt, self.text)


def rows_of(values: st.SearchStrategy[float]) -> st.SearchStrategy[tuple[float, ...]]:
    return st.lists(values, min_size=VOCABULARY, max_size=VOCABULARY).map(tuple)


def requests_with(values: st.SearchStrategy[float]) -> st.SearchStrategy[Request]:
    tokens = token_lists.map(tuple)
    return st.builds(Request, rows_of(values), samplings, tokens, tokens)


requests = requests_with(st.floats(-30, 30, width=32))
exact_requests = requests_with(st.integers(-20, 20).map(lambda number: number / 4))


def drawing(**changes: object) -> Sampling:
    fields: dict[str, object] = {"temperature": 1.0, "top_p": 1.0, "seed": 0}
    return Sampling.model_validate({**fields, **changes})


def sample_all(asked: Sequence[Request]) -> list[bytes]:
    """The tokens as they go over the wire, so that equal means equal in every bit."""
    logits = torch.tensor([request.row for request in asked])
    return [encode(token) for token in sample(logits, [request.draw for request in asked])]


def token_of(row: Sequence[float], sampling: Sampling, position: int = 0) -> Token:
    (token,) = sample(torch.tensor([row]), [Draw.of(sampling, [0] * position)])
    return token


# --- pure ------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(asked=st.lists(requests, min_size=1, max_size=6))
def test_the_rest_of_the_batch_does_not_matter(asked: list[Request]) -> None:
    together = sample_all(asked)
    assert together == [sample_all([request])[0] for request in asked]
    assert together[::-1] == sample_all(asked[::-1])


def large_batch() -> tuple[torch.Tensor, list[Draw]]:
    """Rows of many tokens, flat and steep, with every combination of parameters."""
    generator = torch.Generator().manual_seed(5)
    asked = [
        drawing(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=penalty,
            frequency_penalty=penalty - 1,
            top_logprobs=top_logprobs,
            seed=top_k,
        )
        for temperature in (0, 0.7, 1.3)
        for top_p in (0.9, 1)
        for top_k, min_p in ((0, 0), (40, 0), (3000, 0.001))
        for penalty, top_logprobs in ((1, None), (1.2, 20))
    ]
    steepness = torch.linspace(0.5, 6, len(asked))[:, None]
    logits = torch.randn(len(asked), 20_011, generator=generator) * steepness
    prompt, text = range(0, 20_000, 7), range(0, 20_000, 5)
    return logits, [Draw.of(sampling, prompt, text) for sampling in asked]


def digest(tokens: Sequence[Token]) -> str:
    return hashlib.sha256(b"".join(map(encode, tokens))).hexdigest()


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_no_bit_depends_on_how_many_rows_of_a_large_vocabulary_are_sampled_together(
    size: int,
) -> None:
    logits, draws = large_batch()
    parts: list[Token] = []
    for start in range(0, len(draws), size):
        parts += sample(logits[start : start + size], draws[start : start + size])
    assert digest(parts) == digest(sample(logits, draws))


def test_no_bit_depends_on_the_process_or_its_threads() -> None:
    program = """if True:
        import torch
        from tests.model.test_sampling import digest, large_batch, sample
        torch.set_num_threads(3)
        print(digest(sample(*large_batch())))
    """
    output = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert output.strip() == digest(sample(*large_batch()))


def test_the_logits_are_left_as_they_are() -> None:
    logits, draws = large_batch()
    before = logits.clone()
    sample(logits, draws)
    assert torch.equal(logits, before)


def test_a_draw_that_followed_its_tokens_is_the_one_of_the_whole_text() -> None:
    sampling = drawing(repetition_penalty=1.5, frequency_penalty=0.5, top_logprobs=2)
    draw = Draw.of(sampling, [1, 2, 3])
    text: list[int] = []
    for step in range(40):
        logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(step))
        grown, anew = sample(logits.expand(2, -1), [draw, Draw.of(sampling, [1, 2, 3], text)])
        assert grown == anew
        text.append(grown.token_id)
        draw = draw.followed_by(grown.token_id)


def test_an_empty_batch_has_no_tokens() -> None:
    assert sample(torch.empty(0, 5), []) == []


# --- from the right distribution -------------------------------------------------------------


def by_the_book(request: Request) -> list[float]:
    """The probabilities that the definitions give, token by token, in the order of vLLM."""
    sampling, text = request.sampling, request.text
    logits = list(request.row)
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    for token in {*request.prompt, *text}:
        factor = sampling.repetition_penalty
        logits[token] *= 1 / factor if logits[token] > 0 else factor
        logits[token] -= text.count(token) * sampling.frequency_penalty
        logits[token] -= (token in text) * sampling.presence_penalty
    order = sorted(range(VOCABULARY), key=lambda token: (-logits[token], token))
    if sampling.temperature == 0:
        return [float(token == order[0]) for token in range(VOCABULARY)]
    top = logits[order[0]]
    weights = [math.exp((logit - top) / sampling.temperature) for logit in logits]
    order = order[: sampling.top_k or None]
    order = [token for token in order if weights[token] >= sampling.min_p]
    enough = sampling.top_p * sum(weights[token] for token in order)
    before = np.cumsum([0, *(weights[token] for token in order)])[:-1]
    nucleus = [token for token, mass in zip(order, before, strict=True) if mass < enough]
    total = sum(weights[token] for token in nucleus)
    return [weights[token] / total if token in nucleus else 0 for token in range(VOCABULARY)]


@settings(max_examples=300, deadline=None)
@given(request=exact_requests)
def test_the_token_is_where_its_number_falls_among_the_probabilities(request: Request) -> None:
    (token,) = sample(torch.tensor([request.row]), [request.draw])
    probabilities = by_the_book(request)
    probability = probabilities[token.token_id]
    assert probability > 0
    if request.sampling.temperature > 0:
        before = sum(probabilities[: token.token_id])
        number = uniform(request.sampling.seed, len(request.prompt) + len(request.text))
        assert before - 1e-6 <= number <= before + probability + 1e-6


def test_temperature_zero_takes_the_first_of_the_most_likely() -> None:
    assert token_of([0.0, 7.0, 7.0, 1.0], drawing(temperature=0)).token_id == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_at_the_temperature(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    draws = [Draw(drawing(temperature=temperature), position, None) for position in range(4000)]
    tokens = sample(logits.expand(len(draws), 4), draws)
    counts = np.bincount([token.token_id for token in tokens], minlength=4)
    expected = (logits / temperature).softmax(dim=-1).numpy()
    assert np.abs(counts / len(draws) - expected).max() < 0.03


@pytest.mark.parametrize("temperature", [0, 1])
def test_the_largest_bias_forces_a_token(temperature: float) -> None:
    forced = drawing(temperature=temperature, logit_bias=((2, 100.0),))
    assert token_of([20.0, 0.0, -20.0, 5.0], forced).token_id == 2


# --- log probabilities -----------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(request=requests, count=st.integers(0, VOCABULARY + 3))
def test_logprobs_are_those_of_the_logits_as_the_model_gave_them(
    request: Request, count: int
) -> None:
    asked = request.sampling.model_copy(update={"top_logprobs": count})
    draw = Draw.of(asked, request.prompt, request.text)
    (token,) = sample(torch.tensor([request.row]), [draw])
    expected = torch.tensor(request.row, dtype=torch.float64).log_softmax(dim=-1).tolist()
    assert token.logprob == pytest.approx(expected[token.token_id], rel=1e-6, abs=1e-6)
    ranked = sorted(range(VOCABULARY), key=lambda t: (-request.row[t], t))[:count]
    assert [other for other, _ in token.top_logprobs] == ranked
    assert [logprob for _, logprob in token.top_logprobs] == pytest.approx(
        [expected[t] for t in ranked], rel=1e-6, abs=1e-6
    )


def test_logprobs_are_left_out_when_nobody_asked() -> None:
    token = token_of([0.0] * 4, drawing())
    assert token.logprob is None
    assert token.top_logprobs == ()


def test_of_equally_likely_tokens_the_lower_are_reported() -> None:
    token = token_of([0.0] * 300, drawing(top_logprobs=3))
    assert [other for other, _ in token.top_logprobs] == [0, 1, 2]


# --- extreme and broken logits ---------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 1e-300, 1.0, 1e300])
def test_impossible_tokens_are_never_drawn(temperature: float) -> None:
    row = [-math.inf, 3e38, -3e38, -math.inf, 3e38]
    sampling = drawing(temperature=temperature, top_logprobs=5)
    for position in range(50):
        token = token_of(row, sampling, position)
        assert token.token_id in ({1} if temperature == 0 else {1, 2, 4})
        reported = [token.logprob, *(logprob for _, logprob in token.top_logprobs)]
        assert all(value is not None and value >= IMPOSSIBLE_LOGPROB for value in reported)


@pytest.mark.parametrize("limits", [{"top_k": 4}, {"min_p": 0.0, "top_p": 0.999}, {"min_p": 1e-9}])
def test_impossible_tokens_are_not_kept_for_want_of_others(limits: dict[str, float]) -> None:
    row = [-math.inf, 1.0, -math.inf, 2.0, -math.inf]
    drawn = {token_of(row, drawing(**limits), position).token_id for position in range(50)}
    assert drawn == {1, 3}


def test_one_possible_token_is_certain() -> None:
    row = [-math.inf] * 5
    row[3] = -1e30
    token = token_of(row, drawing(top_p=0.5, top_logprobs=1))
    assert (token.token_id, token.logprob) == (3, 0)


def test_equally_likely_tokens_stay_so_however_large_their_logits() -> None:
    assert token_of([3e38, 3e38], drawing(top_logprobs=0)).logprob == pytest.approx(-math.log(2))


@pytest.mark.parametrize("broken", [[math.nan, 0, 0], [math.inf, 0, 0], [-math.inf] * 3])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_numbers_are_refused_with_their_rows(
    broken: list[float], temperature: float
) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], broken, [2.0, 1.0, 0.0]])
    with pytest.raises(BrokenLogitsError) as refusal:
        sample(logits, [Draw.of(drawing(temperature=temperature), [])] * 3)
    assert refusal.value.rows == (1,)


@settings(max_examples=100, deadline=None)
@given(
    row=rows_of(st.floats(width=32, allow_nan=False, allow_infinity=False)),
    sampling=samplings,
    repetition_penalty=st.floats(0, exclude_min=True, allow_infinity=False),
    text=token_lists,
)
def test_no_parameter_breaks_a_sound_row(
    row: tuple[float, ...], sampling: Sampling, repetition_penalty: float, text: list[int]
) -> None:
    asked = sampling.model_copy(update={"repetition_penalty": repetition_penalty})
    (token,) = sample(torch.tensor([row]), [Draw.of(asked, text, text)])
    assert 0 <= token.token_id < VOCABULARY
