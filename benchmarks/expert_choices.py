"""Which experts a model chose, so that another width of the weights can be held to the same ones.

Rounding does two things to a mixture of experts: it changes what each expert answers a little, and
where two experts are about as good it changes which of them answers. Held to the same experts, two
runs differ by the first alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from unittest.mock import patch

import torch
from torch import Tensor

from shared.kernels.expert_choice import choose_experts
from shared.kimi_linear.feed_forward import MixtureOfExperts

PASSED_OVER: Final = -10.0
"""Added to the scores, which are in (0, 1), of all experts but those to be chosen again."""


class ExpertChoices:
    """The experts of every token in every layer of one run, in the order of the computation.

    A run that repeats them has to be of the same tokens, or the first of them, in the same slices.
    """

    def __init__(self) -> None:
        self._experts: list[Tensor] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep what is chosen meanwhile."""
        choose = MixtureOfExperts.choose

        def recording(mixture: MixtureOfExperts, x: Tensor) -> tuple[Tensor, Tensor]:
            experts, shares = choose(mixture, x)
            self._experts.append(experts[:, : mixture.choice.experts])
            return experts, shares

        with patch.object(MixtureOfExperts, "choose", recording):
            yield

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Have the same experts chosen again; their shares follow from the scores of this run."""
        recorded = iter(self._experts)

        def repeating(mixture: MixtureOfExperts, x: Tensor) -> tuple[Tensor, Tensor]:
            router = mixture.weights.router
            passed_over = torch.full((x.shape[0], router.shape[0]), PASSED_OVER)
            bias = passed_over.scatter_(-1, next(recorded), 0.0)
            return choose_experts(x, router, bias, mixture.choice)

        with patch.object(MixtureOfExperts, "choose", repeating):
            yield
