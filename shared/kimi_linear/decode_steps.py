"""Decode steps on memory of their own, so that what runs them can be captured."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from shared.kernels.batch import Placement
from shared.kernels.decode_batch import DecodeBatch
from shared.kimi_linear.model import KimiLinear
from shared.kimi_linear.state_pool import StatePool

KEPT_STEPS: Final = 32
"""Sizes of batches whose steps are kept, the last ones used; most of what each takes is logits."""


class DecodeSteps:
    """Runs the next token of a few requests, however many, through a model."""

    def __init__(self, model: KimiLinear, pool: StatePool) -> None:
        self._model = model
        self._pool = pool
        self._kept: OrderedDict[tuple[int, int], _DecodeStep] = OrderedDict()

    def __call__(
        self, tokens: Sequence[int], seen: Sequence[int], where: Sequence[Placement]
    ) -> Tensor:
        """Run token r of a request that has seen `seen[r]`; the requests' states advance.

        Returns:
            Logits after each token, `[R, vocabulary]`, fp32.
        """
        most_pages = max(len(placement.pages) for placement in where)
        size = len(tokens), 1 << (most_pages - 1).bit_length()
        step = self._kept.get(size) or _DecodeStep(self._model, self._pool, *size)
        self._kept[size] = step
        self._kept.move_to_end(size)
        if len(self._kept) > KEPT_STEPS:
            self._kept.popitem(last=False)
        return step(tokens, seen, where)


class _DecodeStep:
    """The step of R requests with up to so many pages."""

    def __init__(self, model: KimiLinear, pool: StatePool, requests: int, most_pages: int) -> None:
        tokens = torch.zeros(requests, dtype=torch.int64, device=pool.device)
        batch = DecodeBatch(requests, most_pages, pool.device)
        self._tokens = tokens
        self._batch = batch
        self._run = model.captured(lambda: model.logits(model(tokens, pool, batch)))

    def __call__(
        self, tokens: Sequence[int], seen: Sequence[int], where: Sequence[Placement]
    ) -> Tensor:
        self._tokens.copy_(torch.tensor(tokens))
        self._batch.take(seen, where)
        return self._run().clone()
