"""Kernels are chosen by device, once."""

import pytest

from shared.kernels.cpu.kda import kda_chunked
from shared.kernels.dispatch import kernels_for


def test_a_cpu_gets_the_torch_kernels() -> None:
    assert kernels_for("cpu").kda_prefill is kda_chunked


def test_a_device_without_kernels_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'abacus'"):
        kernels_for("abacus")
