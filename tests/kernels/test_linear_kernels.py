"""Every form of a matrix multiplies as the matrix does, within what its width allows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.kernels.cpu.int8 import BASE, LARGEST_DIGIT, Digits, Int8Linear
from shared.kernels.cpu.linear import (
    PACKED_FROM,
    PackedLinear,
    PlainLinear,
    float_linear,
)

INPUTS, OUTPUTS = 576, 320
INT8_ERROR = 0.02
"""Relative; the weights are rounded to 127 steps of each row's largest."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(OUTPUTS, INPUTS) / 24.0


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("form", [PlainLinear, PackedLinear])
def test_fp32_forms_multiply_exactly(
    weight: Tensor, form: type[PlainLinear | PackedLinear], rows: int
) -> None:
    x = torch.randn(rows, INPUTS)
    expected = x.double() @ weight.double().T
    assert relative_error(form(weight)(x), expected) < 1e-6


def test_bf16_weights_take_and_give_fp32(weight: Tensor) -> None:
    x = torch.randn(5, INPUTS)
    product = float_linear(weight.bfloat16())(x)
    assert product.dtype == torch.float32
    assert relative_error(product, x.double() @ weight.double().T) < 1e-2


def test_large_matrices_are_packed_and_small_ones_are_not() -> None:
    assert isinstance(float_linear(torch.randn(PACKED_FROM // 64, 64)), PackedLinear)
    assert isinstance(float_linear(torch.randn(16, 64)), PlainLinear)


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_int8_loses_the_rounding_of_the_weights_and_next_to_nothing_else(
    weight: Tensor, rows: int
) -> None:
    x = torch.randn(rows, INPUTS)
    product = Int8Linear(weight)(x)
    scale = weight.abs().amax(dim=-1, keepdim=True).double() / 127
    rounded = (weight.double() / scale).round() * scale
    assert relative_error(product, x.double() @ rounded.T) < 5e-4
    assert relative_error(product, x.double() @ weight.double().T) < INT8_ERROR


def test_a_row_of_an_int8_product_is_bit_for_bit_the_same_in_any_batch(weight: Tensor) -> None:
    linear, x = Int8Linear(weight), torch.randn(33, INPUTS)
    together = linear(x)
    for row in (0, 1, 32):
        assert torch.equal(linear(x[row : row + 1])[0], together[row])


@pytest.mark.parametrize("engine", ["onednn", "fbgemm"])
def test_int8_does_not_depend_on_the_engine_that_torch_prefers(
    weight: Tensor, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.quantized, "engine", engine)
    x = torch.randn(2, INPUTS)
    expected = x.double() @ weight.double().T
    assert relative_error(Int8Linear(weight)(x), expected) < INT8_ERROR
    assert torch.backends.quantized.engine == engine, "it was left as it was"


def test_rows_of_very_different_sizes_do_not_disturb_each_other(weight: Tensor) -> None:
    x = torch.randn(3, INPUTS) * torch.tensor([[1e-6], [1.0], [1e6]])
    product = Int8Linear(weight)(x)
    for row in range(3):
        assert relative_error(product[row], x[row].double() @ weight.double().T) < INT8_ERROR


def test_a_row_of_zeros_gives_zeros(weight: Tensor) -> None:
    assert not Int8Linear(weight)(torch.zeros(2, INPUTS)).any()


@settings(max_examples=100)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50))
def test_digits_stay_in_their_range_and_give_the_number_back(numbers: list[float]) -> None:
    x = torch.tensor([numbers])
    digits = Digits.of(x)
    assert digits.values.abs().max() <= LARGEST_DIGIT
    assert torch.equal(digits.values, digits.values.round())
    back = digits.scale * (BASE * digits.values[0] + digits.values[1])
    assert (back - x).abs().max() <= 0.51 * float(digits.scale) + 1e-38
