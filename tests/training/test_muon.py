"""Steps of matrices have singular values of about one, whatever the gradient's."""

import pytest
import torch

from training.muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40), (2, 40, 8)])
def test_what_is_orthogonalized_has_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    spread = left @ torch.diag_embed(values.clamp(min=1e-1 * float(values.max()))) @ right
    found = torch.linalg.svdvals(orthogonalized(spread))
    assert float(found.min()) > 0.6
    assert float(found.max()) < 1.3


def test_the_directions_of_a_matrix_are_kept() -> None:
    left, _ = torch.linalg.qr(torch.randn(12, 12))
    right, _ = torch.linalg.qr(torch.randn(12, 12))
    matrix = left @ torch.diag(torch.linspace(0.3, 1, 12)) @ right
    (found,) = orthogonalized(matrix.unsqueeze(0))
    within = left.mT @ found @ right.mT
    assert float((within - torch.diag(within.diag())).abs().max()) < 1e-4


def test_matrices_of_unlike_shapes_all_move_against_their_gradients() -> None:
    matrices = [torch.zeros(4, 6), torch.zeros(6, 4), torch.zeros(4, 6)]
    muon = Muon(matrices, momentum=0.9, weight_decay=0.0)
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    muon.step(0.1)
    for matrix in matrices:
        assert matrix.grad is not None
        assert float((matrix * matrix.grad).sum()) < 0
        assert 0.05 < float(torch.linalg.matrix_norm(matrix, 2)) < 0.2


def test_a_matrix_without_a_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="no gradient"):
        Muon([torch.zeros(2, 2)], momentum=0.9, weight_decay=0.0).step(0.1)
