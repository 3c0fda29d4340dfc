"""Draws tokens: a pure function of seed, position, logits and history, one request by itself.

Neither the rest of the batch nor the process matters, so that a replacement worker continues the
same text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import BrokenLogitsError
from shared.kimi_linear.penalties import History, apply_bias, apply_penalties, reads_history
from shared.kimi_linear.philox import uniform
from shared.kimi_linear.truncation import head, truncate, truncates
from shared.messages import Sampling, Token

IMPOSSIBLE_LOGPROB: Final = -9999.0
"""Reported instead of minus infinity, which JSON does not have; OpenAI's value."""

_BLOCK: Final = 256
"""Tokens whose weights are added up before a number is placed among them."""

_CACHED: Final = 2**17
"""Values that are computed together: half a mebibyte of float32."""

_TEMPERATURES: Final = (1e-38, 1e38)
"""What float32 can divide by; beyond, the likeliest token is certain, or all are alike, anyway."""

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Draw:
    """What determines a request's next token, beside its logits."""

    sampling: Sampling
    position: int
    """Of the token, in prompt and text together."""
    history: History | None
    """None where the sampling does not look at it."""

    @classmethod
    def of(cls, sampling: Sampling, prompt: Sequence[int], text: Sequence[int] = ()) -> Self:
        """The draw that follows a prompt and a text, empty or continued from another worker."""
        history = History.of(prompt, text) if reads_history(sampling) else None
        return cls(sampling, len(prompt) + len(text), history)

    def followed_by(self, token_id: int) -> "Draw":
        """The draw that comes after this one gave a token."""
        history = None if self.history is None else self.history.followed_by(token_id)
        return replace(self, position=self.position + 1, history=history)


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[Token]:
    """Draw one token for each of B requests.

    The order of operations is vLLM's: bias and penalties change the logits, temperature 0 takes the
    most likely token (the lowest of equals), and otherwise probabilities are
    softmax(logits / temperature), of which `top_k`, `min_p` and `top_p` keep the likeliest (see
    `truncate`). The token is where a uniform number that only seed and position determine falls
    among the running sums of what is kept, in order of token ids.

    Log probabilities are those of the logits as the model gave them, without bias, penalties,
    temperature and truncation (vLLM's `raw_logprobs`).

    Rows never meet in an operation, and a row is added up in the same order whatever stands beside
    it. A request that asks for less costs less: with temperature 0 and nothing else, an `argmax`.

    Logits of another device come to this one first. Computed there it would be the same steps, each
    a kernel over rows (a selection instead of the partition), and only token ids would come back.

    Args:
        logits: `[B, vocabulary]`; they are left as they are.
        draws: one for each request.

    Raises:
        BrokenLogitsError: a row holds NaN or plus infinity, or nothing but minus infinity.
    """
    rows = logits.float().numpy(force=True)
    token_ids = rows.argmax(axis=-1)
    _refuse_broken(rows, token_ids)
    changed = [row for row, draw in enumerate(draws) if not _takes_likeliest(draw)]
    for alike in _portions(changed, draws, rows.shape[-1]):
        token_ids[alike] = _choose(rows[alike], [draws[row] for row in alike])
    return _tokens(rows, token_ids, draws)


def _refuse_broken(rows: Floats, likeliest: Indices) -> None:
    # A row with NaN in it has its first NaN for a maximum.
    maxima = rows[np.arange(len(rows)), likeliest]
    broken = np.flatnonzero(~np.isfinite(maxima)).tolist()
    if broken:
        raise BrokenLogitsError("the model's logits are not numbers", rows=tuple(broken))


def _takes_likeliest(draw: Draw) -> bool:
    sampling = draw.sampling
    return sampling.temperature == 0 and not sampling.logit_bias and draw.history is None


def _portions(rows: Sequence[int], draws: Sequence[Draw], vocabulary: int) -> Iterator[list[int]]:
    """Rows that take the same steps, as many at a time as fit a processor's cache."""

    def steps(row: int) -> tuple[bool, bool]:
        return draws[row].sampling.temperature > 0, truncates(draws[row].sampling)

    most = max(1, _CACHED // vocabulary)
    for _, group in groupby(sorted(rows, key=steps), key=steps):
        alike = list(group)
        yield from (alike[start : start + most] for start in range(0, len(alike), most))


# --- choosing a token ------------------------------------------------------------------------


def _choose(logits: Floats, draws: Sequence[Draw]) -> Indices:
    """Change logits of requests with the same steps as each of them asks, in place, and choose."""
    for row, draw in zip(logits, draws, strict=True):
        if draw.sampling.logit_bias:
            apply_bias(row, draw.sampling.logit_bias)
        if draw.history is not None:
            apply_penalties(row, draw.sampling, draw.history)
    samplings = [draw.sampling for draw in draws]
    if samplings[0].temperature == 0:
        likeliest: Indices = logits.argmax(axis=-1)
        return likeliest
    weights = _weights(logits, [sampling.temperature for sampling in samplings])
    if truncates(samplings[0]):
        truncate(weights, samplings)
    numbers = np.array([uniform(draw.sampling.seed, draw.position) for draw in draws])
    return _fall_in_blocks(weights, numbers)


def _weights(logits: Floats, temperatures: Sequence[float]) -> Floats:
    """exp((logits - maximum) / temperature), followed by zeros up to a whole number of blocks."""
    rows, size = logits.shape
    weights = np.empty((rows, -(-size // _BLOCK) * _BLOCK), dtype=np.float32)
    divisors = np.clip(np.array(temperatures), *_TEMPERATURES).astype(np.float32)
    # Shifting before dividing keeps every quotient at or below 0, whatever the temperature.
    with np.errstate(over="ignore", under="ignore"):
        np.subtract(logits, logits.max(axis=-1, keepdims=True), out=weights[:, :size])
        weights[:, size:] = -np.inf
        weights /= divisors[:, None]
        np.exp(weights, out=weights)
    return weights


def _fall_in_blocks(weights: Floats, numbers: NDArray[np.float64]) -> Indices:
    """Index at which each row's number falls: first among the sums of blocks, then in a block."""
    blocks = weights.reshape(len(weights), -1, _BLOCK)
    block, rest = _fall(blocks.sum(axis=-1), numbers)
    index, _ = _fall(blocks[np.arange(len(blocks)), block], rest)
    return block * _BLOCK + index


def _fall(weights: Floats, numbers: NDArray[np.float64]) -> tuple[Indices, NDArray[np.float64]]:
    """Index at which each row's number falls among the running sums, and where within its weight.

    Args:
        weights: `[R, n]`, not negative, some of each row positive.
        numbers: `[R]`, in [0, 1).

    Returns:
        Indices of positive weights, `[R]`, and numbers in [0, 1), `[R]`.
    """
    rows = np.arange(len(weights))
    sums = weights.cumsum(axis=-1, dtype=np.float64)
    goals = numbers * sums[:, -1]
    # Rounding may put the number on the last sum, behind every token.
    last = np.count_nonzero(sums < sums[:, -1:], axis=-1)
    index = np.minimum(np.count_nonzero(sums <= goals[:, None], axis=-1), last)
    weight = weights[rows, index].astype(np.float64)
    within = (goals - (sums[rows, index] - weight)) / weight
    return index, within.clip(0, np.nextafter(1, 0))


# --- log probabilities -----------------------------------------------------------------------


def _tokens(logits: Floats, token_ids: Indices, draws: Sequence[Draw]) -> list[Token]:
    tokens = [Token(token_id=token_id) for token_id in token_ids.tolist()]
    asked = [row for row, draw in enumerate(draws) if draw.sampling.top_logprobs is not None]
    for some in _portions(asked, draws, logits.shape[-1]):
        counts = [draws[row].sampling.top_logprobs or 0 for row in some]
        reported = _with_logprobs(logits[some], token_ids[some], counts)
        for row, token in zip(some, reported, strict=True):
            tokens[row] = token
    return tokens


def _with_logprobs(logits: Floats, token_ids: Indices, counts: Sequence[int]) -> list[Token]:
    """Tokens with their log probabilities, and those of each row's `counts` most likely ones."""
    others = _most_likely(logits, max(counts))
    ids = np.concatenate([token_ids[:, None], others], axis=-1)
    shifted = np.take_along_axis(logits, ids, axis=-1).astype(np.float64)
    shifted -= logits.max(axis=-1, keepdims=True)
    sums = _weights(logits, [1.0] * len(logits)).sum(axis=-1, keepdims=True)
    logprobs = (shifted - np.log(sums.astype(np.float64))).clip(min=IMPOSSIBLE_LOGPROB)
    reported = zip(ids.tolist(), logprobs.tolist(), counts, strict=True)
    return [
        Token(
            token_id=row_ids[0],
            logprob=row_logprobs[0],
            top_logprobs=tuple(zip(row_ids, row_logprobs, strict=True))[1 : count + 1],
        )
        for row_ids, row_logprobs, count in reported
    ]


def _most_likely(logits: Floats, count: int) -> Indices:
    """Indices of each row's largest logits, largest first, the lower index first of equals."""
    rows, vocabulary = logits.shape
    count = min(count, vocabulary)
    if count == 0:
        return np.empty((rows, 0), dtype=np.int64)
    ends = np.partition(logits, vocabulary - count, axis=-1)[:, vocabulary - count]
    marked = head(logits, np.full(rows, count), ends)
    ids = np.flatnonzero(marked).reshape(rows, count) % vocabulary
    order = np.argsort(-np.take_along_axis(logits, ids, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(ids, order, axis=-1)
