"""Rows of the embedding, as fp32."""

import pytest
import torch
from torch.nn import functional

from shared.kernels.cpu.embedding import EmbeddingRows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rows_of_tokens(dtype: torch.dtype) -> None:
    weight = torch.randn(11, 37).to(dtype)
    tokens = torch.tensor([10, 0, 3, 3])
    assert torch.equal(EmbeddingRows(weight)(tokens), functional.embedding(tokens, weight).float())
