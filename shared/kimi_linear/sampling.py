"""Draws tokens: a pure function of seed, position and logits, one request by itself.

Neither the rest of the batch nor the process matters, so that a replacement worker continues the
same text.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import BrokenLogitsError
from shared.messages import Sampling, Token

IMPOSSIBLE_LOGPROB: Final = -9999.0
"""Reported instead of minus infinity, which JSON does not have; OpenAI's value."""

Floats = NDArray[np.float64]


def sample(logits: Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> list[Token]:
    """Draw one token for each of B requests.

    Temperature 0 takes the most likely token, the lowest of equals. Otherwise probabilities are
    softmax(logits / temperature), restricted to the nucleus (see `nucleus`), and the token is where
    a uniform number that only seed and position determine falls among their running sums.

    Log probabilities are those of the logits as they are, without temperature and nucleus.

    Args:
        logits: `[B, vocabulary]`.
        samplings: one for each request.
        positions: index of each token in its request's output.

    Raises:
        BrokenLogitsError: a row holds NaN or plus infinity, or nothing but minus infinity.
    """
    rows = logits.float().numpy(force=True)
    _refuse_broken(rows)
    return [
        _sample_one(row.astype(np.float64), sampling, position)
        for row, sampling, position in zip(rows, samplings, positions, strict=True)
    ]


def _refuse_broken(rows: NDArray[np.float32]) -> None:
    # The maximum of a row is NaN if anything in it is.
    broken = np.flatnonzero(~np.isfinite(rows.max(axis=-1))).tolist()
    if broken:
        raise BrokenLogitsError("the model's logits are not numbers", rows=tuple(broken))


def _sample_one(logits: Floats, sampling: Sampling, position: int) -> Token:
    token_id = _choose(logits, sampling, position)
    if sampling.top_logprobs is None:
        return Token(token_id=token_id)
    logprobs = _log_softmax(logits)
    return Token(
        token_id=token_id,
        logprob=_reportable(logprobs[token_id]),
        top_logprobs=tuple(
            (int(other), _reportable(logprobs[other]))
            for other in _largest(logits, sampling.top_logprobs)
        ),
    )


def _choose(logits: Floats, sampling: Sampling, position: int) -> int:
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = _softmax(logits, sampling.temperature)
    if sampling.top_p < 1:
        probabilities = np.where(nucleus(probabilities, sampling.top_p), probabilities, 0)
    sums = probabilities.cumsum()
    drawn = np.searchsorted(sums, uniform(sampling.seed, position) * sums[-1], side="right")
    # Rounding may put the number on the last sum, behind every token.
    return min(int(drawn), int(probabilities.nonzero()[0][-1]))


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that belongs to a seed and a position: Philox 4x64 keyed by both."""
    key = np.array([seed % 2**64, position], dtype=np.uint64)
    return (int(np.random.Philox(key=key).random_raw()) >> 11) * 2.0**-53


def nucleus(probabilities: Floats, top_p: float) -> NDArray[np.bool_]:
    """The smallest set of most likely tokens whose probabilities sum to at least `top_p`.

    Of equally likely tokens the lower ones come first; the most likely token is always in it.

    Args:
        probabilities: `[vocabulary]`, with sum 1.
        top_p: in (0, 1).

    Returns:
        Membership, `[vocabulary]`.
    """
    kept = np.zeros(probabilities.shape, dtype=np.bool_)
    # Tokens of no more than this have less than 1 - top_p together: only the others need sorting.
    candidates = np.flatnonzero(probabilities > (1 - top_p) / probabilities.size)
    order = candidates[np.argsort(-probabilities[candidates], kind="stable")]
    before = probabilities[order].cumsum() - probabilities[order]
    kept[order[before < top_p]] = True
    kept[probabilities.argmax()] = True
    return kept


def _softmax(logits: Floats, temperature: float) -> Floats:
    # Shifting before dividing keeps every quotient at or below 0, whatever the temperature.
    with np.errstate(over="ignore"):
        weights = np.exp((logits - logits.max()) / temperature)
    probabilities: Floats = weights / weights.sum()
    return probabilities


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max()
    logprobs: Floats = shifted - np.log(np.exp(shifted).sum())
    return logprobs


def _largest(values: Floats, count: int) -> NDArray[np.int64]:
    """Indices of the largest values, largest first, the lower index first of equals."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    smallest = np.partition(values, -min(count, values.size))[-min(count, values.size)]
    candidates = np.flatnonzero(values >= smallest)
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def _reportable(logprob: np.float64) -> float:
    return max(float(logprob), IMPOSSIBLE_LOGPROB)
