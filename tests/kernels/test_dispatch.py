"""Kernels are chosen by device and width of the weights, once."""

import pytest
import torch

from shared.errors import UnsupportedDeviceError
from shared.kernels import dispatch
from shared.kernels.cpu.feed_forward import TiledExperts
from shared.kernels.cpu.kda import kda
from shared.kernels.cpu.linear import TiledLinear
from shared.kernels.cpu.matrix_units.linear import MatrixUnitLinear
from shared.kernels.dispatch import kernels_for


def test_a_cpu_gets_the_compiled_kernels() -> None:
    assert kernels_for("cpu", "float32").kda is kda


def test_activations_on_a_cpu_are_fp32_whatever_the_weights() -> None:
    widths = [kernels_for("cpu", dtype) for dtype in ("float32", "bfloat16", "int8")]
    assert {kernels.activation_dtype for kernels in widths} == {torch.float32}
    assert widths[1].loaded_dtype is torch.bfloat16


def test_a_device_without_kernels_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedDeviceError, match="'abacus'"):
        kernels_for("abacus", "float32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedDeviceError, match="no CUDA device"):
        kernels_for("cuda", "float32")


@pytest.mark.parametrize(("has_units", "linear"), [(True, MatrixUnitLinear), (False, TiledLinear)])
def test_bf16_takes_matrix_units_exactly_where_there_are_any(
    monkeypatch: pytest.MonkeyPatch, has_units: bool, linear: type
) -> None:
    monkeypatch.setattr(dispatch, "has_matrix_units", lambda: has_units)
    made = kernels_for("cpu", "bfloat16").linear(torch.ones(64, 96, dtype=torch.bfloat16))
    assert isinstance(made, linear)
    assert isinstance(kernels_for("cpu", "float32").linear(torch.ones(64, 96)), TiledLinear)


@pytest.mark.parametrize("shape", [(64, 72), (31, 96)])
def test_a_matrix_that_is_not_made_of_whole_tiles_is_multiplied_without_units(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(dispatch, "has_matrix_units", lambda: True)
    kernels = kernels_for("cpu", "bfloat16")
    assert isinstance(kernels.linear(torch.ones(shape, dtype=torch.bfloat16)), TiledLinear)
    up, down = torch.ones(2, 64, 48), torch.ones(2, 48, 32)
    assert isinstance(kernels.experts(up.bfloat16(), down.bfloat16()), TiledExperts)
