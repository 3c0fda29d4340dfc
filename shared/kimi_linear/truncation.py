"""Truncation sampling: which of the likeliest tokens a request allows at all.

Each of top_k, min_p and top_p keeps a head of the tokens in order of their probability, so together
they keep one head: its length, and the probability at its end, say everything.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shared.messages import Sampling

_FEW: Final = 1024
"""Likeliest tokens that are looked at first; rows that keep more are sorted whole."""

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]


def truncates(sampling: Sampling) -> bool:
    """Whether a request leaves out any token."""
    return sampling.top_k > 0 or sampling.min_p > 0 or sampling.top_p < 1


def truncate(weights: Floats, samplings: Sequence[Sampling]) -> None:
    """Set to zero what each row's request leaves out, in place.

    Kept are the `top_k` likeliest tokens; of them those at least `min_p` times as likely as the
    likeliest; of these the fewest likeliest that have at least `top_p` of what they all have
    together. Of equally likely tokens the lower come first. The likeliest is always kept.

    Args:
        weights: probabilities as parts of the likeliest one's, `[R, n]`: each row has a 1.
        samplings: one for each row.
    """
    n = weights.shape[-1]
    lengths, ends = _heads(weights, samplings, min(_FEW, n))
    longer = np.flatnonzero(lengths > _FEW)
    if len(longer):
        lengths[longer], ends[longer] = _heads(
            weights[longer], [samplings[row] for row in longer.tolist()], n
        )
    weights *= head(weights, lengths, ends)


def head(values: Floats, lengths: Indices, ends: Floats) -> NDArray[np.bool_]:
    """Mark the first tokens of each row in order of value, the lower index first of equals.

    Args:
        values: `[R, n]`.
        lengths: how many tokens to mark, `[R]`, 1 to n.
        ends: the smallest marked value, `[R]`.

    Returns:
        Membership, `[R, n]`.
    """
    marked = values >= ends[:, None]
    surplus = np.count_nonzero(marked, axis=-1) - lengths
    for row in np.flatnonzero(surplus):
        equals = np.flatnonzero(values[row] == ends[row])
        marked[row, equals[-surplus[row] :]] = False
    return marked


def _heads(weights: Floats, samplings: Sequence[Sampling], width: int) -> tuple[Indices, Floats]:
    """Length and last weight of each row's head, sought among its `width` likeliest tokens.

    A length over `width` says that they are not enough; the row's weight then means nothing.
    """
    rows, n = np.arange(len(weights)), weights.shape[-1]
    top_k, min_p, top_p = np.array([(each.top_k, each.min_p, each.top_p) for each in samplings]).T
    top = _largest(weights, width)
    sums = top.cumsum(axis=-1, dtype=np.float64)

    lengths = np.where(top_k > 0, np.minimum(top_k, n), n).astype(np.int64)
    lengths = np.minimum(lengths, _length(top >= min_p[:, None], n))
    kept = sums[rows, np.minimum(lengths, width) - 1]
    # What top_k and min_p keep beyond these tokens is not known yet; without them it is the whole.
    beyond = np.where((top_k == 0) & (min_p == 0), weights.sum(axis=-1), np.inf)
    mass = np.where(lengths <= width, kept, beyond)
    enough = np.where(top_p < 1, top_p * mass, np.inf)
    lengths = np.minimum(lengths, _length(sums - top < enough[:, None], n)).clip(min=1)
    return lengths, top[rows, np.minimum(lengths, width) - 1]


def _largest(values: Floats, count: int) -> Floats:
    """The `count` largest values of each row, largest first."""
    n = values.shape[-1]
    top = values if count == n else np.partition(values, n - count, axis=-1)[:, n - count :]
    return np.sort(top, axis=-1)[:, ::-1]


def _length(is_kept: NDArray[np.bool_], n: int) -> Indices:
    """Tokens kept of n, when the likeliest are these; it may be all if none of them is left out."""
    counts = np.count_nonzero(is_kept, axis=-1)
    return np.where(counts < is_kept.shape[-1], counts, n)
