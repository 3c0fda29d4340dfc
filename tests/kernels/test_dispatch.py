"""Kernels are chosen by device and width of the weights, once."""

import pytest
import torch

from shared.errors import UnsupportedDeviceError
from shared.kernels.cpu.kda import kda
from shared.kernels.cpu.linear import MatrixUnitLinear, TiledLinear
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
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_units)
    monkeypatch.setattr(MatrixUnitLinear, "__init__", lambda self, weight: None)
    made = kernels_for("cpu", "bfloat16").linear(torch.ones(8, 16, dtype=torch.bfloat16))
    assert isinstance(made, linear)
    assert isinstance(kernels_for("cpu", "float32").linear(torch.ones(8, 16)), TiledLinear)
