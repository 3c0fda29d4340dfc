"""Every form of a matrix multiplies as the matrix does, within what its width allows."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.kernels.cpu.linear import TiledLinear
from shared.kernels.cpu.matrix import Matrix
from shared.kernels.cpu.products import multiply
from shared.kernels.linear import Linear
from tests.kernels.matrices import rounded, unpacked

INPUTS, OUTPUTS = 576, 320
INT8_ERROR = 0.02
"""Relative; the weights are rounded to 127 steps of each row's largest."""

FORMS: dict[str, Callable[[Tensor], Linear]] = {
    "float32": lambda weight: TiledLinear(Matrix.of(weight)),
    "bfloat16": lambda weight: TiledLinear(Matrix.of(weight.bfloat16())),
    "int8": lambda weight: TiledLinear(Matrix.rounded(weight)),
}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(OUTPUTS, INPUTS) / 24.0


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 64, 69, 300])
@pytest.mark.parametrize("form", FORMS)
def test_only_the_weights_are_rounded(weight: Tensor, form: str, rows: int) -> None:
    x = torch.randn(rows, INPUTS)
    product = FORMS[form](weight)(x)
    assert product.dtype == torch.float32
    assert relative_error(product, x.double() @ rounded(weight, form).T) < 1e-6


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 160),
    inputs=st.integers(1, 40) | st.integers(380, 390) | st.just(1600),
    outputs=st.integers(1, 80),
    form=st.sampled_from(sorted(FORMS)),
    threads=st.integers(1, 3),
)
def test_any_shape_is_multiplied_whatever_is_left_over_at_the_edges(
    rows: int, inputs: int, outputs: int, form: str, threads: int
) -> None:
    torch.set_num_threads(threads)
    weight, x = torch.randn(outputs, inputs), torch.randn(rows, inputs)
    product = FORMS[form](weight)(x)
    expected = x.double() @ rounded(weight, form).T
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 70), outputs=st.integers(1, 80), threads=st.integers(1, 3))
def test_nothing_is_written_beside_the_product(rows: int, outputs: int, threads: int) -> None:
    frame = np.full((rows + 2, outputs + 2), np.nan, np.float32)
    x, weight = torch.randn(rows, 24), Matrix.of(torch.randn(outputs, 24))
    product = frame[1:-1, 1:-1]
    multiply(x.numpy(), weight.values, weight.scales, product, threads)
    assert not np.isnan(product).any()
    assert np.isnan(frame).sum() == frame.size - product.size


@pytest.mark.parametrize("form", FORMS)
def test_a_row_is_bit_for_bit_the_same_in_any_batch(weight: Tensor, form: str) -> None:
    linear, x = FORMS[form](weight), torch.randn(133, INPUTS)
    together = linear(x)
    for first, stop in ((0, 1), (1, 3), (132, 133), (0, 64), (7, 100)):
        assert torch.equal(linear(x[first:stop]), together[first:stop])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(weight: Tensor, threads: int) -> None:
    x = torch.randn(5, INPUTS)
    expected = FORMS["float32"](weight)(x)
    torch.set_num_threads(threads)
    assert torch.equal(FORMS["float32"](weight)(x), expected)


def test_a_part_of_a_wider_projection_is_multiplied_by_itself(weight: Tensor) -> None:
    wide = torch.randn(5, INPUTS + 40)
    linear = FORMS["float32"](weight)
    part = wide[:, 8 : 8 + INPUTS]
    assert torch.equal(linear(part), linear(part.clone()))


@pytest.mark.parametrize("shape", [(64, 5), (33, 7), (1, 3), (3, 70, 4)])
def test_a_matrix_in_panels_is_the_matrix(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    assert torch.equal(unpacked(Matrix.of(weight)).view(shape), weight)


def test_int8_rounds_to_the_nearest_of_127_steps() -> None:
    weight = torch.tensor([[1.0, -0.5, 0.004], [0.0, 0.0, 0.0]])
    matrix = Matrix.rounded(weight)
    assert unpacked(matrix).squeeze(0).tolist() == [[127, -64, 1], [0, 0, 0]]
    assert matrix.scales[0] == np.float32(1 / 127)


def test_int8_rows_of_very_different_sizes_do_not_disturb_each_other(weight: Tensor) -> None:
    x = torch.randn(3, INPUTS) * torch.tensor([[1e-6], [1.0], [1e6]])
    product = FORMS["int8"](weight)(x)
    for row in range(3):
        assert relative_error(product[row], x[row].double() @ weight.double().T) < INT8_ERROR


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_zeros_gives_zeros(weight: Tensor, form: str) -> None:
    assert not FORMS[form](weight)(torch.zeros(2, INPUTS)).any()
