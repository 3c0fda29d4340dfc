"""The choice of experts in compiled form."""

from typing import Final

import numba
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shared.kernels.cpu.compiled import kernel, part
from shared.kernels.cpu.elementary import sigmoid
from shared.kernels.cpu.recording import empty, empty_indices
from shared.kernels.cpu.row_products import Floats, multiply_rows
from shared.kernels.expert_choice import ExpertChoice

Indices = NDArray[np.int64]

TOKENS: Final = 16
"""That a thread chooses for at a time."""


def choose_experts(
    x: Tensor, router: Tensor, choice_bias: Tensor, choice: ExpertChoice
) -> tuple[Tensor, Tensor]:
    """See `shared.kernels.expert_choice.choose_experts`; of equal scores the first is chosen."""
    experts = empty_indices(x.shape[0], choice.experts + choice.shared)
    shares = empty(*experts.shape)
    _choose(
        x.numpy(),
        router.numpy(),
        choice_bias.numpy(),
        choice.groups,
        choice.kept_groups,
        choice.renormalizes,
        np.float32(choice.scale),
        choice.shared,
        experts.numpy(),
        shares.numpy(),
    )
    return experts, shares


@kernel
def _choose(
    x: Floats,
    router: Floats,
    bias: Floats,
    groups: int,
    kept_groups: int,
    renormalizes: bool,
    scale: np.float32,
    shared: int,
    experts: Indices,
    shares: Floats,
) -> None:
    chosen = experts.shape[1] - shared
    for n in numba.prange((x.shape[0] + TOKENS - 1) // TOKENS):
        first, stop = n * TOKENS, min(x.shape[0], (n + 1) * TOKENS)
        scores = np.empty((stop - first, router.shape[0]), np.float32)
        multiply_rows(x[first:stop], router, scores)
        biased = np.empty(router.shape[0], np.float32)
        for token in range(stop - first):
            own = scores[token]
            for e in range(own.shape[0]):
                own[e] = sigmoid(own[e])
            for e in range(own.shape[0]):
                biased[e] = own[e] + bias[e]
            if groups > 1:
                _pass_over_groups(biased, groups, kept_groups)
            best = experts[first + token, :chosen]
            _take_best(biased, best)
            _share(own, best, renormalizes, scale, shares[first + token])
            for e in range(shared):
                experts[first + token, chosen + e] = router.shape[0] + e
                shares[first + token, chosen + e] = 1


@part
def _take_best(biased: Floats, chosen: Indices) -> None:
    """Write the indices of the largest scores, largest first; these scores are lost."""
    for choice in range(chosen.shape[0]):
        best = 0
        for e in range(1, biased.shape[0]):
            if biased[e] > biased[best]:
                best = e
        chosen[choice] = best
        biased[best] = -np.inf


@part
def _share(
    scores: Floats, chosen: Indices, renormalizes: bool, scale: np.float32, shares: Floats
) -> None:
    total = np.float32(1e-20)
    for e in chosen:
        total += scores[e]
    factor = scale / total if renormalizes else scale
    for choice in range(chosen.shape[0]):
        shares[choice] = factor * scores[chosen[choice]]


@part
def _pass_over_groups(biased: Floats, groups: int, kept: int) -> None:
    """Put the experts of all but the best groups out of the question."""
    size = biased.shape[0] // groups
    sums = np.empty(groups, np.float32)
    for group in range(groups):
        first = second = np.float32(-np.inf)
        for score in biased[group * size : (group + 1) * size]:
            if score > first:
                first, second = score, first
            elif score > second:
                second = score
        sums[group] = first + second
    best = np.empty(kept, np.int64)
    _take_best(sums, best)
    for kept_group in best:
        sums[kept_group] = np.inf
    for group in range(groups):
        if sums[group] != np.inf:
            biased[group * size : (group + 1) * size] = -np.inf
